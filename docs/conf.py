"Sphinx's settings; `build.py` runs it"
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util.nodes import make_refnode

import fastai_bs_finder

project = 'fastai_bs_finder'
version = release = fastai_bs_finder.__version__
root_doc = 'index'
extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4
suppress_warnings = ['myst.header']  # a notebook may begin with a small heading
add_module_names = False
toc_object_entries_show_parents = 'all'
html_theme = 'furo'
html_title = project
html_static_path = ['static']
html_css_files = ['site.css']
html_show_sourcelink = html_copy_source = html_show_copyright = False
html_math_renderer = 'mathml'


def inline_math(self, node):
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(self, node):
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def link_names(app, tree, docname):
    "Names of the API in `code` lead to their documentation"
    objects = {full.split('.', 2)[-1]: o for full,o in app.env.get_domain('py').objects.items()}
    for node in list(tree.findall(nodes.literal)):
        if isinstance(node.parent, nodes.reference | nodes.title): continue
        name = re.sub(r'^learn\.', 'Learner.', re.sub(r'^learn\.recorder\.', 'Recorder.', node.astext().removesuffix('()')))
        o = next((objects[n] for n in (name, f'Learner.{name}', f'Recorder.{name}') if n in objects), None)
        if o: node.replace_self(make_refnode(app.builder, docname, o.docname, o.node_id, node.deepcopy(), name))


def wrap_sentences(app, tree):
    "Printed text that is no table may break its lines"
    for node in tree.findall(nodes.literal_block):
        if 'output' in node['classes'] and not re.search(r'\S {2,}\S', node.astext()): node['classes'].append('prose')


def setup(app):
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
    app.connect('doctree-resolved', link_names)
    app.connect('doctree-read', wrap_sentences)
