"What a measurement takes: memory, operations, and time that waits for the device"
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest, torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.basics import Adam, OptimWrapper, SGD
from fastai.callback.training import ShortEpochCallback

from fastai_bs_finder.measure import BSFinder
from fastai_bs_finder.metric import OptMetric
from fastai_bs_finder.noise import GradSums

sys.path.append(str(Path(__file__).parents[1]/'benchmarks'))
from common import mlp_learner, n_bytes, peak


class Operations(TorchDispatchMode):
    "Counts what is started, by name"
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Questions(TorchFunctionMode):
    "Notes which calls ask a tensor for numbers"
    def __init__(self):
        super().__init__()
        self.asked = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (name := getattr(func, '__name__', '')) in ('tolist', 'item', 'cpu', 'numpy', 'nonzero', '__bool__', '__float__', '__int__'): self.asked.add(name)
        return func(*args, **(kwargs or {}))


def layers(n, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(10, 10) for _ in range(n//2)]).to(dtype)


def operations_of_measuring(n, opt_func, per_element, monkeypatch):
    "What each batch of the second measurement starts after its backward pass, by name, with a model of `n` tensors"
    counted,after_backward = [],BSFinder.after_backward
    def counting(self):
        self.meter.sums.per_element = per_element
        with Operations() as o:
            try: return after_backward(self)
            finally: counted.append(o.names)
    monkeypatch.setattr(BSFinder, 'after_backward', counting)
    learn = mlp_learner(10, (10, 10), 8)
    learn.model,learn.opt_func = layers(n),opt_func
    with learn.no_bar(), learn.no_logging(): learn.bs_find(1e-3, 10, 5, n_train=0, show_plot=False, profile=False)
    monkeypatch.undo()
    return counted[5:]


@pytest.mark.parametrize('per_element', (True, False))
@pytest.mark.parametrize('opt_func', (Adam, partial(OptimWrapper, opt=torch.optim.Adam), SGD), ids=('Adam', 'torch.Adam', 'SGD'))
def test_many_tensors_start_as_many_operations_as_few(opt_func, per_element, monkeypatch):
    few,many = (operations_of_measuring(n, opt_func, per_element, monkeypatch) for n in (20, 400))
    assert len(few) == len(many) == 5
    for a,b in zip(few, many): assert b.total() <= 4/3*a.total()
    assert max(o.total() for o in few[:-1]) < 80 and few[-1].total() < 400  # the last one completes the measurement; a sample of elements takes most of it
    assert max(o.total() for o in many[:-1]) < (20 if per_element else 40)


def metric_of(model, opt_func=Adam):
    params = list(model.parameters())
    opt = opt_func(params, lr=.1)
    for p in params: p.grad = torch.randn_like(p)
    opt.step()
    return OptMetric(opt, params)


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@pytest.mark.parametrize('per_element', (True, False))
@pytest.mark.parametrize('opt_func', (Adam, partial(OptimWrapper, opt=torch.optim.Adam)), ids=('Adam', 'torch.Adam'))
def test_nothing_waits_before_a_measurement_is_complete(opt_func, per_element, dtype):
    "No number is asked of the device: also not how many steps an optimizer has taken, which may be counted there"
    metric = metric_of(layers(20, dtype), opt_func)
    with Questions() as q:
        metric.refresh()
        sums = GradSums((metric,), per_element)
        for _ in range(3): sums.add([p.grad for p in metric.params], 4)
    assert not q.asked or not per_element and opt_func is not Adam  # a metric that is taken of every batch has to know the steps
    with Questions() as q: sums.per_tensor()
    assert q.asked


@pytest.mark.parametrize('per_element,most', [(True, 2.2), (False, 1.2)])
@pytest.mark.parametrize('n_batch', (2, 20, 200))
def test_memory_does_not_grow_with_the_number_of_batches(n_batch, per_element, most, monkeypatch):
    "Gradients that bs_find takes beyond weights, gradients, and the copy of weights and optimizer state"
    learn = mlp_learner(n_batch, (784, 1024, 1024, 10), 1)
    learn.fit(1, 1e-3, cbs=ShortEpochCallback())  # so that the optimizer's state and the gradients exist
    begin = BSFinder.begin
    def forced(self):
        begin(self)
        self.meter.sums.per_element = per_element
    monkeypatch.setattr(BSFinder, 'begin', forced)
    params = list(learn.model.parameters())
    grads = n_bytes(params)
    snapshot = grads + n_bytes(v for p in params for v in learn.opt.state[p].values() if isinstance(v, torch.Tensor))
    with learn.no_bar(), learn.no_logging():
        took = peak(lambda: learn.bs_find(1e-3, n_batch, n_batch, n_train=0, show_plot=False, profile=False))
    assert len(learn.recorder.bs_stats) == 1
    assert (took - snapshot - grads)/grads <= most
