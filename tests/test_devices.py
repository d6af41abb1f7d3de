"On the CPU and on a GPU: the same numbers, no footprint, and no copy of the weights in the GPU's memory"
import gc

import pytest, torch
from torch import nn
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.fp16 import MixedPrecision
from fastai.distributed import ParallelTrainer

from fastai_bs_finder import memory
from fastai_bs_finder.all import *
from footprint import assert_no_footprint, changes, forget, state
from learners import digits, loaders, plain_pytorch

cuda = pytest.mark.cuda
devices = ['cpu', pytest.param('cuda', marks=cuda)]


def learner(device, **kwargs):
    set_seed(1)
    X,y = digits()
    dls = loaders(list(zip(X[:480], y[:480])), device=device)
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.2), nn.Linear(32, 10)).to(device)
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs)


def find(learn): return learn.bs_find(1e-2, 40, 4, show_plot=False)


@pytest.mark.parametrize('device', devices)
@pytest.mark.parametrize('cbs', [lambda: None, lambda: MixedPrecision(), lambda: MixedPrecision('bf16'), lambda: ParallelTrainer(None)], ids=['plain', 'fp16', 'bf16', 'DataParallel'])
def test_no_footprint(device, cbs):
    assert_no_footprint(lambda: learner(device, cbs=cbs()), find, lambda learn: learn.fit(1, 1e-2))


@pytest.mark.parametrize('device', devices)
def test_a_model_that_fit_moves_is_moved_back(device):
    "fastai moves the model to the loaders' device when it trains"
    learn = learner(device)
    learn.model.cpu()
    was = state(learn)
    find(learn)
    forget(learn)
    assert changes(was, state(learn)) == [] and next(learn.model.parameters()).device.type == 'cpu'


@pytest.mark.parametrize('device', devices)
@pytest.mark.parametrize('at', [0, 9, 39])
def test_out_of_memory(device, at):
    class Greedy(Callback):
        def after_pred(self):
            if not hasattr(self.learn, 'lr_finder') or self.train_iter != at: return
            if device == 'cuda': torch.empty(2**50, device=device)
            raise torch.OutOfMemoryError('no memory left')
    learn = learner(device, cbs=Greedy())
    was = state(learn)
    with pytest.raises(torch.OutOfMemoryError): find(learn)
    assert changes(was, state(learn)) == []


@cuda
def test_the_numbers_are_those_of_the_cpu():
    stats = []
    for device in ('cpu', 'cuda'):
        learn = learner(device)
        learn.model[3] = nn.Identity()
        find(learn)
        stats.append(learn.recorder.bs_stats)
    assert stats[0][['noise', 'scale', 'loss']].to_numpy() == pytest.approx(stats[1][['noise', 'scale', 'loss']].to_numpy(), rel=1e-3)


@cuda
def test_weights_on_a_gpu_are_kept_in_host_memory():
    learn = learner('cuda')
    learn.model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)).cuda()
    learn.fit(1, 1e-2)
    gc.collect()
    before = torch.cuda.memory_allocated()
    snapshot = Snapshot(learn)
    assert torch.cuda.memory_allocated() == before
    snapshot.restore()


@cuda
@pytest.mark.parametrize('make', [lambda: learner('cuda'), plain_pytorch], ids=['loaders on the GPU', 'loaders of PyTorch'])
def test_memory_is_that_of_the_gpu(make):
    assert isinstance(memory._step_bytes(make()), memory._CudaBytes) and make().max_bs() == 480
