"The learner that the benchmarks measure, and what they print of the machine"
import os, platform, re, weakref
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from textwrap import fill

import fastai, torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fastai.basics import Adam, Callback, CancelValidException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.imports import noop

here = Path(__file__).parent


class NoValid(Callback):
    "No validation, in `fit` as in `bs_find`"
    order = -100
    def before_validate(self): raise CancelValidException


class Batches:
    "A data set of ready-made examples in memory"
    def __init__(self, n, width): self.x,self.y = torch.rand(n, width),torch.randint(10, (n,))
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]


def mlp_learner(n_it, widths=(784, 2048, 2048, 1024, 10), bs=64):
    "A learner for an MLP with Adam and an epoch of `n_it` batches; the default has 7.9 million parameters"
    set_seed(0)
    ds = Batches(n_it*bs, widths[0])
    dl = DataLoader(ds, bs=bs, create_batches=lambda idxs: ((ds.x[i:i + bs], ds.y[i:i + bs]) for i in range(0, len(ds), bs)))
    layers = [m for a,b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
    learn = Learner(DataLoaders(dl, dl, device='cpu'), nn.Sequential(*layers), loss_func=CrossEntropyLossFlat(), opt_func=Adam, cbs=NoValid())
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)


def n_bytes(tensors): return sum(t.numel()*t.element_size() for t in tensors)


class PeakBytes(TorchDispatchMode):
    "Counts the bytes of all tensors made while it is active, and remembers the most that lived at once"
    def __init__(self):
        super().__init__()
        self.live,self.now,self.peak = {},0,0

    def _free(self, key): self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        res = func(*args, **(kwargs or {}))
        for t in tree_leaves(res):
            if not isinstance(t, torch.Tensor): continue
            storage = t.untyped_storage()
            if storage._cdata in before or storage._cdata in self.live: continue
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return res


def peak(f):
    "The most bytes that tensors made by `f` took at once"
    with PeakBytes() as p: f()
    return p.peak


def at_once(f, calls):
    "What `f` returns for each of the arguments in `calls`, on all cores: for what is not timed"
    with ProcessPoolExecutor(mp_context=get_context('spawn'), initializer=torch.set_num_threads, initargs=(1,)) as pool: return [*pool.map(f, *zip(*calls))]


def panels(df, name):
    "A panel for the rows of each task, from top to bottom; when all are drawn, `name`.png is written"
    fig = Figure(figsize=(9, 2.8), layout='constrained')
    for ax,(task,d) in zip(fig.subplots(1, df.task.nunique(), sharey=True, squeeze=False)[0], df.groupby('task', sort=False)):
        ax.set_title(fill(task, 18), size='small')
        yield ax,d
    ax.invert_yaxis()
    fig.savefig(here/f'{name}.png', dpi=90)


def write_page(
    name:str, # The page is `name`.md
    title:str,
    made:str, # How the figures were made
    in_short:list, # What was found, a sentence or two each
    loses:list, # Where something else does better
    more:str='', # Tables, and what else there is
):
    "Write a page of results; `results.py` takes the first two of its sections along"
    def items(lines): return '\n'.join(f'- {o}' for o in lines if o)
    (here/f'{name}.md').write_text(f'# {title}\n\n{machine()}. {made}\n\n## In short\n\n{items(in_short)}\n\n## Where it loses\n\n{items(loses)}\n' + f'\n{more.strip()}\n'*bool(more))


def _processor():
    try: return re.search(r'^model name\s*: (.*)$', Path('/proc/cpuinfo').read_text(), re.M)[1]
    except (OSError, TypeError): return platform.processor() or platform.machine()


def machine():
    return (f'{date.today()}, {os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}, torch {torch.__version__}, '
            f'threads: {torch.get_num_threads()}, fastai {fastai.__version__}')
