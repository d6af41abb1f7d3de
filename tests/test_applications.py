"Every kind of learner: the number is that of the stored gradients, and nobody can tell that bs_find ran"
from collections import deque
from functools import partial

import pytest, torch
from fastai.basics import Callback

from fastai_bs_finder.all import *
from footprint import assert_no_footprint
from learners import applications, maker
from reference import paper_estimate


def find(learn, lr, profile=1.): return learn.bs_find(lr, 20, 4, show_plot=False, profile=profile)   # measurements end at batches 4, 12 and 20


class Store(Callback):
    "Keeps the gradients of the last batches whole; in a queue of the caller's, which no snapshot sees"
    order = -20
    def __init__(self, queue): self.keep = partial(deque.append, queue)
    def after_backward(self):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.model.parameters() if p.requires_grad]
        self.keep((len(self.yb[0]['digit'] if isinstance(self.yb[0], dict) else self.yb[0]), torch.cat([g.flatten().double() for g in grads])))


@pytest.mark.parametrize('name', applications)
def test_works(name, fastai_data, capsys, record_property):
    record_property('works with', ('application', name, 'works'))
    make,lr = maker(name, fastai_data)
    learn,last = make(),deque(maxlen=4)
    learn.add_cb(Store(last))
    sug = find(learn, lr, profile=False)
    stats = learn.recorder.bs_stats
    (b,*others),grads = zip(*last)
    assert stats.batch.tolist() == [4, 12, 20] and others == [b]*3 and learn.recorder.bs_result.run.bs == b
    assert stats[['raw_noise', 'raw_scale']].iloc[-1].tolist() == pytest.approx(paper_estimate(list(grads), b), rel=1e-3)
    said = capsys.readouterr().out
    in_order = 'plain PyTorch: model' in name or name == 'nn.DataParallel'  # the digits of several writers, one after the other
    assert ('The noise scale is' if sug.critical else 'does not draw its batches at random' if in_order else 'The noise scale cannot be told') in said


@pytest.mark.parametrize('name', applications)
def test_footprint_free(name, fastai_data, record_property):
    record_property('works with', ('application', name, 'footprint-free'))
    make,lr = maker(name, fastai_data)
    def fit(learn):
        if 'stream' in name: learn.dls.train = Sized(learn.dls.train, 20)
        learn.fit(1, lr)
    assert_no_footprint(make, partial(find, lr=lr), fit)


class Sized:
    "A stream as fastai's `fit` wants it, with a length"
    def __init__(self, dl, n): self.dl,self.n = dl,n
    def __len__(self): return self.n
    def __iter__(self): return (b for b,_ in zip(self.dl, range(self.n)))
