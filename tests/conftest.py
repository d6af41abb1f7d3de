"Data for the tests, and what several of them need"
import os, signal, subprocess, sys
from pathlib import Path

import matplotlib, numpy as np, pandas as pd, pytest, torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from PIL import Image
from fastai_bs_finder import finder

from data import urls

matplotlib.use('agg')
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background ignores it
torch.set_num_threads(1)  # faster for networks as small as these
if torch.cuda.is_available():  # what is compared bit for bit needs kernels that always add up in the same order
    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
    torch.use_deterministic_algorithms(True, warn_only=True)

both = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
for name,n in dict(quick=60, short=300).items(): settings.register_profile(name, max_examples=n, derandomize=True, **both)  # the same cases each time
settings.register_profile('long', max_examples=10_000, print_blob=True, **both)  # pytest --hypothesis-profile=long
settings.load_profile('quick')

root = Path(__file__).parents[1]
archives = root.parent/'shared/data'


def _laid_out(name):
    home = Path(os.environ.get('FASTAI_HOME', root/'.data')).absolute()
    if (archives/'unpack.py').exists():
        home.mkdir(exist_ok=True)
        with FileLock(home/'.lock'):                           # tests run in several processes
            if not (home/'data'/name).exists(): subprocess.run([sys.executable, archives/'unpack.py', home, name], check=True)
    return home if (home/'data'/name).exists() else None


@pytest.fixture
def fastai_data(monkeypatch):
    "A function: the folder that `untar_data` would return for a data set; skips the test where the data cannot be had"
    def get(name):
        home = _laid_out(name)
        if home is None and os.environ.get('CI') == 'true' and archives.exists(): pytest.fail(f'{name} cannot be laid out from {archives}')
        if home is None: pytest.skip(f'needs the data set {name}: ' + ('make data fetches it' if name in urls else 'put it into FASTAI_HOME/data, fastai has no URL of it'))
        monkeypatch.setenv('FASTAI_HOME', str(home))
        return home/'data'/name
    return get


@pytest.fixture(scope='session')
def shared_tmp(tmp_path_factory, worker_id):
    "A folder for what all pytest workers share"
    tmp = tmp_path_factory.getbasetemp()
    return tmp if worker_id == 'master' else tmp.parent


@pytest.fixture
def mnist(fastai_data, shared_tmp):
    "Images and digits of MNIST's training set; its 60,000 files are read once for all pytest workers"
    path,cache = fastai_data('mnist_png'),shared_tmp/'mnist.pt'
    with FileLock(f'{cache}.lock'):
        if not cache.exists():
            files = sorted((path/'training').glob('*/*.png'))
            torch.save((torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in files])), torch.tensor([int(f.parent.name) for f in files])), cache)
    x,y = torch.load(cache)
    return x.flatten(1).float()/255,y


@pytest.fixture(autouse=True)
def wide_and_short(monkeypatch):
    monkeypatch.setenv('COLUMNS', '10000')  # what is printed is not broken into lines
    monkeypatch.setattr(finder, 'least_profile', 0.)


def pytest_runtest_setup(item):
    if item.get_closest_marker('cuda') and not torch.cuda.is_available(): pytest.skip('needs a GPU')


def pytest_addoption(parser):
    parser.addoption('--works-with', metavar='FILE', help='write what bs_find works with, by the tests that run, into this CSV file; other rows stay')


def pytest_terminal_summary(terminalreporter, config):
    file = config.getoption('--works-with')
    if not file: return
    reports = [r for r in terminalreporter.getreports('passed') + terminalreporter.getreports('failed') if r.when == 'call']
    cells = [(*cell, 'yes' if r.passed else 'no') for r in reports for key,cell in r.user_properties if key == 'works with']
    table = pd.DataFrame(cells, columns=['kind', 'name', 'column', 'value']).pivot(index=['kind', 'name'], columns='column', values='value')
    if Path(file).exists(): table = table.combine_first(pd.read_csv(file, index_col=['kind', 'name']))
    table[['works', 'footprint-free']].to_csv(file)


@pytest.fixture
def offline_wandb(monkeypatch):
    "fastai's `WandbCallback` describes each argument by `init_args`, which in today's fastcore fails for None"
    import fastai.callback.wandb as fastai_wandb, wandb
    init_args = fastai_wandb.init_args
    monkeypatch.setattr(fastai_wandb, 'init_args', lambda o: init_args(o) if hasattr(o, '__dict__') else {})
    yield
    if wandb.run: wandb.finish()
