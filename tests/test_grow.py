"`GrowBatch` finds the fastest size in a real training, follows stages that are given, wastes no batch, and gives everything back"
import math

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.utils import data as torch_data
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, set_seed
from fastai.callback.schedule import ParamScheduler, combined_cos
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, ShortEpochCallback

from fastai_bs_finder import grow
from fastai_bs_finder.accumulate import AccumulateGrads
from fastai_bs_finder.batches import n_examples
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.finder import *
from fastai_bs_finder.grow import GrowBatch, Stage, as_stages, grow_instead_of_decay, lr_factor
from fastai_bs_finder.measure import BSFinder
from fastai_bs_finder.mock import StepClock
from fastai_bs_finder.set_bs import *
from fastai_bs_finder.track import NoiseScale
from learners import digits
from results import result


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


@pytest.fixture
def steady(monkeypatch):
    "Call it with a learner whose steps are to take as long as on a machine that is alike at any moment: 1 ms, and 1 ms more for 64 examples"
    def of(learn): monkeypatch.setattr(StepClock, 'lap', lambda self, device: self.since and 1e-3*(1 + n_examples(learn)/64))
    return of


def fit(learn, n_epoch, cbs, how='fit', **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n_epoch, cbs=cbs, **kwargs)
    return learn


def grown(stages, n_epoch=3, how='fit', make=digits_learner, lr=.1, **kwargs):
    learn,watch = make(),Watch()
    fit(learn, n_epoch, [GrowBatch(stages, **kwargs), watch], how, **({'lr_max': lr} if how == 'fit_one_cycle' else {'lr': lr}))
    return learn,watch


def with_torch_loader():
    learn = digits_learner()
    ds = learn.dls.train.dataset
    learn.dls.loaders[0] = torch_data.DataLoader(ds, 16, shuffle=True)
    return learn


n = digits_learner().dls.train.n
doubling = [(0, 16), (160/n/3, 32), (480/n/3, 64)]  # after 10 batches of 16, and 10 of 32


def test_grows_within_an_epoch():
    learn,watch = grown(doubling)
    steps = [n for epoch,n,_ in watch.steps if epoch == 0]
    assert steps[:10] == [16]*10 and steps[10:20] == [32]*10 and set(steps[20:-1]) == {64} and watch.sizes[:len(steps)] == steps
    assert sum(steps) == n and sorted({n for epoch,n,_ in watch.steps if epoch}) == [n % 64, 64]
    log = learn.recorder.bs_changes
    assert log.bs.tolist() == [16, 32, 64] and log.batch.tolist() == [0, 10, 20] and log.why.tolist() == ['given']*3
    assert log.start.tolist() == pytest.approx([0, 160/n/3, 480/n/3])


def test_a_loader_that_does_not_listen_accumulates_until_the_epoch_ends():
    learn,watch = grown(doubling, make=with_torch_loader)
    per_epoch = len(digits_learner().dls.train)
    steps = [n for epoch,n,_ in watch.steps if epoch == 0]
    assert steps[:10] == [16]*10 and steps[10:20] == [32]*10 and set(steps[20:-1]) == {64}
    assert sum(steps) == n and set(watch.sizes[:per_epoch - 1]) == {16}
    assert {64} == {n for epoch,n,_ in watch.steps if epoch} - {n % 64}


def test_the_schedule_ends_where_it_should():
    "However the number of batches changes"
    for make in (digits_learner, with_torch_loader):
        learn,watch = grown(doubling + [(.5, 256)], how='fit_one_cycle', make=make)
        other = Watch()
        fit(digits_learner(), 3, [other], 'fit_one_cycle', lr_max=.1)
        assert watch.steps[-1][2] < .1*.05 and max(lr for _,_,lr in watch.steps) == pytest.approx(.1, rel=.01)
        at = lambda w: max(w.steps, key=lambda s: s[2])[0]
        assert at(watch) == at(other)


def test_limits():
    assert grown([(0, 16), (.1, 10**6)])[0].recorder.bs_changes.bs.max() == n
    assert grown([(0, 16), (.1, 10**6)], max_bs=100)[0].recorder.bs_changes.bs.max() == 100
    learn,watch = grown([(0, 16), (.1, 1024)], fits=50)
    assert learn.recorder.bs_changes.bs.max() == 1024 and max(watch.sizes) <= 50 and max(n for _,n,_ in watch.steps) >= 1024 - 50
    learn = digits_learner()
    learn.recorder.bs_fits = 50
    watch = Watch()
    fit(learn, 3, [GrowBatch([(0, 16), (.1, 1024)]), watch])
    assert max(watch.sizes) <= 50


@pytest.mark.parametrize('how', ('fit', 'fit_one_cycle'))
def test_the_learning_rate_follows(how):
    factors = [1, 1.7, 2.5]
    learn,watch = grown([(*o, f) for o,f in zip(doubling, factors)], how=how)
    assert learn.recorder.bs_changes.lr_factor.tolist() == pytest.approx(factors)
    alone,_ = grown(doubling, how=how)
    for i in (0, 15, -1): assert learn.recorder.lrs[i]/alone.recorder.lrs[i] == pytest.approx(factors[{0: 0, 15: 1, -1: 2}[i]])
    if how == 'fit': assert learn.opt.hypers[-1]['lr'] == pytest.approx(.1) == alone.recorder.lrs[0]


def kinds(learn): return sorted(type(o).__name__ for o in learn.cbs)


class Boom(Callback):
    order,run_valid = 80,False
    def before_step(self):
        if self.epoch == 1: raise self.error


@pytest.mark.parametrize('error', (None, KeyboardInterrupt, RuntimeError('boom')))
@pytest.mark.parametrize('stages', (None, [(0, 64), (.2, 128, 2.), (.4, 256, 3.)]))
def test_everything_is_given_back(error, stages, steady):
    learn = digits_learner() if stages else made()
    steady(learn)
    if stages:
        with learn.no_logging(): learn.set_bs(64, fits=16)
    learn.create_opt()
    metrics,cbs = list(learn.metrics),kinds(learn)
    boom = Boom()
    boom.error = error
    run = lambda: fit(learn, 2, [GrowBatch(stages)] + [boom]*(error is not None))
    if error:
        with pytest.raises((KeyboardInterrupt, RuntimeError)): run()
    else: run()
    if stages: assert learn.recorder.bs_changes.bs.tolist() == [64, 128, 256] and learn.accumulate_grads.n_acc == 64
    else: assert len(learn.recorder.bs_changes) > 1
    assert learn.dls.bs == 16 and 'chunkify' not in vars(learn.dls.train) and list(learn.metrics) == metrics and kinds(learn) == cbs
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(learn.lr)


def test_on_the_learner_for_good():
    learn = digits_learner()
    learn.add_cb(GrowBatch(doubling))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False)
        learn.bs_find(.1, 100, show_plot=False, profile=False)
    assert learn.dls.bs == 16 and not hasattr(learn.recorder, 'bs_changes') and len(learn.recorder.bs_stats) > 2
    for _ in range(2):
        fit(learn, 3, [])
        assert learn.recorder.bs_changes.bs.tolist() == [16, 32, 64] and learn.dls.bs == 16
    assert learn.recorder.metric_names[-2:] == ['bs', 'time'] and len(learn.get_preds()) == 2
    learn.remove_cb(GrowBatch)
    assert not any(isinstance(o, (BSFinder, AccumulateGrads)) for o in learn.cbs)


# Measuring in the training

def made(opt_func=SGD, bs=16, copies=8, **kwargs):
    "The digits several times over, so that a training of a few epochs is long enough"
    X,y = digits()
    ds = torch_data.TensorDataset(X.repeat(copies, 1), y.repeat(copies))
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Learner(DataLoaders(DataLoader(ds, bs, shuffle=True), DataLoader(ds, 256)), model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, **kwargs)


@pytest.mark.parametrize('opt_func,lr', [(SGD, .1), (Adam, 3e-3)])
def test_it_measures_and_jumps(opt_func, lr, steady):
    learn,watch = made(opt_func),Watch()
    steady(learn)
    fit(learn, 3, [GrowBatch(), watch], lr=lr)
    log,found = learn.recorder.bs_changes,learn.recorder.bs_result
    assert log.why.tolist()[0] == 'start' and log.why.iloc[-1] == 'fastest' and log.bs.iloc[-1] == found.advised > 16
    assert {*log.bs[log.why == 'trial']} <= {*found.profile.step_time} and log.bs.iloc[-1] <= max(found.profile.step_time) and learn.dls.bs == 16
    assert log.lr_factor.iloc[-1] == pytest.approx(lr_factor(found, found.advised)) and log.start.iloc[-1] < .3
    assert len(found) >= 6 and learn.recorder.values[-1][1] < .6
    other = made(opt_func)
    with other.no_bar(), other.no_logging(): other.bs_find(lr, 120, 8, n_train=4, show_plot=False, profile=False)
    ours,theirs = found.mean_noise_scale,other.recorder.bs_result.mean_noise_scale
    assert ours[0]/theirs[0] == pytest.approx(1, abs=.6) and ours[1] < theirs[2] and theirs[1] < ours[2]


class Sums(nn.Module):
    "Its gradient is the mean of the inputs, wherever its weight is"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
    def forward(self, x): return (self.w*x).sum(1)


def test_each_batch_takes_part_in_a_step():
    "The weight is what the steps add up to: of a measurement, the mean of its batches at the learning rate of a larger one"
    x = torch.randn(6400, 1) + 3
    dl = DataLoader(torch_data.TensorDataset(x, torch.zeros(6400)), 16, shuffle=False)
    learn = Learner(DataLoaders(dl, dl), Sums(), loss_func=lambda pred, y: pred.mean(), opt_func=SGD)
    steps = []
    class Steps(Callback):
        order,run_valid = 90,False
        def before_step(self): steps.append((float(self.learn.model.w.grad), self.opt.hypers[-1]['lr'], self.iter))
    fit(learn, 1, [GrowBatch(n_batch=4), Steps()], lr=1e-3)
    means = x.view(-1, 16).mean(1)
    at = [i for *_,i in steps]
    first = next(k for k in range(1, len(at)) if at[k] - at[k - 1] == 4)
    assert at[:first] == list(range(first)) and steps[first][0] == pytest.approx(float(means[at[first] - 3:at[first] + 1].mean()), rel=1e-4)
    taken = sum((4 if at[k] - at[k - 1] == 4 else 1) for k in range(1, len(at))) + 1
    assert taken == at[-1] + 1 and steps[first][1] == pytest.approx(1e-3)  # nothing is known at the first measurement
    second = next(k for k in range(first + 1, len(at)) if at[k] - at[k - 1] == 4)
    assert 1e-3 <= steps[second][1] <= 4e-3 and float(learn.model.w) == pytest.approx(-sum(g*lr for g,lr,_ in steps), rel=1e-3)


def test_a_loader_that_does_not_listen_tries_sizes_in_later_epochs(monkeypatch, steady):
    "Each size has an epoch, and a choice that is open is not measured on, at another size"
    monkeypatch.setattr(grow, 'is_clear', lambda found, bs: False)
    learn,watch = made(),Watch()
    steady(learn)
    learn.dls.loaders[0] = torch_data.DataLoader(learn.dls.train.dataset, 16, shuffle=True)
    fit(learn, 6, [GrowBatch(), watch], lr=.05)
    log = learn.recorder.bs_changes
    assert log.why.iloc[-1] == 'fastest' and len(learn.recorder.bs_result) == 6 and set(watch.sizes) - {16} >= {64}
    assert log[log.why == 'trial'].epoch.is_unique


def test_a_choice_that_is_open_is_measured_on(monkeypatch, steady):
    asked = []
    def is_clear(found, bs):
        asked.append(len(found))
        return len(found) >= 12
    monkeypatch.setattr(grow, 'is_clear', is_clear)
    learn = made()
    steady(learn)
    fit(learn, 3, [GrowBatch()], lr=.1)
    assert len(learn.recorder.bs_result) == 12 and asked[-1] == 12 and learn.recorder.bs_changes.bs.iloc[-1] > 16


def test_a_training_that_is_too_short_for_it():
    "Trying a size may take a tenth of a training"
    learn,watch = digits_learner(),Watch()
    fit(learn, 1, [GrowBatch(), watch], lr=.1)
    assert learn.recorder.bs_changes.bs.max() <= 16 and set(watch.sizes) <= {16, n % 16}


def test_what_fits_surely_bounds_what_is_tried(monkeypatch, steady):
    monkeypatch.setattr(GrowBatch, '_fits_surely', property(lambda self: 40.))
    learn,watch = made(),Watch()
    steady(learn)
    fit(learn, 3, [GrowBatch(), watch], lr=.1)
    assert max(watch.sizes) <= 40 and learn.recorder.bs_changes.bs.max() > 16


@pytest.mark.parametrize('event', ('before_batch', 'after_backward', 'after_batch', '_complete'))
def test_measuring_that_fails_ends_no_training(event, monkeypatch):
    was,calls = getattr(BSFinder, event),[]
    def fails(self, *args):
        calls.append(1)
        if len(calls) > 5 or event == '_complete': raise RuntimeError('torn')
        return was(self, *args)
    monkeypatch.setattr(BSFinder, event, fails)
    learn = made()
    with pytest.warns(UserWarning, match=r'GrowBatch stays with bs=16: measuring failed \(RuntimeError.*torn'): fit(learn, 2, [GrowBatch()], lr=.1)
    assert learn.recorder.bs_changes.bs.tolist() == [16] and learn.recorder.values[-1][1] < .6


def test_a_loss_that_is_not_finite_is_the_trainings_own():
    learn = made()
    class Spoil(Callback):
        order,run_valid = -12,False
        def before_batch(self):
            if self.train_iter == 20: self.learn.xb = (self.xb[0]*math.nan,)
    with pytest.warns(UserWarning, match='measuring failed .the loss is not finite'): fit(learn, 1, [GrowBatch(), Spoil()], lr=.1)
    assert len(learn.recorder.values) == 1


def between(z, t): return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)))


def test_it_says_why_it_stays(capsys):
    learn = made()
    learn.loss_func = between
    with learn.no_bar(): learn.fit(1, .01, cbs=GrowBatch())
    assert 'The training kept bs=16 to the end, because' in ' '.join(capsys.readouterr().out.split())
    assert learn.recorder.bs_changes.bs.tolist() == [16]


def test_it_says_what_it_did(capsys):
    learn = digits_learner()
    with learn.no_bar(): learn.fit(3, .1, cbs=GrowBatch([(0, 16), (.5, 64, 2.)]))
    assert 'The training began with bs=16; after 50% of the way it went on with bs=64 at 2.0 times the learning rate.' in ' '.join(capsys.readouterr().out.split())


def test_it_says_how_many_epochs_get_as_far(capsys, steady):
    for plan in (False, True):
        learn = made()
        steady(learn)
        with learn.no_bar(): learn.fit(3, .1, cbs=GrowBatch(plan=plan))
        far = learn.recorder.bs_result.plan(learn.recorder.bs_changes.bs.iloc[-1], 3)[0]
        said = ' '.join(capsys.readouterr().out.split())
        assert far > 3 and (f'To get as far as in 3 epochs with bs=16, train for {far}: GrowBatch(plan=True).' in said) == (not plan)


def test_as_many_epochs_as_the_plan_says(tmp_path, steady):
    "Their metrics are recorded, callbacks see them, and the schedule ends with the last of them"
    learn,watch = made(path=tmp_path),Watch()
    steady(learn)
    epochs = []
    class Epochs(Callback):
        order = 55
        def after_epoch(self): epochs.append(self.epoch)
    fit(learn, 3, [GrowBatch(plan=True), watch, Epochs(), SaveModelCallback(monitor='valid_loss', every_epoch=True)], 'fit_one_cycle', lr_max=.1)
    n_epoch = learn.recorder.bs_result.plan(learn.recorder.bs_changes.bs.iloc[-1], 3)[0]
    assert n_epoch > 3 and epochs == list(range(n_epoch)) and len(learn.recorder.values) == n_epoch and watch.steps[-1][2] < .01*max(lr for *_,lr in watch.steps)
    assert len([*tmp_path.glob('models/*')]) == n_epoch
    fit(learn, 2, [], 'fit')
    assert len(learn.recorder.values) == 2


def test_a_training_that_is_resumed_follows_what_was_found(steady):
    learn = made()
    steady(learn)
    fit(learn, 3, [GrowBatch()], 'fit_one_cycle', lr_max=.1)
    again,watch = made(),Watch()
    fit(again, 3, [GrowBatch(learn.recorder.bs_changes), watch], 'fit_one_cycle', lr_max=.1, start_epoch=1)
    bs = learn.recorder.bs_changes.bs.iloc[-1]
    assert {epoch for epoch,*_ in watch.steps} == {1, 2} and set(watch.sizes[:20]) == {bs}


def test_from_an_answer():
    learn = made()
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.1, show_plot=False)
    found = learn.recorder.bs_result
    watch = Watch()
    fit(learn, 1, [GrowBatch(found), watch], lr=.1)
    assert set(watch.sizes[:-1]) == {found.advised} and learn.recorder.bs_changes.lr_factor.item() == pytest.approx(lr_factor(found, found.advised))
    assert learn.recorder.lrs[0] == pytest.approx(.1*lr_factor(found, found.advised))


def test_beside_noise_scale(steady):
    learn = made()
    steady(learn)
    fit(learn, 2, [GrowBatch(), NoiseScale(share=None, every=30)], lr=.1)
    assert learn.recorder.bs_changes.bs.iloc[-1] > 16 and len(learn.recorder.noise_scale) > 2


# Stages

def test_stages():
    assert as_stages([Stage(.5, 64), (0, 16)]) == [Stage(0, 16), Stage(.5, 64)]
    known = result(*[(1000, 900, 1100)]*3, step_time={b: .01 + 1e-4*b for b in (16, 64, 256, 1024)})
    assert as_stages(known) == [Stage(0., known.advised, lr_factor(known, known.advised))] and known.advised > 64
    frame = pd.DataFrame([dict(start=0., bs=16, lr_factor=1., why='start'), dict(start=.1, bs=99, lr_factor=3., why='trial'), dict(start=.2, bs=64, lr_factor=2., why='fastest')])
    assert as_stages(frame) == [Stage(0., 16, 1.), Stage(.2, 64, 2.)]


def test_growing_instead_of_decay():
    "The product of schedule and factor stays between half the peak and the peak"
    sched = combined_cos(.25, 1, 25, 0)
    stages = grow_instead_of_decay(sched, 64, 512)
    assert [o.bs for o in stages] == [64, 128, 256, 512] and [o.lr_factor for o in stages] == [1, 2, 4, 8]
    for p in np.linspace(.25, .8, 50):
        now = [o for o in stages if o.start <= p][-1]
        assert now.lr_factor == 8 or 12.49 <= sched(p)*now.lr_factor <= 25.01
    assert len(grow_instead_of_decay(lambda p: 1., 64, 512)) == 1


@pytest.mark.parametrize('args,words', [
    (dict(stages=3), 'stages=3 are no stages'), (dict(stages=[]), 'are no stages'), (dict(stages=[(0, 0)]), 'bs=0'), (dict(stages=[(1.5, 16)]), 'start=1.5'),
    (dict(stages=[(0, 16, -1)]), 'lr_factor=-1'), (dict(stages=result()), 'suggests no batch size'), (dict(max_bs=0), 'max_bs=0'), (dict(fits=1.5), 'fits=1.5'),
    (dict(n_batch=1), 'n_batch=1'), (dict(regret=-1), 'regret=-1')])
def test_bad_input(args, words):
    with pytest.raises(ValueError, match=words): GrowBatch(**args)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match='take that off'): fit(digits_learner(), 1, [GradientAccumulation(32), GrowBatch()])
    with pytest.raises(ValueError, match=r'this learner accumulates several of them to 32 examples.*GrowBatch\(learn.recorder.bs_result\)'):
        fit(digits_learner(), 1, [AccumulateGrads(32), GrowBatch()])
    with pytest.raises(ValueError, match='this learner accumulates several of them to 16 examples'): fit(digits_learner(), 1, [GrowBatch(fits=8)])


def test_an_epoch_that_is_cut_short_does_not_compound_the_learning_rate():
    learn,watch = digits_learner(),Watch()
    fit(learn, 4, [GrowBatch([(0, 16), (.02, 32, 2), (.04, 64, 4)]), ShortEpochCallback(.4, short_valid=False), watch], lr=.1)
    assert max(lr for _,_,lr in watch.steps) == pytest.approx(.4) and learn.opt.hypers[-1]['lr'] == pytest.approx(.1)


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
    fit(learn, 4, [GrowBatch([(0, bs), (.05, 2*bs), (.1, 4*bs)]), watch], lr=.1)
    assert 1 not in watch.sizes and max(watch.sizes) == 4*bs and sum(watch.sizes) >= 4*(n - 1)
    assert dl.drop_last == was and len(dl) == -(-n//bs) and not [k for k in vars(dl) if 'leaves' in k]
