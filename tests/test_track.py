"`NoiseScale` leaves no trace in a training, tells the truth, costs what it may, and is seen where people look"
import csv, gc, math, time, warnings
from functools import partial
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.utils import data as torch_data
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, L, Learner, SGD, set_seed
from fastai.callback.all import CSVLogger, GradientClip, MixUp, ParamScheduler
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Recorder
from fastai.callback.training import GradientAccumulation

from fastai_bs_finder import track
from fastai_bs_finder.accumulate import AccumulateGrads
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.finder import *
from fastai_bs_finder.grow import GrowBatch
from fastai_bs_finder.loaders import second_loader
from fastai_bs_finder.losses import BatchLoss
from fastai_bs_finder.metric import OptMeter
from fastai_bs_finder.result import noise_in_use
from fastai_bs_finder.track import AllProcesses, NoiseScale, OwnPass, Schedule, Window
from footprint import same, trained
from learners import Stream, applications, digits, loaders, maker
from reference import ema, flat_grad, paper_estimate, per_example_truth
from tiers import each_value, in_tiers


def often(**kwargs): return NoiseScale(**(dict(share=None, n_batch=3, every=3) | kwargs))


def quiet_fit(learn, n_epoch=2, cbs=(), how='fit_one_cycle', **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n_epoch, cbs=list(cbs), **kwargs)
    return learn


def dropout_and_batch_norm(times=1):
    "30 batches per epoch, or so many times that"
    set_seed(1)
    X,y = digits()
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 10))
    return Learner(loaders(list(zip(X[:480], y[:480]))*times), model, loss_func=CrossEntropyLossFlat())


def comparable(learn):
    "What a training leaves behind, but for the noise scale's own column"
    res = trained(learn)
    if 'noise_scale' in learn.recorder.metric_names: res['values'] = [v[:-1] for v in res['values']]
    return res


def assert_no_trace(make, fit, cb):
    learn = make()
    fit(learn, cbs=[cb])
    after,other = comparable(learn),make()
    fit(other, cbs=[])
    without = comparable(other)
    assert len(learn.recorder.noise_scale) > 1 and [k for k in after if not same(after[k], without[k])] == []
    assert type(learn.cbs) == type(other.cbs) and len(learn.metrics) == len(other.metrics) and not any(p._backward_hooks for p in learn.model.parameters())
    return learn


@pytest.mark.parametrize('cbs', ([NoiseScale(share=None)], [AccumulateGrads(40), NoiseScale(share=None)], [GrowBatch()]), ids=str)
def test_no_warning(cbs):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # fastai's, where an attribute has the name of one of the learner's
        quiet_fit(digits_learner(), 1, cbs)


@pytest.mark.parametrize('share', (.04, None))
def test_a_training_too_short_to_measure(capsys, share):
    learn = digits_learner()
    learn.fit(1, .1, cbs=NoiseScale(every=200, share=share))
    assert 'The noise scale was not measured: train longer, or lower every=200.' in capsys.readouterr().out and not len(learn.recorder.noise_scale)


callbacks = {'none': list, 'MixUp': lambda: [MixUp()], 'GradientClip': lambda: [GradientClip(.1)], 'GradientAccumulation': lambda: [GradientAccumulation(32)],
             'AccumulateGrads': lambda: [AccumulateGrads(40)]}

@pytest.mark.parametrize('others,how', in_tiers(each_value, list(callbacks), ['fit', 'fit_one_cycle']))
def test_no_trace(others, how):
    assert_no_trace(dropout_and_batch_norm, lambda learn, cbs=(): quiet_fit(learn, 2, [*cbs, *callbacks[others]()], how), often())


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow]*('vision' in n)) for n in applications if 'stream' not in n and 'unet' not in n])
def test_no_trace_on_any_kind_of_learner(name, fastai_data):
    "In the loss, the weights, the optimizer, the random states"
    make,lr = maker(name, fastai_data)
    assert_no_trace(make, lambda learn, cbs: quiet_fit(learn, 1 if 'vision' in name or 'text' in name else 2, cbs, 'fit', lr=lr), often(n_batch=2))


class OwnRandom(torch_data.Dataset):
    "Adds noise from a generator of its own, so whoever draws from it is noticed"
    def __init__(self): self.rng,(self.X,self.y) = np.random.default_rng(3),digits()
    def __len__(self): return 240
    def __getitem__(self, i): return self.X[i] + torch.tensor(self.rng.normal(size=64)).float(),self.y[i]


@pytest.mark.parametrize('kind', ('fastai', 'PyTorch', 'PyTorch, generator'))
@pytest.mark.parametrize('workers', (0, 2))
def test_no_trace_in_the_data(kind, workers):
    def make():
        set_seed(2)
        ds = OwnRandom()
        if kind == 'fastai': dl = DataLoader(ds, bs=16, shuffle=True, num_workers=workers)
        else: dl = torch_data.DataLoader(ds, 16, shuffle=True, num_workers=workers, persistent_workers=workers > 0, generator=torch.Generator().manual_seed(3) if 'generator' in kind else None)
        return Learner(DataLoaders(dl, loaders(list(zip(*digits()))[:48]).valid), nn.Linear(64, 10), loss_func=CrossEntropyLossFlat())
    assert_no_trace(make, lambda learn, cbs: quiet_fit(learn, 2, cbs), often())
    second = second_loader(make().dls.train)
    assert (second if 'PyTorch' in kind else second.fake_l).num_workers == 0


def test_hidden_states_begin_anew():
    "Those of the training belong to other data"
    calls = []
    class Recurrent(nn.Linear):
        def reset(self): calls.append('reset')
        def forward(self, x):
            calls.append('batch')
            return super().forward(x)
    X,y = digits()
    dl = DataLoader(list(zip(X[:64], y[:64])), bs=16)
    quiet_fit(Learner(DataLoaders(dl, dl.new()), Recurrent(64, 10), loss_func=CrossEntropyLossFlat()), 1, [often(every=4)], 'fit')
    assert calls == ['reset'] + ['batch']*4 + ['reset'] + ['batch']*3 + ['batch']*4  # fit's own, training, a measurement, validation


def test_one_measurement_equals_the_paper():
    "At the weights of the training, from the second loader's batches, by stored gradients"
    X,y = digits()
    set_seed(1)
    dl = DataLoader(list(zip(X[:160], y[:160])), bs=16)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(64, 10), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1, wd=0.)
    quiet_fit(learn, 2, [often()], 'fit')
    s = learn.recorder.noise_scale
    first = s.iloc[0]
    model = after_steps(X, y, int(first.batch))
    grads = []
    for i in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(X[16*i:16*i + 16]), y[16*i:16*i + 16]).backward()
        grads.append(flat_grad(model))
    assert (first.raw_noise, first.raw_scale) == pytest.approx(paper_estimate(grads, 16), rel=1e-4)
    assert list(zip(s.noise, s.scale))[-1] == pytest.approx(ema(list(zip(s.raw_noise, s.raw_scale)), .9)[-1])


def after_steps(X, y, n):
    "That linear model after `n` steps of plain SGD over the data in order"
    set_seed(1)
    model = nn.Linear(64, 10)
    for i in range(n):
        idxs = slice(16*(i % 10), 16*(i % 10) + 16)
        model.zero_grad()
        nn.functional.cross_entropy(model(X[idxs]), y[idxs]).backward()
        with torch.no_grad():
            for p in model.parameters(): p -= .1*p.grad
    return model


def test_windows_equal_the_paper():
    "With accumulation: the micro-batches of each window, by stored gradients"
    X,y = digits()
    def make():
        set_seed(1)
        dl = DataLoader(list(zip(X[:160], y[:160])), bs=8)
        return Learner(DataLoaders(dl, dl), nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1, wd=0.)
    learn = quiet_fit(make(), 1, [AccumulateGrads(40), often(every=1)], 'fit')
    s,model = learn.recorder.noise_scale,make().model
    assert len(s) == 4 and (s.bs == 40).all()
    for w in range(4):
        grads = []
        for i in range(5):
            model.zero_grad()
            nn.functional.cross_entropy(model(X[40*w + 8*i:40*w + 8*i + 8]), y[40*w + 8*i:40*w + 8*i + 8]).backward()
            grads.append(flat_grad(model))
        assert (s.raw_noise[w], s.raw_scale[w]) == pytest.approx(paper_estimate(grads, 8), rel=1e-3)
        mean,j = torch.stack(grads).mean(0),0
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(.1*mean[j:j + p.numel()].view_as(p).float())
                j += p.numel()


def test_tied_weights_and_windows():
    "A parameter that is used twice has one gradient"
    X,y = digits()
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.out = nn.Linear(64, 64),nn.Linear(64, 10)
        def forward(self, x): return self.out(self.a(self.a(x).tanh()).tanh())
    def make():
        set_seed(1)
        dl = DataLoader(list(zip(X[:160], y[:160])), bs=8)
        return Learner(DataLoaders(dl, dl), Tied(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0., wd=0.)
    s = quiet_fit(make(), 1, [AccumulateGrads(160), often(every=1)], 'fit').recorder.noise_scale
    model,grads = make().model,[]
    for i in range(20):
        model.zero_grad()
        nn.functional.cross_entropy(model(X[8*i:8*i + 8]), y[8*i:8*i + 8]).backward()
        grads.append(flat_grad(model))
    assert (s.raw_noise[0], s.raw_scale[0]) == pytest.approx(paper_estimate(grads, 8), rel=1e-3)


class Scaled(Callback):
    "The loss times a power of two, as fp16 training has it"
    order = MixedPrecision.order
    def before_backward(self): self.learn.loss_grad = self.loss_grad*1024
    def before_step(self):
        for p in self.model.parameters(): p.grad /= 1024


@pytest.mark.parametrize('window', (False, True))
def test_loss_scaling(window, monkeypatch):
    def measured(scale):
        monkeypatch.setattr(track, 'loss_scale', lambda learn: scale)
        learn = quiet_fit(dropout_and_batch_norm(), 1, [often()] + [AccumulateGrads(48)]*window + [Scaled()]*(scale is not None), 'fit', lr=1e-3)
        return learn.recorder.noise_scale
    a,b = measured(None),measured(1024.)
    assert len(a) > 3
    np.testing.assert_allclose(a[['noise', 'scale', 'opt_noise', 'opt_scale']], b[['noise', 'scale', 'opt_noise', 'opt_scale']], rtol=1e-3)


@pytest.mark.slow
def test_agrees_with_bs_find_and_the_truth():
    "At weights that do not move"
    X,y = digits()
    def learner():
        set_seed(3)
        ds = list(zip(X[:1280], y[:1280]))
        return Learner(DataLoaders(DataLoader(ds, bs=16, shuffle=True), DataLoader(ds[:16], bs=16)), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), loss_func=CrossEntropyLossFlat(), opt_func=SGD, wd=0.)
    warm = quiet_fit(learner(), 1, how='fit', lr=.1)
    S,G2 = per_example_truth(warm.model, X[:1280], y[:1280])
    def at_weights():
        learn = learner()
        learn.model.load_state_dict(warm.model.state_dict())
        return learn
    tracked = quiet_fit(at_weights(), 3, [NoiseScale(n_batch=20, share=None, beta=.98)], 'fit', lr=0.).recorder.noise_scale.iloc[-1]
    window = quiet_fit(at_weights(), 6, [AccumulateGrads(320), NoiseScale(share=None, beta=.98)], 'fit', lr=0.).recorder.noise_scale.iloc[-1]
    found = at_weights()
    with found.no_logging(): found.bs_find(0., 480, 20, .98, 0, show_plot=False, profile=False)
    for row in (tracked, window, found.recorder.bs_stats.iloc[-1]): assert row.lo < S/G2 < row.hi and row.hi < 3*row.lo


@pytest.mark.parametrize('share,window', in_tiers(each_value, [.05, .1, .5], [False, True]))
def test_cost(share, window, monkeypatch):
    "By a clock that only the training and the measuring move"
    now = [0.]
    monkeypatch.setattr(track.time, 'perf_counter', lambda: now[0])
    class Tick(Callback):
        order,run_valid = -50,False
        def after_pred(self): now[0] += 1
    measure = OwnPass.measure
    def slow(self):
        now[0] += 6
        measure(self)
    monkeypatch.setattr(OwnPass, 'measure', slow)
    learn,cb = dropout_and_batch_norm(10),NoiseScale(share=share)
    quiet_fit(learn, 1, [cb, Tick()] + [AccumulateGrads(64)]*window)
    s = learn.recorder.noise_scale
    assert learn.recorder.noise_scale_result.train_seconds == pytest.approx(300) == pytest.approx(len(learn.dls.train))
    if window: assert len(s) > 60
    else: assert .6*share - .02 < learn.recorder.noise_scale_result.seconds/learn.recorder.noise_scale_result.train_seconds <= share and len(s) == learn.recorder.noise_scale_result.seconds/(6 + cb.n_batch)


def test_after_a_measurement_that_was_held_up(monkeypatch):
    "Those after it come one by one again: none is kept back for a second one as slow, to follow all at once"
    now,n = [0.],[0]
    monkeypatch.setattr(track.time, 'perf_counter', lambda: now[0])
    class Tick(Callback):
        order,run_valid = -50,False
        def after_pred(self): now[0] += 1
    measure = OwnPass.measure
    def slow(self):
        n[0] += 1
        now[0] += 100*(n[0] == 3)
        measure(self)
    monkeypatch.setattr(OwnPass, 'measure', slow)
    learn = quiet_fit(dropout_and_batch_norm(30), 1, [NoiseScale(share=.25), Tick()])
    batches = learn.recorder.noise_scale.batch
    assert len(batches) > 10 and np.diff(batches[3:]).min() > 8*3 and np.diff(batches)[2] > 100*3


@pytest.mark.parametrize('users', (True, False))
def test_no_garbage_collection_within_a_measurement(users):
    seen = []
    class Look(Callback):
        def before_batch(self):
            seen.append((len(seen) and gc.isenabled()))
            if len(seen) == 40: raise KeyboardInterrupt
    if not users: gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt): quiet_fit(dropout_and_batch_norm(), 3, [often(), Look()])
        assert gc.isenabled() == users and set(seen[1:]) == {False, users}
    finally: gc.enable()


def test_every():
    learn = quiet_fit(dropout_and_batch_norm(), 2, [often(every=7)])
    gaps = np.diff(learn.recorder.noise_scale.batch)
    assert (gaps == 7).all() and learn.recorder.noise_scale.batch.iloc[0] == 7


@pytest.mark.parametrize('every,gap', ((5, 6), (6, 6), (7, 9), (9, 9), (10, 12)))
def test_every_with_windows_of_three_batches(every, gap):
    "The next multiple of three, also over the end of an epoch, which is one"
    batches = quiet_fit(dropout_and_batch_norm(), 2, [AccumulateGrads(48), often(every=every)]).recorder.noise_scale.batch
    assert (np.diff(batches) == gap).all() and len(batches) > 3


def test_the_table(capsys):
    learn = dropout_and_batch_norm()
    with learn.no_bar(): learn.fit(2, 1e-3, cbs=[often()])
    s = learn.recorder.noise_scale
    assert list(s.columns[:9]) == ['batch', 'epoch', 'step', 'samples', 'loss', 'bs', 'lr', 'noise', 'scale']
    assert (s.samples == 16*s.batch).all() and (s.step == s.batch).all() and set(s.epoch) == {0, 1} and (s.lr == 1e-3).all() and (s.bs == 16).all()
    assert learn.recorder.metric_names[-2] == 'noise_scale'
    assert learn.recorder.values[-1][-1] == pytest.approx(noise_in_use(s).noise_scale.iloc[-1])
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f'The noise scale was measured {len(s)} times, ') and out[-1].endswith(' examples at the end.')


def test_loggers(tmp_path, monkeypatch):
    learn = dropout_and_batch_norm()
    learn.path = tmp_path
    quiet_fit(learn, 2, [often(), CSVLogger()])
    rows = list(csv.DictReader((tmp_path/'history.csv').open()))
    assert len(rows) == 2 and float(rows[1]['noise_scale']) == pytest.approx(learn.recorder.values[-1][-1], rel=1e-3)


def test_tensorboard(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = quiet_fit(dropout_and_batch_norm(), 2, [often(), TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars('noise_scale')] == pytest.approx([v[-1] for v in learn.recorder.values])


def test_wandb(tmp_path, monkeypatch, offline_wandb):
    import wandb
    from fastai.callback.wandb import WandbCallback
    monkeypatch.chdir(tmp_path)
    logged = []
    with wandb.init(mode='offline', dir=tmp_path):
        monkeypatch.setattr(wandb, 'log', lambda d, **kwargs: logged.append(d))
        learn = quiet_fit(dropout_and_batch_norm(), 2, [often(), WandbCallback(log_preds=False, log_model=False)])
    values = [d['noise_scale'] for d in logged if 'noise_scale' in d]
    assert values == pytest.approx([v[-1] for v in learn.recorder.values])


def test_stands_aside_for_finders():
    learn = digits_learner()
    learn.add_cb(often())
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False)
        learn.bs_find(.1, 100, show_plot=False, profile=False)
    assert 'noise_scale' not in vars(learn.recorder) and not len(learn.metrics.filter(lambda m: m.name == 'noise_scale'))


@pytest.mark.parametrize('error', (KeyboardInterrupt, RuntimeError('boom')))
@pytest.mark.parametrize('where', ('training', 'measuring', 'window'))
def test_an_error_leaves_the_results_and_nothing_else(error, where):
    learn,cb = dropout_and_batch_norm(),often()
    class Boom(Callback):
        order = 5
        def before_backward(self):
            measuring = not any(isinstance(o, Recorder) for o in self.learn.cbs)
            if len(cb.rows) == 4 and measuring == (where == 'measuring'): raise error
    goes_on = where == 'measuring' and error is not KeyboardInterrupt
    with pytest.warns(UserWarning, match=r'measures no more in this training.*RuntimeError: boom') if goes_on else pytest.raises((KeyboardInterrupt, RuntimeError)):
        quiet_fit(learn, 2, [cb, Boom()] + [AccumulateGrads(48)]*(where == 'window'), 'fit', lr=1e-3)
    assert len(learn.recorder.noise_scale) == 4 and not any(isinstance(o, NoiseScale) for o in learn.cbs) and any(isinstance(o, Recorder) for o in learn.cbs)
    assert not len(learn.metrics) and not any(p._backward_hooks for p in learn.model.parameters())
    quiet_fit(learn, 1)
    assert 'noise_scale' not in learn.recorder.metric_names


@pytest.mark.parametrize('kwargs,words', [(dict(every=0), 'every=0'), (dict(n_batch=1), 'n_batch=1'), (dict(beta=1), 'beta=1'), (dict(share=0), 'share=0'), (dict(share=1.5), 'share=1.5'), (dict(share=True), 'share=True')])
def test_bad_input(kwargs, words):
    with pytest.raises(ValueError, match=words): NoiseScale(**kwargs)


def test_an_epoch_of_one_batch():
    X,y = digits()
    def make(): return Learner(loaders(list(zip(X[:16], y[:16]))), nn.Linear(64, 10), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='An epoch is a single batch'): quiet_fit(make(), 1, [often()])
    learn = quiet_fit(dropout_and_batch_norm(), 3, [often(n_batch=100)])
    assert len(learn.recorder.noise_scale) > 5  # as many as an epoch has


def test_the_picture():
    learn = digits_learner()
    with pytest.raises(ValueError, match='no noise scale to plot yet'): learn.recorder.plot_noise_scale()
    quiet_fit(learn, 2, [often()])
    fig = learn.recorder.plot_noise_scale()
    assert fig.axes[0].get_ylabel() == 'Noise scale (examples)'
    quiet_fit(learn, 1, [NoiseScale(every=10**6)])
    assert len(learn.recorder.noise_scale) == 0
    learn.recorder.plot_noise_scale()


@pytest.mark.parametrize('stays', (False, True))
def test_validation_is_no_training(stays):
    "`validate` and `get_preds` run callbacks' `before_fit` too, before any training and after one"
    learn = dropout_and_batch_norm()
    if stays: learn.add_cb(often())
    with learn.no_bar(): loss = learn.validate()
    assert len(loss) == 1
    quiet_fit(learn, 1, [] if stays else [often()])
    n = len(learn.recorder.noise_scale)
    with learn.no_bar():
        assert len(learn.validate()) == 1 and len(learn.get_preds()) == 2
    assert len(learn.recorder.noise_scale) == n > 1


def test_copy_and_pickle():
    "`export` pickles the callbacks"
    import copy, pickle
    learn = dropout_and_batch_norm()
    learn.add_cb(often())
    quiet_fit(learn, 1)
    n = len(learn.recorder.noise_scale)
    assert len(copy.deepcopy(learn).recorder.noise_scale) == len(pickle.loads(pickle.dumps(L(learn.noise_scale)))[0].stats) == n > 1


def test_cancelled_batches_of_a_measurement():
    "Are left out, whatever was cancelled, and the training goes on"
    from fastai.callback.core import CancelBatchException, CancelTrainException
    for error in (CancelBatchException, CancelTrainException):
        class Cancel(Callback):
            def before_batch(self):
                if self.training and not any(isinstance(o, Recorder) for o in self.learn.cbs): raise error
        learn,other = quiet_fit(dropout_and_batch_norm(), 1, [often(), Cancel()]),quiet_fit(dropout_and_batch_norm(), 1)
        assert len(learn.recorder.noise_scale) == 0 and all(map(torch.equal, learn.model.parameters(), other.model.parameters()))


def test_parameters_that_are_not_the_optimizers_own():
    def make():
        learn = dropout_and_batch_norm()
        learn.splitter = lambda model: [list(model[4].parameters())]
        return learn
    assert_no_trace(make, lambda learn, cbs: quiet_fit(learn, 2, [*cbs, GradientClip(.1)]), often())


def test_a_schedule_does_not_weight_the_measurements():
    "At fixed weights, with a learning rate that goes up and down, the optimizer's noise scale of SGD is the simple one"
    set_seed(1)
    learn = digits_learner()
    quiet_fit(learn, 3, [often(n_batch=5)], lr_max=1e-6)
    s = learn.recorder.noise_scale
    np.testing.assert_allclose(s.opt_noise_scale, s.noise_scale, rtol=1e-6)
    np.testing.assert_allclose(s.opt_lo, s.lo, rtol=1e-6)


def test_weighted_loaders_are_measured_with_their_weights():
    from fastai.callback.data import WeightedDL
    dl = WeightedDL(list(range(90)), bs=10, wgts=[1.]*5 + [0.]*85, shuffle=True)
    assert max(int(b.max()) for b in second_loader(dl)) < 5


def test_memory_that_does_not_suffice_for_a_measurement(capsys):
    class Full(Callback):
        def after_pred(self):
            if not any(isinstance(o, Recorder) for o in self.learn.cbs): raise torch.OutOfMemoryError('no memory left')
    other,cb,learn = quiet_fit(dropout_and_batch_norm(), 1),often(),dropout_and_batch_norm()
    with learn.no_bar(): learn.fit_one_cycle(1, cbs=[cb, Full()])
    assert len(learn.recorder.noise_scale) == 0 and all(map(torch.equal, learn.model.parameters(), other.model.parameters()))
    assert cb.out_of_memory and 'The noise scale was not measured: there is not enough memory for it' in capsys.readouterr().out
    learn.remove_cb(Full)
    quiet_fit(learn, 1, [cb])
    assert not cb.out_of_memory and len(cb.rows) > 3  # another training, another try


def test_memory_that_does_not_suffice_for_the_norms_of_a_window(capsys, monkeypatch):
    "After a measurement that it sufficed for: the training goes on, without hooks, and says so"
    sq_norms,calls = track.sq_norms,[]
    def full(grads):
        calls.append(len(grads))
        if len(calls) > 8: raise torch.OutOfMemoryError('no memory left')
        return sq_norms(grads)
    other,learn = quiet_fit(dropout_and_batch_norm(), 1, [AccumulateGrads(48)]),dropout_and_batch_norm()
    monkeypatch.setattr(track, 'sq_norms', full)
    with learn.no_bar(): learn.fit_one_cycle(1, cbs=[AccumulateGrads(48), cb := NoiseScale(share=None)])
    assert len(calls) == 9 and len(learn.recorder.noise_scale) == 2 and cb.out_of_memory and all(map(torch.equal, learn.model.parameters(), other.model.parameters()))
    assert 'until there was not enough memory for more' in capsys.readouterr().out and not any(p._backward_hooks for p in learn.model.parameters())


def failing_snapshot(learn, monkeypatch): monkeypatch.setattr(track, 'Snapshot', lambda *args: 1/0)
def failing_loader(learn, monkeypatch): monkeypatch.setattr(track, 'second_loader', lambda dl: 1/0)
def failing_item(learn, monkeypatch):
    monkeypatch.setattr(track, 'second_loader', lambda dl: iter(()))
def failing_pass(learn, monkeypatch):
    class Counts(Callback):
        "Knows the batches of a training only"
        def after_pred(self): self.learn.recorder.losses if any(isinstance(o, Recorder) for o in self.learn.cbs) else [][0]
    learn.add_cb(Counts())
def failing_end(learn, monkeypatch):
    restore = track.Snapshot.restore
    def stuck(self):
        restore(self)
        raise RuntimeError('stuck')
    monkeypatch.setattr(track.Snapshot, 'restore', stuck)


@pytest.mark.parametrize('fail', [failing_snapshot, failing_loader, failing_item, failing_pass, failing_end])
def test_a_measurement_that_fails_ends_no_training(fail, monkeypatch, capsys):
    "And leaves no trace in it"
    other,learn,cb = quiet_fit(dropout_and_batch_norm(), 2),dropout_and_batch_norm(),often()
    fail(learn, monkeypatch)
    with pytest.warns(UserWarning) as said, learn.no_bar(): learn.fit_one_cycle(2, cbs=cb)
    assert len([w for w in said if 'measures no more' in str(w.message)]) == 1 and not cb.rows and cb.error
    assert all(map(torch.equal, learn.model.parameters(), other.model.parameters())) and f'was not measured: {cb.error}' in capsys.readouterr().out
    assert not any(p._backward_hooks for p in learn.model.parameters())


class Clock(Callback):
    "A clock that each batch of a training moves by a second, and nothing else"
    order,run_valid = -50,False
    def __init__(self, monkeypatch):
        now = [0.]  # out of reach of a measurement, which puts back what callbacks have
        monkeypatch.setattr(track.time, 'perf_counter', lambda: now[0])
        def move(seconds): now[0] += seconds
        self.move = move
    def after_pred(self): self.move(1)


def test_the_schedule_by_itself(monkeypatch):
    clock = Clock(monkeypatch)
    s = Schedule(every=3, share=.1)
    s.begin_epoch()
    def train(n):
        clock.move(n)
        s.since += n
    train(2)
    assert s.train_seconds == 2 and not s.due() and not s.due(last=True) and s.due(1)  # `every` wins
    train(8)
    assert s.due(cost=1.) and not s.due(cost=1.1) and s.due(cost=1.1, last=True)
    clock.move(5)
    s.spend(5)
    s.end(5, taken=True)
    assert (s.train_seconds, s.seconds, s.cost, s.since) == (10, 5, 5, 0)
    train(39)
    assert not s.due() and not s.due(last=True)  # the epoch had one, and 49 seconds are too few for 5
    train(1)
    assert s.due() and not s.due(cost=.1)
    s.stop_clock()
    clock.move(100)  # validation
    s.begin_epoch()
    assert s.train_seconds == 50 and s.due(cost=9., last=True)
    s.end(1000, taken=False)
    train(3)
    assert s.due(cost=9., last=True) and s.cost == 502.5  # it was not finite, so the epoch has none yet
    s.end(6, taken=True)
    assert s.cost == 6  # but for one that was held up


def test_the_schedule_of_several_processes(monkeypatch):
    "A number of batches instead of a clock"
    clock = Clock(monkeypatch)
    s = Schedule(every=3, share=.1)
    s.begin_epoch()
    s.wait,s.since = 20,18
    clock.move(1000)
    assert not s.due(1, cost=1e9) and s.due(2, cost=1e9) and s.due(0, last=True)
    s.seconds = 150.
    assert s.batches_to_wait(50., 500) == pytest.approx(500.) and s.batches_to_wait(-60., 500) == 3 and Schedule(7).batches_to_wait(50., 500) == 7


@pytest.mark.parametrize('share', (.04, 1e-9))
def test_at_least_once_per_epoch(share, monkeypatch):
    "Where there is no time for a measurement, at the end of the epoch"
    learn = quiet_fit(dropout_and_batch_norm(), 4, [NoiseScale(share=share), Clock(monkeypatch)])
    assert learn.recorder.noise_scale.batch.tolist() == [30, 60, 90, 120] and learn.recorder.noise_scale.epoch.tolist() == [0, 1, 2, 3]


def test_at_least_once_in_the_shortest_epochs():
    X,y = digits()
    learn = Learner(loaders(list(zip(X[:40], y[:40]))), nn.Linear(64, 10), loss_func=CrossEntropyLossFlat())
    assert quiet_fit(learn, 3, [NoiseScale(share=1e-9)]).recorder.noise_scale.batch.tolist() == [2, 4, 6]


def test_every_wins_over_once_per_epoch():
    learn = quiet_fit(dropout_and_batch_norm(), 6, [NoiseScale(every=50, share=1e-9)])
    assert learn.recorder.noise_scale.batch.tolist() == [60, 120, 180]  # at the ends of epochs, 50 batches apart or more


def test_once_in_an_epoch_that_is_cut_short():
    from fastai.callback.training import ShortEpochCallback
    learn = quiet_fit(dropout_and_batch_norm(), 2, [NoiseScale(share=1e-9), ShortEpochCallback(.5)])
    stats = learn.recorder.noise_scale
    assert stats.epoch.tolist() == [0, 1] and stats.batch.iloc[-1] == learn.train_iter < 40


def test_once_in_an_epoch_of_windows_that_is_cut_short(monkeypatch):
    "As the one before it was"
    from fastai.callback.training import ShortEpochCallback
    def no_time(self, cost): self.seconds += 1e6
    monkeypatch.setattr(Schedule, 'spend', no_time)
    learn = quiet_fit(dropout_and_batch_norm(), 3, [AccumulateGrads(48), NoiseScale(), ShortEpochCallback(.5)])
    assert learn.recorder.noise_scale.epoch.tolist() == [0, 1, 2]


@pytest.mark.parametrize('n_acc,last', ((64, 28), (320, 20), (1000, 30)))
def test_once_per_epoch_with_windows(n_acc, last, monkeypatch):
    "The last full window of the epoch; the whole epoch where it is shorter"
    def no_time(self, cost): self.seconds += 1e6
    monkeypatch.setattr(Schedule, 'spend', no_time)
    learn = quiet_fit(dropout_and_batch_norm(), 3, [AccumulateGrads(n_acc), NoiseScale()])
    stats = learn.recorder.noise_scale
    assert stats.epoch.tolist() == [0, 1, 2] and stats.batch.iloc[-1] == 60 + last - 1  # before the window's last batch is counted


def test_once_per_epoch_leaves_no_trace():
    for cbs in ([], [partial(AccumulateGrads, 40)]):
        assert_no_trace(dropout_and_batch_norm, lambda learn, cbs_=cbs, cbs=(): quiet_fit(learn, 2, [*cbs, *(c() for c in cbs_)]), NoiseScale(share=1e-9))


class TwoAlike:
    "Two processes with the same data"
    size,rank = 2,0
    def sum(self, x): return 2*x
    def gather(self, x): return [x, x]


@pytest.mark.parametrize('kind', (OwnPass, Window, AllProcesses))
def test_a_collector_by_itself(kind):
    "Called by hand, three batches at the same weights: two collectors say what the paper does, and two processes with the same data have no noise"
    X,y = digits()
    set_seed(1)
    dl = DataLoader(list(zip(X[:48], y[:48])), bs=16)
    window = AccumulateGrads(48)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(64, 10), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1, cbs=[window]*(kind is Window))
    learn.create_opt()
    learn.model.train()
    learn.training,learn.train_iter,learn.n_iter = True,0,3
    tracker = SimpleNamespace(learn=learn, meter=OptMeter(learn.opt, .9), schedule=Schedule(every=1 if kind is AllProcesses else 3), processes=TwoAlike(), n_batch=3, rows=[], out_of_memory=False, error='', batch_loss=BatchLoss())
    def note(loss, parts=None):
        tracker.rows.append(float(loss))
        return tracker.meter.end(parts)
    tracker.note = note
    collector,grads = kind(tracker),[]
    tracker.schedule.begin_epoch()
    collector.begin_epoch()
    for learn.iter,b in enumerate(dl):
        learn._split(b)
        if kind is Window: window.count += 16
        else: learn.opt.zero_grad()
        learn.pred = learn.model(*learn.xb)
        learn.loss = learn.loss_func(learn.pred, *learn.yb)
        collector.before_backward()
        learn.loss.backward()
        collector.after_backward()
        grads.append([p.grad.clone() for p in learn.model.parameters()])
        if kind is Window and learn.iter == 2:
            for p in learn.model.parameters(): p.grad /= 3
        if kind is not Window or learn.iter == 2: collector.before_step()
        before = [p.grad.clone() for p in learn.model.parameters()]
        collector.after_batch()
        assert all(map(torch.equal, before, (p.grad for p in learn.model.parameters())))
    collector.end_epoch()
    collector.close()
    assert len(tracker.rows) == 1 and len(tracker.schedule.costs) == 1 and tracker.schedule.measured_in_epoch and not any(p._backward_hooks for p in learn.model.parameters())
    found = tracker.meter.simple.measured[-1]
    if kind is AllProcesses:  # the mean over two steps, which have as many comparisons as three batches
        assert found.noise == pytest.approx(0, abs=1e-5) and found.scale == pytest.approx(float(sum(g.square().sum() for gs in grads[:2] for g in gs))/2, rel=1e-4)
        return
    each = grads if kind is OwnPass else [grads[0], *([a - b for a,b in zip(g, f)] for f,g in zip(grads, grads[1:]))]
    assert (found.noise, found.scale) == pytest.approx(paper_estimate([torch.cat([g.flatten() for g in gs]).double() for gs in each], 16), rel=1e-3)
