"Build the site into `_docs`: `make docs`. Notebooks come with the outputs they are stored with; nothing is executed"
import argparse, ast, inspect, re, shutil, sys, tempfile, warnings
from dataclasses import is_dataclass
from functools import cached_property
from importlib import import_module
from operator import attrgetter
from pathlib import Path

from bs4 import BeautifulSoup
from fastcore.docments import DocmentTbl
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.process import NBProcessor, Processor
from nbdev.processors import clean_magics, hide_line, rm_export, rm_header_dash, strip_ansi
from nbdev.showdoc import showdoc_nm
from sphinx.cmd.build import build_main

root = Path(__file__).parents[1]
lib = 'fastai_bs_finder'
groups = {'Tutorials': ('nbs/0*',), 'Answers': ('docs/faq', 'docs/which_tool', 'docs/how_it_works'), 'Trainings': ('nbs/6*',),
          'Results': ('benchmarks/README', 'benchmarks/[!R]*'),
          'What you call': ('docs/api', 'nbs/50*', 'nbs/42*', 'nbs/41*', 'nbs/43*', 'nbs/52*', 'nbs/34*', 'nbs/10*'),
          'What is inside': ('nbs/[1-5]*',), 'Project': ('docs/versions', 'CONTRIBUTING')}  # in the order of use; a page is where it is named first


def tidy(
    s:str, # A signature or a table, as Python writes them
) -> str: # With `f` for <function f at 0x…>, `Callable` for collections.abc.Callable
    "Names as one would type them"
    s = re.sub(r"<(?:function|class) '?([\w.]+)'?(?: at 0x\w+)?>", r'\1', s)
    return re.sub(r'\b(?:[a-z_]+\.)+(?=[A-Z])', '', s)


def signature(o):
    "Parameters and defaults; types are in the table"
    try: sig = inspect.signature(o)
    except ValueError: return ''  # an exception without an __init__
    params = [p.replace(annotation=p.empty) for n,p in sig.parameters.items() if n not in ('self', 'cls')]
    return tidy(str(sig.replace(parameters=params, return_annotation=sig.empty)))


def table(o):
    "Name, type, default and docment of each parameter, or of each field of a named tuple or a dataclass"
    if not (inspect.isclass(o) and (issubclass(o, tuple) or is_dataclass(o))): return tidy(DocmentTbl(o)._repr_markdown_())
    fields = re.findall(r'^    (\w+)\s*:\s*([^=#\n]+?)\s*(?:=[^#\n]*)?# (.*)$', inspect.getsource(o), re.M)
    return '\n'.join(['| | **Type** | **Details** |', '|---|---|---|', *('| ' + ' | '.join(x.replace('|', r'\|') for x in f) + ' |' for f in fields)])


def symbols(
    cell, # Exported cell
    mod, # The module it is exported to
) -> dict: # Public names that it defines, methods and patched ones as Class.name, and their objects
    "What a cell adds to the API: everything with a name of its own and a docstring"
    names = []
    for o in cell.parsed_():
        if isinstance(o, ast.FunctionDef | ast.ClassDef):
            nm = showdoc_nm(o)
            names += nm if isinstance(nm, list) else [nm]
        if isinstance(o, ast.ClassDef): names += [f'{o.name}.{f.name}' for f in o.body if isinstance(f, ast.FunctionDef)]
    names += [n for n in mod.__all__ if f"mk_class('{n}'" in cell.source]
    found = {}
    for name in names:
        owner,_,attr = name.rpartition('.')
        if re.search(r'(^|\.)_', name) or not (owner or name in mod.__all__): continue
        o = inspect.getattr_static(attrgetter(owner)(mod) if owner else mod, attr)
        if getattr(o, '__doc__', None): found[name] = o
    return found


def entry(name, o, mod):
    "Signature, one-line doc and table, as a directive of Sphinx's Python domain"
    f = o.fget if isinstance(o, property) else o.func if isinstance(o, cached_property) else getattr(o, '__func__', o)
    kind = 'class' if inspect.isclass(o) else 'property' if isinstance(o, property | cached_property) else 'method' if '.' in name else 'function'
    head = [f'````{{py:{kind}}} {name}{"" if kind == "property" else signature(f)}', f':module: {mod.__name__}'] + [':classmethod:']*isinstance(o, classmethod)
    return '\n'.join([*head, '', inspect.cleandoc(o.__doc__), '', table(f), '````'])


def is_called(
    name:str, # A public name, of a method with its class
    o, # Its object
) -> bool: # Is it a method of the learner or its recorder, or a callback?
    "What a training calls, as against what is beneath it"
    from fastai.callback.core import Callback
    return name.startswith(('Learner.', 'Recorder.')) or name in vars(import_module(f'{lib}.all')) and inspect.isclass(o) and issubclass(o, Callback)


def alt_text(cell):
    "What `#| fig-alt:` says of a cell's picture"
    if alt := cell.directives_.get('fig-alt:'): cell.metadata['mystnb'] = dict(image=dict(alt=' '.join(alt) + '.'))
    cell.source = re.sub(r'^#\| fig-alt: .*\n', '', cell.source)


class show_api(Processor):
    "Put the documentation of what a cell exports in the place of the cell, that of what is called before all of them, and note it in `api`"
    api = {}
    def begin(self):
        cells = self.nb.cells
        exp = next((c.directives_['default_exp'] for c in cells if 'default_exp' in c.directives_), None)
        if not exp: return
        mod = import_module(f'{lib}.{exp}')
        self.api[mod.__name__] = api = {}
        def show(i, found):
            if found: cells.insert(i, mk_cell('\n\n'.join(entry(n, o, mod) for n,o in found.items()), 'markdown'))
        exported = [i for i,c in enumerate(cells) if 'export' in c.directives_]
        found = {i: symbols(cells[i], mod) for i in exported}
        for i in exported: api |= found[i]
        for i in reversed(exported): show(i + 1, {n: o for n,o in found[i].items() if not is_called(n, o)})
        show(exported[0], {n: o for n,o in api.items() if is_called(n, o)})


def rm_progress(cell):
    "Remove outputs with nothing in them to see: what is left of progress bars"
    def visible(o):
        page = BeautifulSoup(''.join(o.get('data', {}).get('text/html', 'text')), 'html.parser')
        for style in page('style'): style.decompose()
        return page.get_text(strip=True) or page.img
    if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if visible(o)]


def api_page(
    api:dict, # Names and objects of each module
) -> str: # Markdown
    "The whole public API: name, one-line doc, link"
    found = {f'{mod}.{name}': o for mod,syms in api.items() for name,o in syms.items()}
    name = lambda full: full.split('.', 2)[2]
    parts = {'On the learner': [f for f in found if name(f).startswith('Learner.')], 'On its recorder': [f for f in found if name(f).startswith('Recorder.')],
             'Callbacks': [f for f,o in found.items() if inspect.isclass(o) and is_called(name(f), o)]}
    first = set(sum(parts.values(), []))
    parts |= {f'`{mod}`': [f for f in found if f'{mod}.{name(f)}' == f and f not in first] for mod in api}
    line = lambda full: f'- {{py:obj}}`{name(full)} <{full}>`: {" ".join(found[full].__doc__.split())}'
    text = [f'## {title}\n\n' + '\n'.join(map(line, fs)) for title,fs in parts.items() if fs]
    return f'# The whole API\n\n> Every public name in a line. `from {lib}.all import *` brings what a training needs\n\n' + '\n\n'.join(text) + '\n'


def stage(
    src:Path, # Empty folder
) -> dict: # Pages of each group, without their suffixes
    "Lay the pages out as they lie in the repository, with the front page at its top: links between them hold as they are"
    shutil.copytree(root/'benchmarks', src/'benchmarks', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(root/'docs', src/'docs', ignore=shutil.ignore_patterns('__pycache__', '*.py', 'static'))
    shutil.copy(root/'CONTRIBUTING.md', src)
    (src/'nbs').mkdir()
    for path in sorted((root/'nbs').glob('*.ipynb')):
        proc = NBProcessor(path, [show_api, alt_text, rm_export, hide_line, clean_magics, rm_header_dash, strip_ansi, rm_progress])
        proc.process()
        proc.nb.metadata['language_info'] = dict(name='python', pygments_lexer='ipython3')
        if path.stem == 'index': index = proc.nb
        else: write_nb(proc.nb, src/'nbs'/path.name)
    (src/'docs/api.md').write_text(api_page(show_api.api))
    pages,placed = {},set()
    for title,globs in groups.items():
        found = dict.fromkeys(p.relative_to(src).with_suffix('') for g in globs for p in sorted(src.glob(g + '.*')) if p.suffix in ('.md', '.ipynb'))
        pages[title] = [p for p in found if p not in placed]
        placed |= {*found}
    toc = '\n\n'.join('\n'.join(['```{toctree}', ':hidden:', f':caption: {title}', '', *map(str, ps), '```']) for title,ps in pages.items())
    index.cells.append(mk_cell(toc, 'markdown'))
    write_nb(index, src/'index.ipynb')
    return pages


def title_and_summary(
    path:Path, # A page, without its suffix
) -> tuple: # Its title, and the line that is set off beneath it
    "What a page is about"
    md = path.with_name(f'{path.name}.md')
    text = md.read_text() if md.exists() else next(c.source for c in read_nb(path.with_name(f'{path.name}.ipynb')).cells if c.cell_type == 'markdown')
    return re.search('^# (.+)', text, re.M)[1],(re.search('^> (.+)', text, re.M) or ['', ''])[1]


def llms_txt(
    src:Path, # Folder of the pages
    pages:dict, # Those of each group
) -> str: # Markdown
    "What the site holds, for language models: llmstxt.org"
    def line(page):
        title,summary = title_and_summary(src/page)
        return f'- [{title}]({page}.html)' + f': {summary}'*bool(summary)
    parts = [f'## {group}\n\n' + '\n'.join(map(line, ps)) for group,ps in pages.items()]
    return '\n\n'.join(['# {}\n\n> {}'.format(*title_and_summary(src/'index')), *parts]) + '\n'


def build(
    out:Path, # Folder for the site, made anew
) -> int: # Exit status: 0 where there was nothing to complain about, a link that leads nowhere included
    "Build the site"
    with tempfile.TemporaryDirectory() as tmp:
        pages = stage(src := Path(tmp)/'src')
        status = build_main(['-q', '-W', '--keep-going', '-c', str(root/'docs'), '-d', f'{tmp}/doctrees', str(src), f'{tmp}/site'])
        shutil.rmtree(out, ignore_errors=True)
        if Path(f'{tmp}/site/index.html').exists():
            shutil.move(f'{tmp}/site', out)
            (out/'llms.txt').write_text(llms_txt(src, pages))
        return status


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=root/'_docs')
    warnings.filterwarnings('ignore', category=FutureWarning)
    sys.exit(build(parser.parse_args().out))
