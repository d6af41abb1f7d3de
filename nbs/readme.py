"Make README.md and its pictures from index.ipynb, and the cells that install the package; `make readme` runs it, tests hold them equal"
import re
from pathlib import Path

import nbformat
from fastcore.nbio import read_nb, write_nb
from nbconvert import MarkdownExporter

nbs = Path(__file__).parent
colab = 'https://colab.research.google.com'


def address():
    "Where the repository lies, `Source` of `[project.urls]` in pyproject.toml; empty as long as there is none"
    urls = re.search(r'^\[project\.urls\]$(.*?)(?=^\[|\Z)', (nbs.parent/'pyproject.toml').read_text(), re.M | re.S)
    found = urls and re.search(r'^Source *= *"(.+?)/?"', urls[1], re.M)
    return found[1] if found else ''


def with_address(text, url):
    "Links that lead there from anywhere, such as from PyPI, and badges"
    def absolute(link):
        picture,path = link[1],link[2]
        return f"{picture}({url}/{'raw' if picture.startswith('!') else 'blob'}/main/{path})"
    text = re.sub(r'(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)', absolute, text)
    badges = [f'[![Tests]({url}/actions/workflows/test.yml/badge.svg)]({url}/actions/workflows/test.yml)']
    if (repo := url.removeprefix('https://github.com/')) != url:
        badges.append(f'[![Open the tutorial in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{repo}/blob/main/nbs/00_tutorial.mnist.ipynb)')
    title,rest = text.split('\n', 1)
    return f"{title}\n\n{' '.join(badges)}\n{rest}"


def install_cell(url):
    "The first code of a notebook that is run elsewhere"
    how = f'%pip install -q git+{url}' if url else 'raise ImportError("Install fastai_bs_finder first: `pip install .` in a clone of its repository")'
    return f"import importlib.util\nif not importlib.util.find_spec('fastai_bs_finder'):  # on Colab, for example\n    {how}"


def set_install_cells(folder, url):
    for path in sorted(folder.glob('*.ipynb')):
        nb = read_nb(path)
        cell = next((c for c in nb.cells if c.source.startswith('import importlib.util')), None)
        if cell and cell.source != install_cell(url):
            cell.source = install_cell(url)
            write_nb(nb, path)


def take_out_alt(cell):
    "The alternative text of the cell's picture, which its first line gives"
    first,_,rest = cell.source.partition('\n')
    if not first.startswith(alt := '#| fig-alt: '): return
    cell.source = rest
    return first.removeprefix(alt)


def readme(url=None):
    "The text of README.md, and its pictures as a dictionary of names and bytes; `url` in place of `address()`"
    nb = nbformat.read(nbs/'index.ipynb', 4)
    nb.metadata.language_info = {'name': 'python'}
    alts = list(filter(None, map(take_out_alt, nb.cells)))
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if 'text/html' not in o.get('data', {})]  # what is left of the progress bar
    text,res = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': 'README_files', 'unique_key': 'README'})
    text = re.sub(r'\n[ \t]*\n(?:[ \t]*\n)+', '\n\n', text).strip() + '\n'
    for alt in alts: text = text.replace('![png](', f'![{alt}.](', 1)
    url = address() if url is None else url
    return (with_address(text, url) if url else text),res['outputs']


if __name__ == '__main__':
    set_install_cells(nbs, address())
    text,pictures = readme()
    (nbs.parent/'README.md').write_text(text)
    (nbs.parent/'README_files').mkdir(exist_ok=True)
    for name,data in pictures.items(): (nbs.parent/name).write_bytes(data)
