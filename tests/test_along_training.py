"Along a real training on all of MNIST, against the truth at every place where it was measured"
import sys
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, L, Learner, SGD, set_seed

from fastai_bs_finder.all import *
from reference import ema, mlp_truth

sys.path.append(str(Path(__file__).parents[1]/'benchmarks'))
from stepping import bs_find_stepping


class Truth(Callback):
    "Computes the true noise and scale at the start of each measurement"
    order = -20
    def __init__(self, X, y, found): self.compute,self.note = partial(mlp_truth, X=X, y=y),found.append
    def before_batch(self):
        if self.lr_finder._left_to_train == 0 and self.lr_finder.meter.n_batch == 0: self.note(self.compute(self.model))


@pytest.mark.slow
@pytest.mark.parametrize('opt_func,lr', [(SGD, .1), (Adam, 1e-3)], ids=['SGD 0.1', 'Adam 1e-3'])
def test_follows_the_truth(mnist, opt_func, lr):
    X,y = mnist
    assert len(X) == 60_000
    def learner():
        set_seed(0)
        dl = DataLoader(L(zip(X, y)), bs=64, shuffle=True)
        return Learner(DataLoaders(dl, dl, device='cpu'), nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), loss_func=CrossEntropyLossFlat(), opt_func=opt_func)
    learn,found = learner(),[]
    learn.add_cb(Truth(X[::2], y[::2], found))  # every other example of each digit, for time
    with learn.no_bar(): learn.bs_find(lr, show_plot=False, profile=False)
    stats = learn.recorder.bs_stats
    truth = np.array([s/g for s,g in ema(found[1:], .9)])[:len(stats)]  # the first is at the initial weights, where the run begins with ordinary steps
    ratio = stats.noise_scale/truth

    biased = learner()
    with biased.no_bar(), pytest.warns(UserWarning, match='for comparison only'):
        bs_find_stepping(biased, lr, show_plot=False, profile=False)
    article = biased.recorder.bs_stats
    print(f'\n{opt_func.__name__} {lr}: batches seen, truth, ours (95 % interval), every batch stepping')
    for i in range(0, len(stats), 6):
        other = article.noise_scale[(article.batch - stats.batch[i]).abs().idxmin()]
        print(f'{stats.batch[i]:4} {truth[i]:6.0f} {stats.noise_scale[i]:6.0f} ({stats.lo[i]:.0f} to {stats.hi[i]:.0f}) {other:8.0f}')
    print(f'ours/truth: {ratio.min():.2f} to {ratio.max():.2f}')
    assert len(stats) == 62
    assert ratio.between(1/1.5, 1.5).all()
    assert stats.noise_scale.iloc[-1] > 2*stats.noise_scale[0]
    late = article.noise_scale[len(article)//2:]
    assert ((late < 0) | (late > 2*truth[-1])).all()            # what holding the weights is for
