"What stands in two places says the same, and the project speaks of itself alone"
import configparser, re, subprocess
from pathlib import Path

import nbformat, pandas as pd, pytest, yaml
import fastai_bs_finder

import data
from learners import applications
from test_callbacks import rows
from test_ecosystem import libraries

root = Path(__file__).parents[1]
tracked = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True).stdout.split('\n')[:-1]


def test_settings_are_what_nbdev_reads():
    from nbdev.config import get_config
    cfg = get_config(root)
    card = configparser.ConfigParser()
    card.read(root/'settings.ini')
    card = card['DEFAULT']
    assert card['lib_name'] == card['repo'] == cfg.lib_name == cfg.title
    for k in ('version', 'min_python', 'description', 'author', 'branch'): assert card[k] == str(getattr(cfg, k)), k
    assert card['keywords'].split() == cfg.keywords and card['tst_flags'].split() == cfg.tst_flags
    for k in ('lib_path', 'nbs_path', 'doc_path'): assert root/card[k] == cfg.path(k)
    assert card.getboolean('recursive') == cfg.recursive


def test_requirements_are_those_of_the_package():
    from importlib.metadata import requires, version
    card = configparser.ConfigParser()
    card.read(root/'settings.ini')
    norm = lambda reqs: sorted(r.replace(' ', '').replace('<4,>=3.3.26', '>=3.3.26,<4') for r in reqs)
    found = requires('fastai_bs_finder')
    assert norm(card['DEFAULT']['requirements'].split()) == norm(r for r in found if 'extra' not in r)
    assert norm(card['DEFAULT']['dev_requirements'].split()) == norm(r.split(';')[0] for r in found if 'extra == "dev"' in r)
    assert version('fastai_bs_finder') == card['DEFAULT']['version']


def test_version_and_requirements_for_conda_and_citations():
    conda,cite = (yaml.safe_load((root/f).read_text()) for f in ('conda/recipe.yaml', 'CITATION.cff'))
    assert conda['context']['version'] == cite['version'] == fastai_bs_finder.__version__
    names = dict(torch='pytorch', matplotlib='matplotlib-base')
    project = pytest.importorskip('tomllib').loads((root/'pyproject.toml').read_text())['project']  # from Python 3.11 on
    wanted = [re.match(r'([\w-]+)(.*)', r).groups() for r in [f"python{project['requires-python']}", *project['dependencies']]]
    assert sorted(r.replace(' ', '') for r in conda['requirements']['run']) == sorted(names.get(name, name) + v for name,v in wanted)
    assert conda['about']['summary'] == project['description'] and conda['about']['license'] == cite['license'] == project['license']


def test_the_oldest_versions_are_the_bounds():
    bounds = dict(re.match(r'([\w-]+)>=(.*)', r).groups() for r in pytest.importorskip('tomllib').loads((root/'pyproject.toml').read_text())['project']['dependencies'] if '>=' in r)
    pins = dict(re.findall(r'^([\w-]+)==(.*)$', (root/'tests/oldest.txt').read_text(), re.M))
    assert all(pins[name].removesuffix('.0') == v or pins[name].startswith(f'{v}.') for name,v in bounds.items())
    listed = (root/'docs/versions.md').read_text()
    assert all(f'{name} {v}' in listed for name,v in pins.items() if name != 'torchvision')


@pytest.mark.parametrize('path', sorted((root/'.github/workflows').glob('*.yml')), ids=lambda p: p.name)
def test_what_the_workflows_run_is_there(path):
    jobs = yaml.safe_load(path.read_text())['jobs'].values()
    rows = [row for job in jobs for row in job.get('strategy', {}).get('matrix', {}).get('include', [])]
    commands = [step['run'] for job in jobs for step in job['steps'] if 'run' in step] + [row['command'] for row in rows]
    for c in commands:
        if c.startswith('make'): assert re.search(f'^{c.split()[1]}:', (root/'Makefile').read_text(), re.M), c
        if c.startswith('.ci'): assert (root/c).exists()
    assert commands or 'publish' in path.read_text()


def test_the_data_sets_of_the_tests_are_fetched():
    "fastai lays out each under the name of its archive, which is the one that the tests ask for"
    assert all(url.endswith(f'/{name}.tgz') for name,url in data.urls.items())
    assert {data_set for _,data_set,_ in applications.values() if data_set} | {'mnist_png'} == {*data.urls, *data.without_url}


def test_readme_is_the_index_notebook(monkeypatch):
    monkeypatch.syspath_prepend(root/'nbs')
    from readme import readme
    text,pictures = readme()
    assert (root/'README.md').read_text() == text, 'run make readme'
    assert pictures and {name: (root/name).read_bytes() for name in pictures} == pictures
    assert {str(p.relative_to(root)) for p in (root/'README_files').iterdir()} == set(pictures)


def test_pictures_of_the_readme_are_described():
    alts = re.findall(r'!\[([^]]*)\]', (root/'README.md').read_text())
    assert alts and all(len(alt.split()) > 5 and alt[0].isupper() and alt.endswith('.') for alt in alts)


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r'\]\(([^)#]+)', (root/'README.md').read_text()):
        assert target.startswith('https://') or (root/target).exists(), target


def test_notebooks_install_what_is_missing_from_where_it_is(monkeypatch, tmp_path):
    "Each that is for outsiders, and nothing that is nowhere"
    monkeypatch.syspath_prepend(root/'nbs')
    from readme import address, install_cell, set_install_cells
    def cells(folder): return {p.name: next((c.source for c in nbformat.read(p, 4).cells if c.cell_type == 'code'), '') for p in folder.glob('*.ipynb')}
    for_outsiders = [p.name for g in ('00*', '01*', '6*') for p in (root/'nbs').glob(g + '.ipynb')]
    found = cells(root/'nbs')
    assert len(for_outsiders) == 10 and {found[name] for name in for_outsiders} == {install_cell(address())}
    url = 'https://github.com/someone/fastai_bs_finder'
    for name in for_outsiders[:3] + ['index.ipynb']: (tmp_path/name).write_text((root/'nbs'/name).read_text())
    set_install_cells(tmp_path, url)
    assert all((f'%pip install -q git+{url}' in source) == (name != 'index.ipynb') for name,source in cells(tmp_path).items())
    set_install_cells(tmp_path, address())
    assert all((tmp_path/p.name).read_text() == p.read_text() for p in (root/'nbs').iterdir() if (tmp_path/p.name).exists())


def test_everything_public_comes_with_one_import():
    import fastai_bs_finder.all as everything
    from fastai.learner import Learner, Recorder
    for name in 'noise_and_scale fieller ema_weights GradSums NoiseMeter round_bs critical average BSSuggestion rel_steps rel_examples bs_summary BSFinder no_footprint'.split():
        assert hasattr(everything, name), name
    assert callable(Learner.bs_find) and callable(Recorder.plot_bs_find)
    assert not hasattr(everything, 'GrowBatch')  # an experiment, see nbs/51_grow.ipynb


def public():
    import fastai_bs_finder.all as everything
    from fastai.learner import Learner, Recorder
    for name,o in vars(everything).items():
        if getattr(o, '__module__', '').startswith('fastai_bs_finder') and not name.startswith('_'): yield name,o
    yield 'Learner.bs_find',Learner.bs_find
    yield 'Recorder.plot_bs_find',Recorder.plot_bs_find


@pytest.mark.parametrize('name,o', list(public()), ids=lambda v: v if isinstance(v, str) else '')
def test_every_parameter_has_a_docment(name, o):
    import inspect
    from fastcore.docments import docments
    assert o.__doc__, name
    if inspect.isclass(o) and ('__init__' not in vars(o) or issubclass(o, tuple)) or name == 'BSSuggestion': return
    for param,doc in docments(o, returns=False).items(): assert param == 'self' or doc, f'{name}: {param}'


@pytest.mark.parametrize('path', [p for p in tracked if not p.endswith(('.png', 'LICENSE'))])
def test_no_word_of_machines_and_hosts(path):
    if path == 'tests/test_project.py' or not (root/path).exists(): return
    text = re.sub('"image/png": "[^"]*"', '', (root/path).read_text())  # any letters may follow each other in a picture
    for word in ('/work/', '/root/', '/tmp/', '/home/', 'pypi.org', 'pythonhosted', 'FILL_IN', 'TODO'): assert word not in text, word


def test_the_table_of_what_works_is_that_of_the_tests():
    "Each row is two tests, which `make table` and `make ecosystem` write down; a row of a test that is no more is taken out by hand"
    table = pd.read_csv(root/'tests/works_with.csv')
    assert set(zip(table['kind'], table['name'])) == {('application', name) for name in applications} | set(rows) | {('library', name) for name in libraries}
    assert (table[['works', 'footprint-free']] == 'yes').all(axis=None)


def test_with_an_address_the_readme_has_links_from_anywhere_and_badges(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(root/'nbs')
    import readme
    url = 'https://github.com/someone/fastai_bs_finder'
    text,pictures = readme.readme(url)
    links = re.findall(r'\]\(([^)]+)\)', text)
    assert len(links) > 20 and all(o.startswith('https://') or o.startswith('#') for o in links) and f'({url}/raw/main/{next(iter(pictures))})' in text
    assert f'({url}/blob/main/docs/faq.md#i-have-a-table' in text and '/github/someone/fastai_bs_finder/blob/main/nbs/00_tutorial.mnist.ipynb)' in text
    (tmp_path/'nbs').mkdir()
    monkeypatch.setattr(readme, 'nbs', tmp_path/'nbs')
    (tmp_path/'pyproject.toml').write_text(f'[project.urls]\nSource = "{url}/"\n\n[tool.other]\nSource = "no"\n')
    assert readme.address() == url
    (tmp_path/'pyproject.toml').write_text('[project.urls]\n\n[tool.other]\nSource = "no"\n')
    assert readme.address() == ''
