"`GrowBatch` grows when it should, as far as it may, and gives everything back"
import math

import pandas as pd, pytest, torch
from torch import nn
from torch.utils import data as torch_data
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, set_seed
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation, ShortEpochCallback

from fastai_bs_finder.accumulate import AccumulateGrads
from fastai_bs_finder.batches import n_examples
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.finder import *
from fastai_bs_finder.grow import GrowBatch
from fastai_bs_finder.predict import scale_lr
from fastai_bs_finder.set_bs import *
from fastai_bs_finder.track import NoiseScale
from footprint import changes, state
from learners import digits


class Says(NoiseScale):
    "A noise scale that is told what to say, measurement by measurement"
    def __init__(self, *noise_scales, every=10):
        super().__init__(every=every, share=1.)
        self.says = list(noise_scales)
    def after_batch(self):
        self.schedule.since += 1
        if self.schedule.since < self.every or not self.says: return
        self.schedule.since = 0
        ns,hi = self.says.pop(0)
        row = dict(batch=self.train_iter, epoch=self.epoch, step=0, samples=0, loss=1., bs=0, lr=0.) | {k: math.nan for k in self.meter.columns()}
        self.rows.append(row | dict(noise=1., scale=1/ns, noise_scale=ns, lo=ns/2, hi=hi))
    def before_backward(self): pass
    def before_step(self): pass
    def after_train(self): pass


class Watch(Callback):
    "The size of each step, the loader's batch size and the learning rate it had"
    order,run_valid = 45,False
    def before_fit(self): self.steps,self.n,self.sizes = [],0,[]
    def before_backward(self):
        self.n += n_examples(self.learn)
        self.sizes.append(n_examples(self.learn))
    def before_step(self):
        self.steps.append((self.epoch, self.n, self.opt.hypers[-1]['lr']))
        self.n = 0


def fit(learn, n_epoch, cbs, how='fit', **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n_epoch, cbs=cbs, **kwargs)
    return learn


def grown(says, n_epoch=3, how='fit', make=digits_learner, lr=.1, every=10, **kwargs):
    learn,watch = make(),Watch()
    fit(learn, n_epoch, [GrowBatch(Says(*says, every=every), **kwargs), watch], how, **({'lr_max': lr} if how == 'fit_one_cycle' else {'lr': lr}))
    return learn,watch


def with_torch_loader():
    learn = digits_learner()
    ds = learn.dls.train.dataset
    learn.dls.loaders[0] = torch_data.DataLoader(ds, 16, shuffle=True)
    return learn


def test_grows_within_an_epoch():
    learn,watch = grown([(100, 200)]*2)
    steps,n = [n for epoch,n,_ in watch.steps if epoch == 0],digits_learner().dls.train.n
    assert steps[:10] == [16]*10 and steps[10:20] == [32]*10 and set(steps[20:-1]) == {64} and watch.sizes[:len(steps)] == steps
    assert sum(steps) == n and sorted({n for epoch,n,_ in watch.steps if epoch}) == [n % 64, 64]
    log = learn.recorder.bs_changes
    assert log.bs.tolist() == [16, 32, 64] and log.batch.tolist() == [0, 10, 20] and log.noise_scale.tolist()[1:] == [100, 100]


def test_a_loader_that_does_not_listen_accumulates_until_the_epoch_ends():
    learn,watch = grown([(100, 200)]*2, make=with_torch_loader)
    per_epoch = len(digits_learner().dls.train)
    steps = [n for epoch,n,_ in watch.steps if epoch == 0]
    assert steps[:10] == [16]*10 and steps[10:15] == [32]*5 and set(steps[15:-1]) == {64}
    n = learn.dls.train.dataset
    assert sum(steps) == len(n) and set(watch.sizes[:per_epoch - 1]) == {16}
    assert {64} == {n for epoch,n,_ in watch.steps if epoch} - {len(n) % 64}


def test_the_schedule_ends_where_it_should():
    "However the number of batches changes"
    for make in (digits_learner, with_torch_loader):
        learn,watch = grown([(1000, 2000)]*4, how='fit_one_cycle', make=make, lr_rule=None)
        other = Watch()
        fit(digits_learner(), 3, [other], 'fit_one_cycle', lr_max=.1)
        assert watch.steps[-1][2] < .1*.05 and max(lr for _,_,lr in watch.steps) == pytest.approx(.1, rel=.01)
        at = lambda w: max(w.steps, key=lambda s: s[2])[0]
        assert at(watch) == at(other)


def test_at_most_to_the_noise_scale_its_lower_end_and_never_down():
    assert grown([(31, 40)]*4)[0].recorder.bs_changes.bs.tolist() == [16]
    assert grown([(33, 40)]*4)[0].recorder.bs_changes.bs.tolist() == [16, 32]
    assert grown([(100, math.inf)]*4)[0].recorder.bs_changes.bs.tolist() == [16, 32]     # lo = 50
    assert grown([(100, math.nan)]*4)[0].recorder.bs_changes.bs.tolist() == [16]
    assert grown([(100, 200), (100, 200), (1, 2), (1, 2)])[0].recorder.bs_changes.bs.tolist() == [16, 32, 64]
    assert grown([(100, 200)]*4, part=.5)[0].recorder.bs_changes.bs.tolist() == [16, 32]


def test_limits():
    assert grown([(10**6, 10**7)]*20, every=2)[0].recorder.bs_changes.bs.max() == 1024          # of 1,437 examples
    assert grown([(10**6, 10**7)]*20, every=2, max_bs=100)[0].recorder.bs_changes.bs.max() == 64
    learn,watch = grown([(10**6, 10**7)]*20, every=2, fits=50)
    assert learn.recorder.bs_changes.bs.max() == 1024 and max(watch.sizes) == 32 and max(n for _,n,_ in watch.steps) >= 1024 - 32
    learn = digits_learner()
    learn.recorder.bs_fits = 50
    watch = Watch()
    fit(learn, 3, [GrowBatch(Says(*[(10**6, 10**7)]*20)), watch])
    assert max(watch.sizes) == 32


@pytest.mark.parametrize('how', ('fit', 'fit_one_cycle'))
@pytest.mark.parametrize('rule,factors', [('noise', [1, (1 + 100/16)/(1 + 100/32), (1 + 100/16)/(1 + 100/64)]), ('linear', [1, 2, 4]), ('sqrt', [1, 2**.5, 2]), (None, [1, 1, 1])])
def test_the_learning_rate_follows(how, rule, factors):
    learn,watch = grown([(100, 200)]*2, how=how, lr_rule=rule)
    assert learn.recorder.bs_changes.lr_factor.tolist() == pytest.approx(factors)
    if how == 'fit': wanted = [.1]*len(learn.recorder.lrs)
    else:
        other = digits_learner()
        fit(other, 3, [], how, lr_max=.1)
        wanted = other.recorder.lrs[:20]
    assert learn.recorder.lrs[:10] == pytest.approx(wanted[:10])
    alone,_ = grown([(100, 200)]*2, how=how, lr_rule=None)
    assert learn.recorder.lrs[-1]/alone.recorder.lrs[-1] == pytest.approx(factors[-1]) and learn.recorder.lrs[15]/alone.recorder.lrs[15] == pytest.approx(factors[1])
    if how == 'fit': assert learn.opt.hypers[-1]['lr'] == pytest.approx(.1)


def kinds(learn): return sorted(type(o).__name__ for o in learn.cbs)


class Boom(Callback):
    order,run_valid = 80,False
    def before_step(self):
        if self.epoch == 1: raise self.error


@pytest.mark.parametrize('error', (None, KeyboardInterrupt, RuntimeError('boom')))
@pytest.mark.parametrize('start', (16, 64))
def test_everything_is_given_back(error, start):
    learn = digits_learner()
    with learn.no_logging(): learn.set_bs(start, fits=16)
    learn.create_opt()
    metrics,cbs = list(learn.metrics),kinds(learn)
    boom = Boom()
    boom.error = error
    run = lambda: fit(learn, 2, [GrowBatch(Says(*[(1000, 2000)]*3))] + [boom]*(error is not None))
    if error:
        with pytest.raises((KeyboardInterrupt, RuntimeError)): run()
    else: run()
    assert learn.recorder.bs_changes.bs.tolist() == [start, 2*start, 4*start, 8*start]
    assert learn.dls.bs == 16 and 'chunkify' not in vars(learn.dls.train) and list(learn.metrics) == metrics and kinds(learn) == cbs and not hasattr(learn, 'noise_scale')
    if start == 64: assert learn.accumulate_grads.n_acc == 64
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(learn.lr)


def test_on_the_learner_for_good():
    learn = digits_learner()
    learn.add_cb(GrowBatch(Says(*[(1000, 2000)]*2)))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False)
        learn.bs_find(.1, 100, show_plot=False, profile=False)
    assert learn.dls.bs == 16 and not hasattr(learn.recorder, 'bs_changes')
    fit(learn, 1, [])
    assert learn.recorder.bs_changes.bs.tolist() == [16, 32, 64] and learn.dls.bs == 16
    assert learn.recorder.metric_names[-3:] == ['bs', 'noise_scale', 'time']
    learn.remove_cb(GrowBatch)
    assert not any(isinstance(o, (NoiseScale, AccumulateGrads)) for o in learn.cbs)


def test_for_real():
    "From 4 examples, with a measured noise scale"
    set_seed(0)
    learn = digits_learner(bs=4)
    fit(learn, 6, [GrowBatch(NoiseScale(share=.5))], lr=.05)
    assert learn.recorder.bs_changes.bs.iloc[-1] > 4 and learn.dls.bs == 4 and learn.recorder.values[-1][0] < 1.


@pytest.mark.parametrize('args,words', [
    (dict(noise_scale=3), 'noise_scale=3 is not a NoiseScale'), (dict(lr_rule='lin'), "lr_rule='lin' is not one of 'noise', 'linear', 'sqrt', None"),
    (dict(max_bs=0), 'max_bs=0'), (dict(fits=1.5), 'fits=1.5'), (dict(part=0), 'part=0')])
def test_bad_input(args, words):
    with pytest.raises(ValueError, match=words): GrowBatch(**args)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match='2 NoiseScale callbacks.*GrowBatch'): fit(digits_learner(), 1, [GrowBatch(), NoiseScale()])
    with pytest.raises(ValueError, match='take that off'): fit(digits_learner(), 1, [GradientAccumulation(32), GrowBatch()])


def test_an_epoch_that_is_cut_short_does_not_compound_the_learning_rate():
    learn,watch = digits_learner(),Watch()
    fit(learn, 4, [GrowBatch(Says(*[(100, 200)]*2), lr_rule='linear'), ShortEpochCallback(.4, short_valid=False), watch], lr=.1)
    assert max(lr for _,_,lr in watch.steps) == pytest.approx(.4) and learn.opt.hypers[-1]['lr'] == pytest.approx(.1)


def test_set_bs_with_it_on_the_learner():
    learn = digits_learner()
    learn.add_cb(GrowBatch(Says(*[(1000, 2000)])))
    learn.set_bs(32)
    fit(learn, 1, [])
    assert learn.recorder.bs_changes.bs.tolist() == [32, 64] and learn.dls.bs == 32
    boom = Boom()
    boom.error = KeyboardInterrupt
    learn.grow_batch.tracker.says = [(1000, 2000)]
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [boom])
    learn.set_bs(8)
    assert learn.dls.bs == 8
    fit(learn, 1, [])
    assert learn.dls.bs == 8 and len(learn.get_preds()) == 2


def test_loaders_that_are_added_later_stay():
    learn = digits_learner()
    learn.set_bs(32)
    learn.dls.loaders.append(learn.dls.valid.new(bs=7))
    learn.set_bs(64)
    assert [dl.bs for dl in learn.dls.loaders] == [64, 64, 7]


@pytest.mark.parametrize('make', (DataLoader, torch_data.DataLoader))
@pytest.mark.parametrize('n,bs', [(1281, 32), (193, 24), (161, 8)])
def test_no_batch_of_one_for_a_batch_norm(make, n, bs):
    "Neither at the size it begins with, nor at those it grows to, within an epoch or after it; and the loader is as it was"
    X,y = digits()
    dl = make(torch_data.TensorDataset(X[:n], y[:n]), bs, shuffle=True)
    learn = Learner(DataLoaders(dl, dl), nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    watch,was = Watch(),dl.drop_last
    fit(learn, 4, [GrowBatch(Says((1e4, 2e4), (1e4, 2e4), every=5)), watch], lr=.1)
    assert 1 not in watch.sizes and max(watch.sizes) == 4*bs and sum(watch.sizes) >= 4*(n - 1)
    assert dl.drop_last == was and len(dl) == -(-n//bs) and not [k for k in vars(dl) if 'leaves' in k]
