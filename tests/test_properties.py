"Whatever comes in, out comes an answer, an honest 'cannot say yet' or an error of one line; and the learner is as it was"
import math, re
from functools import partial

import pytest, torch
from hypothesis import event, given, strategies as st
from torch import nn
from fastai.basics import Adam, DataLoader, DataLoaders, Learner, OptimWrapper, RMSProp, SGD, set_seed
from fastai.callback.all import ProgressCallback

from fastai_bs_finder.all import *
from footprint import changes, forget, state
from test_words import imperatives


class OneNumber(nn.Module):
    "A single parameter"
    def __init__(self, width):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
    def forward(self, x): return self.w*x.sum(1, keepdim=True).expand(-1, 3)*torch.arange(3).to(x)


class Tied(nn.Module):
    "Two layers with the same weight"
    def __init__(self, width):
        super().__init__()
        self.a,self.b,self.out = nn.Linear(width, width),nn.Linear(width, width),nn.Linear(width, 3)
        self.b.weight = self.a.weight
    def forward(self, x): return self.out(self.b(self.a(x).tanh()))


class Unused(nn.Module):
    "A parameter that never gets a gradient, and one that gets one where the first number of a batch is positive"
    def __init__(self, width):
        super().__init__()
        self.net,self.never,self.sometimes = nn.Linear(width, 3),nn.Parameter(torch.ones(2)),nn.Parameter(torch.ones(3))
    def forward(self, x): return self.net(x) + (self.sometimes if x[0, 0] > 0 else 0)


class Words(nn.Module):
    "An embedding with sparse gradients"
    def __init__(self, width):
        super().__init__()
        self.emb,self.out = nn.Embedding(8, 4, sparse=True),nn.Linear(4, 3)
    def forward(self, x): return self.out(self.emb((x.float().abs()*7).long() % 8).mean(1))


class Constant(nn.Module):
    "Gradients of zero"
    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(width, 3)
    def forward(self, x): return self.net(x)*0


def mlp(width): return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Dropout(.1), nn.Linear(8, 3))

def batch_norm(width): return nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def frozen_part(width):
    net = mlp(width)
    net[0].requires_grad_(False)
    return net


models = [OneNumber, Tied, Unused, Words, Constant, nn.Linear, mlp, batch_norm, frozen_part]
optimizers = [SGD, partial(SGD, mom=.9), Adam, RMSProp, partial(OptimWrapper, opt=torch.optim.SGD), partial(OptimWrapper, opt=torch.optim.Adagrad)]


def mean_loss(pred, y): return nn.functional.cross_entropy(pred.float(), y)
def no_loss(pred, y): return (pred*0).sum().float()
def infinite_loss(pred, y): return nn.functional.cross_entropy(pred.float(), y)/torch.where(pred.detach().float().mean() > 0, 0., 1.)
def steep_loss(pred, y): return nn.functional.cross_entropy(pred.float()*1e8, y)*1e8


def specs(models=models, losses=(mean_loss, mean_loss, no_loss, infinite_loss, steep_loss)):
    "Descriptions of learners"
    return st.fixed_dictionaries(dict(n=st.integers(1, 90), bs=st.one_of(st.integers(1, 5), st.integers(1, 12), st.integers(1, 99)), width=st.integers(1, 5), make=st.sampled_from(models), opt_func=st.sampled_from(optimizers),
                                      loss=st.sampled_from(losses), dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]), seed=st.integers(0, 5),
                                      shuffle=st.booleans(), drop_last=st.booleans(), wd=st.sampled_from([None, 0., .1])))


def build(n, bs, width, make, opt_func, loss, dtype, seed, shuffle, drop_last, wd):
    set_seed(seed)
    model = nn.Linear(width, 3) if make is nn.Linear else make(width)
    ds = list(zip(torch.randn(n, width).to(dtype), torch.randint(3, (n,))))
    dl = DataLoader(ds, bs=bs, shuffle=shuffle, drop_last=drop_last)
    return Learner(DataLoaders(dl, dl), model.to(dtype), loss_func=loss, opt_func=opt_func, wd=wd).remove_cb(ProgressCallback)


def outcome(learn, said, find):
    "What came of `find`: the error, or `None` after looking at the answer"
    was = state(learn)
    try: sug = find()
    except Exception as e: error = e
    else:
        error,n = None,len(learn.dls.train.dataset)
        assert sug.critical is None or isinstance(sug.critical, int) and 1 <= sug.critical <= n
        words = said()
        assert words.strip().startswith(imperatives) and words.endswith('.\n') and not re.search(r'(?<!\d)-\d|\bnan\b|\binf\b', re.sub(r'lr=\S+|to inf, at', '', words)), words
        assert learn.recorder.bs_stats.noise.map(math.isfinite).all()
    event('an answer' if error is None else 'one line' if is_one_line(error) else f'{type(error).__name__}: {error}'[:80])  # pytest --hypothesis-show-statistics
    forget(learn)
    assert changes(was, state(learn)) == []
    return error


def is_one_line(e): return isinstance(e, ValueError) and '\n' not in str(e) and len(str(e)) > 20


def assert_fit_gives_it_too(error, learn, lr):
    "An error of the user's model, loss or optimizer passes through"
    with pytest.raises(type(error), match=re.escape(str(error)[:60])): learn.fit(3, lr)


@pytest.fixture
def said(capsys): return lambda: capsys.readouterr().out


@given(specs(), st.sampled_from([None, 0., 1e-3, .1, 10., 1e20, slice(1e-3, .1), [.1]]), st.one_of(st.none(), st.integers(6, 40)), st.integers(2, 5), st.sampled_from([0., .5, .9]), st.one_of(st.none(), st.integers(0, 5)))
def test_learners_of_all_sorts(said, spec, lr, num_it, n_batch, beta, n_train):
    with torch.backends.mkldnn.flags(enabled=False):         # half precision with oneDNN is an illegal instruction on some processors
        learn = build(**spec)
        error = outcome(learn, said, lambda: learn.bs_find(lr, num_it, n_batch, beta, n_train, show_plot=False))
        if error and not is_one_line(error): assert_fit_gives_it_too(error, build(**spec), lr)


anything = st.one_of(st.none(), st.booleans(), st.integers(-3, 60), st.floats(), st.complex_numbers(), st.text(max_size=3), st.lists(st.floats(), max_size=3), st.tuples(st.integers(0, 3), st.text(max_size=1)),
                     st.builds(slice, st.one_of(st.none(), st.floats()), st.one_of(st.none(), st.floats())), st.just(torch.tensor(.1)), st.just(torch.ones(2)), st.just({}), st.just(object()), st.just(int))

@given(st.data())
def test_arguments_of_all_types(said, data):
    spec = data.draw(specs([mlp], [mean_loss]))
    learn,kwargs = build(**spec),dict(lr=.1, num_it=20, n_batch=3, beta=.9, n_train=2)
    for name in data.draw(st.sets(st.sampled_from(list(kwargs)), min_size=1, max_size=2)): kwargs[name] = data.draw(anything, label=name)
    with torch.backends.mkldnn.flags(enabled=False):
        error = outcome(learn, said, lambda: learn.bs_find(**kwargs, show_plot=False))
        if error and not is_one_line(error): assert_fit_gives_it_too(error, build(**spec), kwargs['lr'])
