"Make README.md and its pictures from index.ipynb; `make readme` runs it, a test holds the two equal"
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

nbs = Path(__file__).parent


def readme():
    "The text of README.md, and its pictures as a dictionary of names and bytes"
    nb = nbformat.read(nbs/'index.ipynb', 4)
    nb.metadata.language_info = {'name': 'python'}
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if 'text/html' not in o.get('data', {})]  # what is left of the progress bar
    text,res = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': 'README_files', 'unique_key': 'README'})
    text = re.sub(r'\n[ \t]*\n(?:[ \t]*\n)+', '\n\n', text).strip() + '\n'
    return text,res['outputs']


if __name__ == '__main__':
    text,pictures = readme()
    (nbs.parent/'README.md').write_text(text)
    (nbs.parent/'README_files').mkdir(exist_ok=True)
    for name,data in pictures.items(): (nbs.parent/name).write_bytes(data)
