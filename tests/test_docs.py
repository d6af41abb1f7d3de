"The docs site builds, its links lead somewhere, and what its pages say is so"
import importlib, inspect, re, runpy, sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt, nbformat, pytest
from bs4 import BeautifulSoup
from fastai.learner import Learner, Recorder
from filelock import FileLock
from test_project import public

root = Path(__file__).parents[1]
texts = sorted((root/'docs').glob('*.md'))
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::PendingDeprecationWarning')  # MyST and Sphinx have theirs to settle
patched = [(Learner, n) for n in ('set_bs', 'max_bs', 'bs_sweep')] + [(Recorder, n) for n in ('plot_noise_scale', 'plot_bs_layers', 'plot_bs_sweep')]


@pytest.fixture(scope='module')
def site(shared_tmp):
    "The built pages, parsed; built once for all pytest workers"
    out = shared_tmp/'site'
    with FileLock(f'{out}.lock'):
        if not out.exists():
            with pytest.MonkeyPatch.context() as m:
                m.syspath_prepend(root/'docs')
                assert importlib.import_module('build').build(out) == 0
    return out,{p: BeautifulSoup(p.read_text(), 'html.parser') for p in out.rglob('*.html')}


def test_the_readme_has_the_recipes_table():
    table = re.search(r'^\| from bs.*?\n\n', (root/'benchmarks/recipe.md').read_text(), re.M | re.S)[0]
    assert table.count('\n') == 7 and table in (root/'README.md').read_text()


@pytest.mark.slow
def test_pages(site):
    out,pages = site
    names = {str(p.relative_to(out).with_suffix('')) for p in pages}
    stored = [p.relative_to(root).with_suffix('') for folder in ('nbs/*.ipynb', 'benchmarks/*.md', 'docs/*.md') for p in root.glob(folder)]
    assert names >= {'index' if p.name == 'index' else str(p) for p in stored} | {'docs/api', 'search'}
    listed = {(out/a['href']).resolve() for a in pages[out/'index.html'].select('.sidebar-tree a') if a['href'] != '#'}
    assert {out/f'{p}.html' for p in stored if p.name != 'index'} <= listed


@pytest.mark.slow
def test_pages_for_language_models(site):
    "Every page of the sidebar, with what it is about"
    out,pages = site
    lines = re.findall(r'^- \[(.+?)\]\((.+?)\)(?:: (.+))?$', (out/'llms.txt').read_text(), re.M)
    listed = {a['href'] for a in pages[out/'index.html'].select('.sidebar-tree a') if a['href'] != '#'}
    assert {url for _,url,_ in lines} == listed and len(lines) == len(listed)
    for title,url,about in lines: assert pages[out/url].h1.get_text().removesuffix('¶').strip('#') == re.sub('[`*]', '', title), url
    assert all(about for _,url,about in lines if not url.startswith('benchmarks/') and url not in ('CONTRIBUTING.html', 'docs/api.html'))


@pytest.mark.slow
@pytest.mark.parametrize('page,call', [('50_finder', 'bs_find'), ('42_set_bs', 'set_bs'), ('41_memory', 'max_bs'), ('43_track', 'NoiseScale'), ('52_sweep', 'bs_sweep')])
def test_a_page_begins_with_the_call_and_its_example(site, page, call):
    out,pages = site
    article = pages[out/f'nbs/{page}.html'].article
    code,entry = article.select_one('.cell_input'),article.select_one('dl.py')
    assert re.search(rf'\b{call}\(', code.get_text()) and re.search(rf'\b{call}\b', entry.dt.get_text())
    heading = article.find('h2')
    assert code.sourceline < entry.sourceline < heading.sourceline


@pytest.mark.slow
def test_links_and_pictures_lead_somewhere(site):
    out,pages = site
    wrong = []
    for path,page in pages.items():
        for tag,attr in (('a', 'href'), ('img', 'src'), ('link', 'href'), ('script', 'src')):
            for url in (t[attr] for t in page.find_all(tag, **{attr: True})):
                x = urlsplit(url)
                if x.scheme or x.netloc: continue
                target = (path.parent/unquote(x.path)).resolve() if x.path else path
                found = target.is_file() and (not x.fragment or target not in pages or pages[target].find(id=unquote(x.fragment)))
                if not found: wrong.append(f'{path.relative_to(out)}: {url}')
    assert not wrong


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    out,pages = site
    loads = ('script', 'src'), ('img', 'src'), ('link', 'href'), ('iframe', 'src'), ('source', 'src')
    assert not [(path.name, t[attr]) for path,page in pages.items() for tag,attr in loads for t in page.find_all(tag, **{attr: True}) if re.match('(https?:)?//', t[attr])]
    assert not [p for p in out.rglob('*.css') if re.search(r'(url\(|@import)\s*["\']?(https?:)?//', p.read_text())]


@pytest.mark.slow
def test_no_address_of_the_repository(site):
    urls = {a['href'] for page in site[1].values() for a in page.find_all('a', href=True)}
    others = {'https://github.com/pradyunsg/furo', 'https://github.com/hal-314/fastai-batch-size-finder'}  # the theme, and a port of the first finder
    assert not [u for u in urls if re.search('github|colab', u) and u not in others]


@pytest.mark.slow
@pytest.mark.parametrize('name,o', [*public(), *((f'{o.__name__}.{n}', getattr(o, n)) for o,n in patched)], ids=lambda v: v if isinstance(v, str) else '')
def test_public_names_are_on_the_api_page(site, name, o):
    "Each leads to its signature, its doc, and a table of all its parameters"
    out,pages = site
    api = out/'docs/api.html'
    link = next(a for a in pages[api].select('article li > p > a:first-child') if a.get_text() == name)
    url = urlsplit(link['href'])
    head = pages[(api.parent/url.path).resolve()].find(id=url.fragment)
    body = head.find_next_sibling('dd')
    assert body.p.get_text() and body.p.get_text() in link.parent.get_text()
    params = {p.lstrip('*') for p in inspect.signature(o).parameters} - {'self'}
    assert {p.get_text() for p in head.select('.sig-param > .n:first-child')} == params
    assert not params or params <= {tr.find(['td', 'th']).get_text() for tr in body.table.find_all('tr')}


@pytest.mark.slow
def test_pages_are_free_of_leftovers(site):
    for path,page in site[1].items():
        assert not page.find('progress') and not page.select('.cell_output div:empty'), path
        text = page.article.get_text() if page.article else ''
        assert not re.search(r'#\| ?(export|hide|default_exp)|<IPython|nbdev_export|<function|object at 0x', text), path
    noise = next(page for path,page in site[1].items() if path.name == '10_noise.html')
    assert noise.find('math', display='block') and '$' not in noise.article.get_text()


def _plain(s): return ' '.join(re.sub(r'[*`>]|^- ', ' ', s, flags=re.M).split())


def _content(path):
    "All that a page says, printed text included"
    if path.suffix == '.md': return _plain(path.read_text())
    cells = nbformat.read(path, 4).cells
    outs = [o.get('text') or o.get('data', {}).get('text/markdown') or o.get('data', {}).get('text/plain', '') for c in cells for o in c.get('outputs', [])]
    return _plain('\n'.join([c.source for c in cells] + outs))


@pytest.mark.parametrize('path', texts, ids=lambda p: p.name)
def test_quotes_are_what_the_pages_say(path):
    quotes = re.findall(r'((?:^> .*\n)+)>\n> \[[^]]*\]\(([^)]*)\)', path.read_text(), re.M)
    assert len(quotes) == path.read_text().count('\n>\n')
    for quote,page in quotes:
        assert _plain(quote) in _content((path.parent/page).resolve()), quote


@pytest.mark.slow
@pytest.mark.parametrize('path', texts, ids=lambda p: p.name)
def test_code_of_the_pages_runs(path, fastai_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if 'adult.csv' in path.read_text(): (tmp_path/'adult.csv').symlink_to(fastai_data('adult_sample')/'adult.csv')
    blocks = re.findall(r'^```(\w+)\n(.*?)^```', path.read_text(), re.M | re.S)
    code = '\n'.join(text for lang,text in blocks if lang == 'python')
    (tmp_path/'page.py').write_text(code)
    try: runpy.run_path('page.py')
    finally: plt.close('all')
    for line in ''.join(text for lang,text in blocks if lang == 'sh').splitlines():
        command = re.sub(r'\s*#.*', '', line).split()
        assert (Path(sys.executable).parent/command[0]).exists() or command[0] == 'make', line
        if command[0] == 'torchrun': assert f'`{line}`' in (root/'nbs/03_distributed.ipynb').read_text(), line  # whose commands test_processes runs
        if command[0] == 'make': assert re.search(f'^{command[1]}:', (root/'Makefile').read_text(), re.M), line
