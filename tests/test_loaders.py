"What an epoch of a loader of any kind draws, and which of its batches are left out"
import itertools

import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.utils import data as torch_data
from fastai.basics import DataLoader, DataLoaders, Learner, SGD
from fastai.callback.data import PartialDL, WeightedDL

from fastai_bs_finder.all import *
from fastai_bs_finder.loaders import leave_out_one, n_items
from footprint import random_states


class ByClass:
    "A batch sampler of a user's own"
    batch_size = 16
    def __len__(self): return 5
    def __iter__(self): return iter([list(range(16))]*5)


class Halves(DataLoader):
    "An epoch draws half of the data set"
    def get_idxs(self): return super().get_idxs()[:len(self.dataset)//2]


data = [(torch.ones(3), torch.ones(1))]*200
draws = {
    'plain': (lambda: DataLoader(data, 16, shuffle=True), 200),
    'PartialDL': (lambda: PartialDL(data, 16, partial_n=60), 60),
    'PartialDL, all of it': (lambda: PartialDL(data, 16), 200),
    'WeightedDL': (lambda: WeightedDL(data, 16, wgts=np.arange(200.)), 200),
    'get_idxs of a class': (lambda: Halves(data, 16, shuffle=True), 100),
    'get_idxs as an argument': (lambda: DataLoader(data, 16, get_idxs=lambda: [3, 1, 4]*7), 21),
    'get_idxs, a generator': (lambda: DataLoader(data, 16, get_idxs=lambda: (i for i in range(33))), 33),
    'get_idxs without an end': (lambda: DataLoader(data, 16, get_idxs=lambda: itertools.count()), None),
    'the n of a loader': (lambda: DataLoader(data, 16, n=48), 48),
    'PyTorch': (lambda: torch_data.DataLoader(data, 16), 200),
    'RandomSampler, more than there are': (lambda: torch_data.DataLoader(data, 16, sampler=torch_data.RandomSampler(data, True, 500)), 500),
    'WeightedRandomSampler (DomainBed #1)': (lambda: torch_data.DataLoader(data, 16, sampler=torch_data.WeightedRandomSampler(torch.ones(200), 32)), 32),
    'SubsetRandomSampler (nitrain #62)': (lambda: torch_data.DataLoader(data, 16, sampler=torch_data.SubsetRandomSampler(range(90))), 90),
    'one part of a distributed sampler': (lambda: torch_data.DataLoader(data, 16, sampler=torch_data.DistributedSampler(data, 3, 0)), 67),
    'a BatchSampler': (lambda: torch_data.DataLoader(data, batch_sampler=torch_data.BatchSampler(range(70), 16, False)), 70),
    'a batch sampler of a user\'s': (lambda: torch_data.DataLoader(data, batch_sampler=ByClass()), 80),
    'a list of batches': (lambda: torch_data.DataLoader(data, batch_sampler=[[0, 1, 2], [3]]), 4),
    'a stream': (lambda: torch_data.DataLoader(torch_data.ChainDataset([]), 16), 0),
}


@pytest.mark.parametrize('name', draws)
def test_what_an_epoch_draws(name):
    make,n = draws[name]
    dl = make()
    before = random_states(),dict(vars(dl))
    assert n_items(dl) == n_items(dl) == n
    assert (random_states(), dict(vars(dl))) == before
    if n: assert sum(len(b[1]) for b in dl) == n


@pytest.mark.parametrize('name', ['PartialDL', 'get_idxs of a class', 'WeightedRandomSampler (DomainBed #1)', 'SubsetRandomSampler (nitrain #62)'])
def test_what_an_epoch_draws_is_the_limit_and_is_said(name, capsys):
    make,n = draws[name]
    dl = make()
    learn = Learner(DataLoaders(dl, dl), nn.Linear(3, 1), loss_func=F.mse_loss, opt_func=SGD)
    learn.bs_find(1e-3, 2, 2, show_plot=False)
    run = learn.recorder.bs_result.run
    assert (run.n, run.n_data) == (n, 200) and learn.max_bs() == n
    with pytest.raises(ValueError, match=rf'bs=150 is more than the {n} examples that an epoch draws \(of 200 in the training set\): give {n} or less'): learn.set_bs(150)
    with pytest.raises(ValueError, match=f'bss has 150, more than the {n} examples that an epoch draws'): learn.bs_sweep([150])
    capsys.readouterr()
    learn.set_bs(10)
    assert capsys.readouterr().out == f'Batches of 10 examples, {-(-n//10)} steps per epoch.\n'


def test_a_batch_sampler_that_keeps_its_last_batch_is_left_alone():
    class Own:
        batch_size = 16
        def __len__(self): return 2
        def __iter__(self): return iter([list(range(16)), [16]])
    dl = torch_data.DataLoader(data[:17], batch_sampler=Own())
    assert not leave_out_one(dl, nn.BatchNorm1d(3)) and len(list(dl)) == 2


@pytest.mark.parametrize('cls', (torch_data.DataLoader, DataLoader), ids=('PyTorch', 'fastai'))
@pytest.mark.parametrize('n,bs,one', [(65, 64, True), (1000, 3, True), (33, 16, True), (64, 16, False), (34, 16, False), (1, 16, False), (5, 1, False)])  # fastai #970, nncf #379
def test_a_last_batch_of_one_is_left_out(cls, n, bs, one):
    "Only for a model with batch-norm, only where `drop_last` does not do it; and taken back"
    dl = cls(data[:1]*n, bs)
    def settings(): return {k: v for k,v in vars(dl).items() if k not in ('rng', '_DataLoader__idxs')}
    was,n_it = settings(),len(dl)
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert not leave_out_one(dl, nn.Linear(3, 3)) and settings() == was
    assert leave_out_one(dl, norm) == one and len(dl) == len(list(dl)) == n_it - one
    assert leave_out_one(dl, norm) == one
    assert not leave_out_one(dl, None) and settings() == was and len(dl) == len(list(dl)) == n_it
    dl = cls(data[:1]*n, bs, drop_last=True)
    assert not leave_out_one(dl, norm) and not leave_out_one(dl, None) and dl.drop_last
