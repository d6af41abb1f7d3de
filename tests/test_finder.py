"The mock training, its result and its errors"
import itertools, json, math, random, re, warnings
from collections import namedtuple
from copy import deepcopy
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.nn.parameter import is_lazy
from fastai.basics import (Adam, Callback, CancelBackwardException, CancelBatchException, CancelFitException, CancelStepException, DataLoader, OptimWrapper, SGD, accuracy)
from fastai.callback.all import (BnFreeze, CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixedPrecision, ParamScheduler, ReduceLROnPlateau, SaveModelCallback,
                                 SchedCos, ShowGraphCallback)

import fastai_bs_finder.finder as finder
from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from reference import ema, mlp_truth, mock_training

nan,inf = math.nan,math.inf


@pytest.fixture
def quiet():
    "A function: run `bs_find` with no bar and no words, the measurements alone, of ten batches each; returns the suggestion"
    def run(learn, lr=None, num_it=None, n_batch=10, *args, **kwargs):
        with learn.no_bar(), learn.no_logging(): return learn.bs_find(lr, num_it, n_batch, *args, **{'show_plot': False, 'profile': False, **kwargs})
    return run


class Spy(Callback):
    "Notes in `log` what happens at each batch; a list of the caller's, which no snapshot sees"
    order = -20   # before the finder, which ends the run after its last batch
    def __init__(self, log): self.log = partial(list.append, log)
    def after_batch(self): self.log(('batch', self.xb[0].clone(), self.yb[0].clone(), [p.detach().clone() for p in self.model.parameters()]))
    def after_step(self): self.log(('step',))


def as_double(learn):
    "In float64, and with batches of one size, as the paper's equations have them"
    learn.model.double()
    learn.dls.train.drop_last = True
    learn.dls.train.after_batch = lambda b: (b[0].double(), b[1])
    return learn


@pytest.mark.parametrize('opt_func,torch_opt', [
    (SGD, partial(torch.optim.SGD, lr=.1)),
    (partial(SGD, mom=.9), partial(torch.optim.SGD, lr=.1, momentum=.9)),
    (partial(OptimWrapper, opt=torch.optim.Adam), partial(torch.optim.Adam, lr=.003)),
    (partial(Adam, sqr_mom=.999, eps=1e-8, wd=0., decouple_wd=False), partial(torch.optim.Adam, lr=.003, betas=(.9, .999))),
])
def test_equals_the_second_implementation(quiet, opt_func, torch_opt):
    lr,n_batch,n_train,beta = torch_opt.keywords['lr'],7,4,.8
    learn,log = as_double(digits_learner(opt_func=opt_func)),[]
    learn.add_cb(Spy(log))
    model = deepcopy(learn.model)
    quiet(learn, lr, 88, n_batch, beta, n_train)
    batches = [(x, y) for kind,x,y,_ in [o for o in log if o[0] == 'batch']]
    pairs = mock_training(model, torch_opt(model.parameters()), learn.loss_func, batches, n_batch, n_train)
    stats = learn.recorder.bs_stats
    assert len(stats) == len(pairs) == 8
    np.testing.assert_allclose(stats[['raw_noise', 'raw_scale']], pairs, rtol=1e-5)
    np.testing.assert_allclose(stats[['noise', 'scale']], ema(pairs, beta), rtol=1e-5)
    np.testing.assert_allclose(stats.noise_scale, stats.noise/stats.scale, rtol=1e-12)


def test_float32_too(quiet):
    learn,log = digits_learner(),[]
    learn.add_cb(Spy(log))
    model = deepcopy(learn.model)
    quiet(learn, .1, 60, n_train=5)
    batches = [o[1:3] for o in log if o[0] == 'batch']
    pairs = mock_training(model, torch.optim.SGD(model.parameters(), lr=.1), learn.loss_func, batches, 10, 5)
    np.testing.assert_allclose(learn.recorder.bs_stats[['raw_noise', 'raw_scale']], pairs, rtol=1e-3)


def test_the_weights_stand_still_during_a_measurement(quiet):
    learn,log = digits_learner(),[]
    learn.add_cb(Spy(log))
    quiet(learn, .1, 41, n_batch=5, n_train=3)
    weights = [o[3][0] for o in log if o[0] == 'batch']
    moved = [not torch.equal(a, b) for a,b in zip(weights, weights[1:])]
    assert moved == [True]*2 + ([False]*4 + [True]*4)*4 + [False]*4 + [True]*2      # 3 steps, 5 at one place (the 5th steps), and again
    assert sum(o == ('step',) for o in log) == 5*4 + 1


def test_the_step_is_that_of_one_large_batch(quiet):
    learn,log = as_double(digits_learner()),[]
    learn.add_cb(Spy(log))
    before = deepcopy(learn.model)
    quiet(learn, .1, 10, n_batch=10)
    x,y = torch.cat([o[1] for o in log if o[0] == 'batch']),torch.cat([o[2] for o in log if o[0] == 'batch'])
    learn.loss_func(before(x), y).backward()   # fastai's loss works in float32
    for p,got in zip(before.parameters(), [o for o in log if o[0] == 'batch'][-1][3]): torch.testing.assert_close(got, p.detach() - .1*p.grad, rtol=0, atol=1e-9)


def test_stats(quiet):
    learn = digits_learner()
    sug = quiet(learn, .1, 100, n_batch=5, n_train=3)
    s = learn.recorder.bs_stats
    geometry = 'noise scale noise_scale lo hi raw_noise raw_scale'.split()
    assert list(s.columns) == ['batch', 'step', 'samples', 'loss', *geometry, *(f'opt_{c}' for c in geometry)]
    assert list(s.batch[:3]) == [8, 16, 24] and list(s.step[:3]) == [3, 7, 11] and list(s.samples[:3]) == [128, 256, 384]
    assert s.loss.iloc[0] > 2 and s.loss.iloc[-1] < 2.2
    assert s[['lo', 'hi']].isna().all(axis=1).tolist() == [True]*2 + [False]*(len(s) - 2)
    tail = s[2:]
    assert ((tail.lo <= tail.noise_scale) & (tail.noise_scale <= tail.hi)).all()
    assert learn.recorder.bs_result.suggested == dict(critical=sug.critical, fastest=None)


def test_the_loss_is_that_at_the_weights_of_the_measurement(quiet):
    learn,log = digits_learner(),[]
    learn.add_cb(Spy(log))
    model = deepcopy(learn.model)
    quiet(learn, .1, 10, n_batch=10)
    losses = [nn.functional.cross_entropy(model(o[1]), o[2]).item() for o in log if o[0] == 'batch']
    assert learn.recorder.bs_stats.loss[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_positional_order(quiet, monkeypatch):
    seen = {}
    init = finder.BSFinder.__init__
    def spy(self, *args, **kwargs): seen['args'] = args[:4]; init(self, *args, **kwargs)
    monkeypatch.setattr(finder.BSFinder, '__init__', spy)
    learn = digits_learner()
    quiet(learn, .05, 30, 6, .5)
    assert seen['args'][:3] == (30, 6, .5) and learn.recorder.bs_result.run.lr == .05


@pytest.mark.parametrize('num_it,batches', [(None, 200), (10, 10), (94, 94), (281, 281)])
def test_spends_the_budget(quiet, num_it, batches):
    learn,log = digits_learner(),[]
    learn.add_cb(Spy(log))
    quiet(learn, .1, num_it)
    assert sum(o[0] == 'batch' for o in log) == batches
    assert learn.recorder.bs_result.run.num_it == batches and not learn.recorder.bs_result.run.stopped
    assert len(learn.recorder.bs_stats) == {94: 4, 10: 1, 200: 9, 281: 13}[batches]


@pytest.mark.parametrize('bs,n_batch', [(16, 10), (64, 10), (250, 5), (500, 3), (750, 2)])
def test_a_measurement_stays_within_an_epoch(quiet, bs, n_batch):
    "Or else, with few batches in an epoch, the estimate would be far too low"
    learn = digits_learner(bs=bs)
    X,y = (torch.stack(t) for t in zip(*learn.dls.train.dataset))
    S,G2 = mlp_truth(learn.model, X, y)
    n_it,found = len(learn.dls.train),[]
    for seed in range(4):
        learn.dls.train.rng = random.Random(seed)
        quiet(learn, 0., max(3*n_it, 24), n_batch, n_train=0)
        stats = learn.recorder.bs_stats
        assert ((stats.batch - 1)//n_it == (stats.batch - n_batch)//n_it).all()
        found.append(stats.noise_scale.iloc[-1])
    assert np.mean(found) == pytest.approx(S/G2, rel=.15)


def test_training_goes_on_where_no_measurement_fits(quiet):
    learn = digits_learner()
    quiet(learn, .1, 188, n_train=0)                             # 9 measurements, then 4 batches up to the end of the epoch
    assert learn.recorder.bs_stats.step[[8, 9]].tolist() == [8, 13] and learn.recorder.bs_stats.batch[[8, 9]].tolist() == [90, 104]


def test_a_measurement_that_an_epoch_cuts_short_is_dropped(quiet):
    class Cancel(Callback):
        order = -20
        def before_batch(self):
            if 84 <= self.train_iter < 89: raise CancelBatchException
    learn = digits_learner(cbs=Cancel)
    quiet(learn, .1, 188, n_batch=10, n_train=0)                 # 80 to 93, the epoch's last, lack one batch for a measurement
    assert learn.recorder.bs_stats.batch[6:10].tolist() == [70, 80, 104, 114]


def test_cancelled_batches_do_not_stop_the_measuring(quiet):
    for at in (0, 20):
        class Cancel(Callback):
            order = -20
            def before_batch(self):
                if self.train_iter == at: raise CancelBatchException
        learn = digits_learner(cbs=Cancel)
        quiet(learn, .1, 188)
        assert len(learn.recorder.bs_stats) >= 9


def test_steps_are_those_that_were_taken(quiet):
    class NoStep(Callback):
        def before_step(self):
            if 10 <= self.train_iter < 15: raise CancelStepException
    learn = digits_learner(cbs=NoStep)
    quiet(learn, .1, 50)
    assert learn.recorder.bs_stats.step.tolist() == [0, 6, 17]


def test_batches_of_several_sizes(quiet):
    "The last batch of an epoch, of 12, is in the second measurement, and its loss counts less"
    learn = digits_learner()
    model = deepcopy(learn.model)
    quiet(learn, [.25], 94, n_batch=47, n_train=0)
    s = learn.recorder.bs_stats
    assert s.samples.tolist() == [47*16, 1500] and learn.recorder.bs_result.run.bs == 16 and learn.recorder.bs_result.run.lr == .25
    learn.dls.loaders[0] = learn.dls.train.new(learn.dls.train.dataset[:28], shuffle=False)
    quiet(learn, 0., 2, n_batch=2)
    X,y = (torch.stack(t) for t in zip(*learn.dls.train.dataset))
    assert learn.recorder.bs_stats.loss[0] == pytest.approx(learn.loss_func(model(X), y).item(), rel=1e-5) and learn.recorder.bs_result.run.bs == 16


def test_examples_are_counted_in_training_stretches_too(quiet):
    learn = digits_learner()
    quiet(learn, .1, 120)
    assert learn.recorder.bs_stats.samples.iloc[-1] == 16*learn.recorder.bs_stats.batch.iloc[-1] - 4 > 1500   # the epoch's last batch has 12


def test_lr_is_that_of_the_first_measurement(quiet):
    learn = digits_learner(cbs=ParamScheduler({'lr': SchedCos(.2, 0.)}))
    quiet(learn, .1, 79)
    assert learn.recorder.bs_result.run.lr == pytest.approx(.2, rel=.05)


def test_a_target_that_a_callback_makes(quiet):
    class Autoencoder(Callback):
        def before_batch(self): self.learn.yb = self.xb
    learn = digits_learner(cbs=Autoencoder, loss_func=nn.MSELoss())
    learn.model = nn.Linear(64, 64)
    no_target(learn)
    quiet(learn, .1, 60)
    assert len(learn.recorder.bs_stats) == 3


def test_a_callback_that_runs_backward_itself(quiet):
    class Own(Callback):
        def before_backward(self):
            self.learn.loss_grad.backward()
            raise CancelBackwardException
    res = []
    for cbs in (None, Own):
        learn = digits_learner(cbs=cbs)
        quiet(learn, .1, 60)
        res.append(learn.recorder.bs_stats)
    pd.testing.assert_frame_equal(*res)


@pytest.mark.parametrize('poison,why', [(lambda p: p.grad.fill_(nan), 'the gradients are not finite'), (lambda p: setattr(p, 'grad', None), 'no batch gave a gradient')])
def test_a_run_without_gradients_says_why(capsys, poison, why):
    class Poison(Callback):
        order = -20
        def after_backward(self):
            for p in self.model.parameters(): poison(p)
    assert digits_learner(cbs=Poison).bs_find(.1, 40, 10) == (None, None)
    assert re.search(rf'No measurement of \d+ batches was completed: {why}\.', capsys.readouterr().out)


def test_a_loss_that_is_not_finite_between_measurements(capsys):
    learn = digits_learner()
    learn.bs_find(1e20, 20, show_plot=False)
    said = capsys.readouterr().out
    assert re.search(r'Lower lr, then ask again: the loss was not finite after \d+ of 20 batches', said) and 'Train with' not in said


def test_a_negative_loss_may_fall(capsys):
    learn = digits_learner(loss_func=lambda p,t: nn.functional.cross_entropy(p, t) - 5)
    learn.bs_find(.1, 94, show_plot=False, profile=False)  # with times it depends on the machine whether a larger one is faster
    said = capsys.readouterr().out
    assert 'training loss rose' not in said and 'Train with bs=' in said.replace('try bs', 'Train with bs')


def test_a_suggestion_that_fails_loses_no_measurement(quiet):
    learn = digits_learner()
    def broken(stats): return 1/0
    with pytest.raises(ZeroDivisionError): quiet(learn, .1, 40, suggest_funcs=broken)
    assert len(learn.recorder.bs_stats) == 2 and learn.recorder.plot_bs_find()
    def words(stats): return 'many'
    assert quiet(learn, .1, 40, suggest_funcs=words, show_plot=True).words == 'many'


def test_the_bar_ends_however_the_run_ends(monkeypatch):
    ended = []
    class Bar:
        comment,last_v = '',0
        def __init__(self, *args, **kwargs): pass
        def update(self, val): self.last_v = val
        def on_interrupt(self): ended.append('interrupt')
        def on_iter_end(self): ended.append('end')
    monkeypatch.setattr('fastai.callback.progress.progress_bar', Bar)
    class End(Callback):
        def after_batch(self): raise CancelFitException
    class Fail(Callback):
        def after_batch(self): raise KeyboardInterrupt
    for cb in (End, Fail):
        learn = digits_learner(cbs=cb)
        with learn.no_logging():
            try: learn.bs_find(.1, 40)
            except KeyboardInterrupt: pass
    assert ended == ['end', 'interrupt']


def test_no_validation(quiet):
    learn = digits_learner(metrics=accuracy)
    class NoValid(Callback):
        def after_pred(self): assert self.training
    learn.add_cb(NoValid())
    quiet(learn, .1, 200)


@pytest.mark.parametrize('lr,used', [(None, [.02, .02]), (.1, [.1, .1]), (slice(.01, .1), [.01, .1]), (slice(.1), [.01, .1]), ([.3, .4], [.3, .4]), (np.float32(.5), [.5, .5])])
def test_lr_as_in_fit(quiet, lr, used):
    learn,seen = digits_learner(lr=.02, splitter=lambda m: [list(m[0].parameters()), list(m[2].parameters())]),[]
    class NoteLr(Callback):
        def before_step(self, note=seen.append): note([h['lr'] for h in self.opt.hypers])
    learn.add_cb(NoteLr())
    quiet(learn, lr, 20)
    np.testing.assert_allclose(seen, [used]*len(seen), rtol=1e-6)
    assert learn.recorder.bs_result.run.lr == pytest.approx(used[-1])


def test_frozen_parameters_are_left_out(quiet):
    res = []
    for freeze in (False, True):
        learn = digits_learner()
        if freeze: learn.model[0].requires_grad_(False)
        quiet(learn, 0., 60)
        res.append(learn.recorder.bs_stats.raw_noise.sum())
    assert res[1] < .9*res[0]


def test_gradients_are_taken_before_clipping(quiet):
    res = []
    for cbs in (None, GradientClip(1e-3)):
        learn = digits_learner(cbs=cbs)
        quiet(learn, 0., 40)
        res.append(learn.recorder.bs_stats)
    pd.testing.assert_frame_equal(*res)


def test_accumulation_is_set_aside(quiet):
    res = []
    for cbs in (None, GradientAccumulation(64)):
        learn = digits_learner(cbs=cbs)
        quiet(learn, .1, 60)
        res.append(learn.recorder.bs_stats)
    pd.testing.assert_frame_equal(*res)
    assert hasattr(learn, 'gradient_accumulation') and learn.gradient_accumulation in learn.cbs


def test_trackers_and_loggers_stand_aside(quiet, tmp_path):
    learn = digits_learner(path=tmp_path, cbs=[SaveModelCallback(), EarlyStoppingCallback(), ReduceLROnPlateau(), CSVLogger(), ShowGraphCallback()])
    (tmp_path/'history.csv').write_text('mine')
    with learn.no_logging(): learn.bs_find(.1, 200, show_plot=False)
    assert [p.name for p in tmp_path.rglob('*')] == ['history.csv'] and (tmp_path/'history.csv').read_text() == 'mine'
    assert not hasattr(learn, 'lr_finder')


class Overflow(Callback):
    "An infinite gradient at the fourth batch"
    order = -20
    def after_backward(self):
        if self.train_iter == 3: next(self.model.parameters()).grad[0, 0] = math.inf


def test_a_batch_whose_gradient_is_not_finite_is_left_out(quiet):
    learn = digits_learner(cbs=Overflow)
    quiet(learn, .1, 60)
    s = learn.recorder.bs_stats
    assert s.batch[0] == 11 and s.samples[0] == 176 and np.isfinite(s.drop(columns=['lo', 'hi', 'opt_lo', 'opt_hi'])).all(axis=None)


@pytest.fixture
def as_on_a_gpu(monkeypatch): monkeypatch.setattr(finder.BSFinder, '_on_cpu', False)


def test_on_a_gpu_the_whole_measurement_is_left_out(quiet, as_on_a_gpu):
    "Nothing is looked at before a measurement is complete"
    learn = digits_learner(cbs=Overflow)
    quiet(learn, .1, 60)
    s = learn.recorder.bs_stats
    assert s.batch.tolist() == [30, 50] and s.step.tolist() == [10, 21] and np.isfinite(s.noise).all()


def test_on_a_gpu_the_loss_is_checked_once_in_a_while(capsys, as_on_a_gpu):
    learn = digits_learner()
    learn.bs_find(1e20, 60, 10, show_plot=False)
    assert 'the loss was not finite after 20 of 60 batches' in capsys.readouterr().out


@pytest.mark.parametrize('at,why', [(2, 'Look for missing'), (12, 'Lower lr'), (42, 'Lower lr')])
def test_on_a_gpu_a_loss_that_is_not_finite_stops_after_its_measurement(capsys, as_on_a_gpu, at, why):
    "Whichever of its batches it is; in training, the next look sees it"
    class Spoil(Callback):
        def after_loss(self):
            if self.train_iter == at: self.learn.loss_grad = self.learn.loss = self.loss_grad*nan
    digits_learner(cbs=Spoil()).bs_find(.1, 60, 10, show_plot=False)
    said = capsys.readouterr().out
    assert why in said and (at == 2 or re.search(r'the loss was not finite after \d+ of 60 batches', said))


class Scaling(MixedPrecision):
    "fastai's loss scaling, without autocast and on the CPU"
    def before_fit(self): self.learn.scaler,self.scales,self.autocast = torch.amp.GradScaler('cpu', **self.kwargs),[],torch.autocast('cpu', enabled=False)


@pytest.mark.parametrize('overflow', [[], [Overflow]])
def test_loss_scaling(quiet, overflow):
    learn,scaled = digits_learner(cbs=overflow),digits_learner(cbs=[*overflow, Scaling()])
    scales = []
    scaled.add_cb(Callback(after_batch=lambda cb=None: scales.append(scaled.scaler.get_scale())))
    quiet(learn, .1, 60)
    quiet(scaled, .1, 60)
    a,b = learn.recorder.bs_stats,scaled.recorder.bs_stats
    assert (a.batch == b.batch).all() and (a.step == b.step).all() and a.batch[0] == (11 if overflow else 10)
    np.testing.assert_allclose(a[['noise', 'scale', 'loss']], b[['noise', 'scale', 'loss']], rtol=1e-3)
    assert set(scales[3:]) == {2.**15 if overflow else 2.**16}   # the scaler saw the overflow, and nothing else


def test_a_scaler_left_from_earlier_training_is_not_used(quiet):
    learn,other = digits_learner(),digits_learner()
    other.scaler = torch.amp.GradScaler('cpu', init_scale=2.**16)
    quiet(learn, .1, 60)
    quiet(other, .1, 60)
    pd.testing.assert_frame_equal(learn.recorder.bs_stats, other.recorder.bs_stats)


def test_cancelled_backward_and_batches_do_not_count(quiet):
    class Cancel(Callback):
        def before_backward(self):
            if self.train_iter == 2: raise CancelBackwardException
        def before_batch(self):
            if self.train_iter == 5: raise CancelBatchException
    learn = digits_learner(cbs=Cancel())
    quiet(learn, .1, 40)
    assert learn.recorder.bs_stats.batch[0] == 12


def test_stops_where_the_loss_is_not_finite(capsys):
    class Explode(Callback):
        def after_loss(self):
            if self.train_iter == 45: self.learn.loss_grad = self.learn.loss_grad*math.nan; self.learn.loss = self.loss*math.nan
    learn = digits_learner(cbs=Explode())
    sug = learn.bs_find(.1, 200, 10, show_plot=False, regret=0)
    said = capsys.readouterr().out
    assert re.search(r'Lower lr, then ask again: the loss was not finite after \d+ of 200 batches', said)
    assert len(learn.recorder.bs_stats) == 2 and sug.critical


def test_nothing_but_nan(capsys):
    learn = digits_learner(loss_func=lambda p,t: (p*math.nan).sum())
    assert learn.bs_find(.1, 40) == (None, None)
    said = capsys.readouterr().out
    assert 'Look for missing or infinite values in the data: the loss was not finite' in said and re.search(r'No measurement of \d+ batches was completed', said)
    assert len(learn.recorder.bs_stats) == 0


def test_a_callback_may_end_the_run(capsys):
    class End(Callback):
        def after_batch(self):
            if self.train_iter == 65: raise CancelFitException
    learn = digits_learner(cbs=End())
    assert learn.bs_find(.1, 200, show_plot=False, regret=0).critical
    assert 'A callback, or the end of the data, ended the training after' in capsys.readouterr().out


def test_same_seed_same_numbers(quiet):
    learn = digits_learner()
    quiet(learn, .1, 100)
    first = learn.recorder.bs_stats
    quiet(learn, .1, 100)
    pd.testing.assert_frame_equal(first, learn.recorder.bs_stats)


# The result

def test_named_tuple_and_suggest_funcs(quiet):
    learn = digits_learner()
    def half(stats): return int(stats.noise_scale.iloc[-1]/2)
    sug = quiet(learn, .1, 100, suggest_funcs=(critical, half, partial(average)))
    assert type(sug).__name__ == 'SuggestedBS' and sug._fields == ('critical', 'half', 'average')
    assert sug.half == int(learn.recorder.bs_stats.noise_scale.iloc[-1]/2)
    assert quiet(learn, .1, 100, suggest_funcs=average)._fields == ('average',)
    assert quiet(learn, .1, 100)._fields == ('critical', 'fastest')
    assert BSSuggestion.Critical is critical


def test_a_diverging_training_is_no_place_to_measure(capsys):
    learn = digits_learner()
    learn.bs_find(100., 300, show_plot=False)
    assert re.search(r'\rLower lr, then ask again: the training loss rose from 2\.\d+ to \S+, at lr=1e\+02\.', capsys.readouterr().out)


def test_advice_is_for_trainings(capsys):
    digits_learner().bs_find(0., 300, show_plot=False)
    assert re.search(r'nothing was trained with lr=0, .*\nThe noise scale is (.|\n)*at\s+lr=0\.', said := capsys.readouterr().out) and 'epochs' not in said


def test_what_lr_find_returns(quiet):
    learn,found = digits_learner(),namedtuple('SuggestedLRs', 'valley')(torch.tensor(.1))
    quiet(learn, found, 100)
    assert learn.recorder.bs_result.run.lr_given == pytest.approx(.1) and learn.recorder.bs_table.loc[32, 'lr'] > .1


def test_round_bs_is_the_nearest():
    cands = sorted({2**e for e in range(20)} | {3*2**e for e in range(20)})
    for x in np.geomspace(1, 2e5, 500): assert round_bs(x) == min(cands, key=lambda c: abs(math.log(c) - math.log(x)))


def test_silent_without_a_logger(quiet, capsys):
    quiet(digits_learner(), .1, 40)
    assert capsys.readouterr().out == ''


def test_progress_bar(capsys):
    learn = digits_learner()
    learn.bs_find(.1, 300, show_plot=False, regret=0)
    shown = capsys.readouterr().out
    assert '[300/300' in shown and re.search(r'noise scale \d+\]', shown) and 'Epoch' not in shown


# Streams

def endless(n=None):
    "A loader without a length, over `n` digits, or over all of them again and again"
    data = digits_learner().dls.train.dataset
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(data[:n]) if n else itertools.cycle(data)
    return DataLoader(Stream(), bs=16)


@pytest.mark.parametrize('n,measured_at', [(None, [20, 40, 60, 80, 100]), (16*24, [20, 40, 60, 82]), (16*9, [])])
def test_a_stream_is_read_as_often_as_it_takes(capsys, n, measured_at):
    "A measurement stays within one pass here too"
    learn = digits_learner()
    learn.dls.loaders[0] = endless(n)
    learn.bs_find(.1, 100, 10, show_plot=False, regret=0)
    assert learn.recorder.bs_stats.batch.tolist() == measured_at and learn.recorder.bs_result.run.n is None
    assert ('cut each one short' in capsys.readouterr().out) == (not measured_at)


def test_a_stream_that_has_nothing_to_give(capsys):
    learn = digits_learner()
    learn.dls.loaders[0] = DataLoader(type('Nothing', (torch.utils.data.IterableDataset,), dict(__iter__=lambda self: iter(())))(), bs=16)
    assert learn.bs_find(.1, 100) == (None, None)
    assert 'ended the training after 0 of 100 batches' in capsys.readouterr().out


@pytest.mark.parametrize('n', [None, 16*24])
def test_a_stream_has_a_bound_of_its_own(quiet, n):
    learn = digits_learner()
    learn.dls.loaders[0] = endless(n)
    quiet(learn)
    assert learn.recorder.bs_result.run.num_it == learn.recorder.bs_result.run.spent == 200


# What counts as an example, a step and a learning rate

def test_targets_that_are_no_tensors_are_counted_by_the_inputs(quiet, capsys):
    res = []
    for as_words in (False, True):
        learn = digits_learner(loss_func=lambda p,t: nn.functional.cross_entropy(p, torch.tensor([int(o) for o in t])))
        learn.dls.train.after_batch = lambda b: (b[0], [str(int(o)) for o in b[1]] if as_words else b[1])
        quiet(learn, .1, 60)
        res.append(learn.recorder.bs_stats)
    pd.testing.assert_frame_equal(*res)
    learn.dls.train.after_batch = lambda b: (json.dumps(b[0].tolist()), '?')
    learn.model.forward = lambda x: nn.Sequential.forward(learn.model, torch.tensor(json.loads(x)))
    learn.loss_func = lambda p,t: p.mean()
    with pytest.raises(ValueError, match='The examples of a batch cannot be counted'): quiet(learn, .1, 60)


def test_a_step_that_a_scheduler_wrapped(quiet):
    learn = digits_learner(opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    learn.create_opt()
    torch.optim.lr_scheduler.ConstantLR(learn.opt.opt, .5)
    quiet(learn, .1, 40)
    assert len(learn.recorder.bs_stats) == 2


@pytest.mark.parametrize('lr', [np.array([.1]), np.float64(.1), torch.tensor(.1), torch.tensor([.1]), pd.Series([.1])])
def test_lr_as_an_array(quiet, lr):
    learn = digits_learner()
    quiet(learn, lr, 20)
    assert learn.recorder.bs_result.run.lr == pytest.approx(.1)


# Batch-norm

@pytest.mark.parametrize('norm,bs,frozen,said', [(nn.BatchNorm1d, 16, False, True), (nn.BatchNorm1d, 32, False, False), (nn.LayerNorm, 16, False, False), (nn.BatchNorm1d, 16, True, False)])
def test_batch_norm_in_small_batches_is_said(capsys, norm, bs, frozen, said):
    learn = digits_learner(bs=bs, cbs=BnFreeze() if frozen else None)
    learn.model = nn.Sequential(nn.Linear(64, 32), norm(32), nn.ReLU(), nn.Linear(32, 10)).requires_grad_(not frozen)
    learn.model[-1].requires_grad_(True)
    learn.bs_find(.1, 94 if bs == 16 else 47, show_plot=False)
    assert (f'With batch-norm this noise scale holds for bs={bs}, and larger batches can give a larger one' in capsys.readouterr().out) == said


# Errors

def no_target(learn): learn.dls.train.after_batch = lambda b: (b[0],)

@pytest.mark.parametrize('kwargs,change,msg', [
    (dict(n_batch=1), None, r'n_batch=1 is not a whole number of 2 or more'),
    (dict(n_batch=2.5), None, r'n_batch=2.5 is not a whole number'),
    (dict(n_train=-1), None, r'n_train=-1 is not a whole number of 0 or more'),
    (dict(num_it=5, n_batch=10), None, r'num_it=5 is less than one measurement of n_batch=10 batches: raise num_it to 10 or more'),
    (dict(num_it=3), None, r'num_it=3 is less than one measurement of n_batch=4 batches: raise num_it to 4 or more'),
    (dict(num_it=0), None, r'num_it=0 is not a whole number'),
    (dict(num_it='all'), None, r"num_it='all' is not a whole number"),
    (dict(n_batch=100), None, r'n_batch=100 is more than the 94 batches of an epoch'),
    (dict(beta=1), None, r'beta=1 is not in \[0, 1\)'),
    (dict(beta=-.1), None, r'beta=-0.1 is not in \[0, 1\)'),
    (dict(beta=nan), None, r'beta=nan is not in \[0, 1\)'),
    (dict(beta='x'), None, r"beta='x' is not a number"),
    (dict(lr=-.1), None, r'lr=-0.1 is not a learning rate: give a finite number of 0 or more'),
    (dict(lr=inf), None, r'lr=inf is not a learning rate'),
    (dict(lr=[.1, nan]), None, r'lr=\[0.1, nan\] is not a learning rate'),
    (dict(lr=slice(None, -1.)), None, r'lr=slice\(None, -1.0, None\) is not a learning rate'),
    (dict(lr=slice(.1, None)), None, r'is not a learning rate'),
    (dict(lr=namedtuple('SuggestedLRs', 'minimum valley')(.01, .1)), None, r'are 2 suggestions: take one of them, such as \.minimum'),
    (dict(lr='0.1'), None, r"lr='0.1' is not a learning rate"),
    (dict(suggest_funcs=lambda stats: 3), None, r'suggest_funcs are called <lambda>: .* a name of its own'),
    (dict(suggest_funcs=(critical, partial(critical))), None, r'suggest_funcs are called critical, critical'),
    ({}, lambda l: l.dls.loaders.__setitem__(0, DataLoader([], bs=16)), r'training loader has no data, as that of a learner that was exported and loaded: give the learner some, learn.dls = dls'),
    ({}, lambda l: l.dls.loaders.__setitem__(0, l.dls.train.new(bs=2000, drop_last=True)), r'empty: 1500 examples make no batch of bs=2000 with drop_last=True. Lower bs'),
    ({}, no_target, r'training loader yields no target'),
    ({}, lambda l: l.model.requires_grad_(False), r'no trainable parameters'),
    (dict(n_batch=10, num_it=30), lambda l: setattr(l.dls.train, 'bs', 500), r'n_batch=10 is more than the 3 batches of an epoch, and a measurement has to fit into one epoch: lower n_batch to 3'),
    ({}, lambda l: setattr(l, 'model', nn.Sequential(nn.LazyLinear(10))), r'lazy layers'),
    ({}, lambda l: l.remove_cb(l.recorder), r'no Recorder'),
    ({}, lambda l: setattr(l, 'loss_func', None), r"loss_func is None: set learn.loss_func"),
    (dict(regret=-.1), None, r'regret=-0.1 is not a share of the time: give a number of 0 or more'),
    (dict(regret=nan), None, r'regret=nan is not a share of the time'),
    (dict(regret=True), None, r'regret=True is not a share of the time'),
    (dict(regret='10%'), None, r"regret='10%' is not a share of the time"),
    (dict(regret=None), None, r'regret=None is not a share of the time'),
    (dict(n_epoch=0), None, r'n_epoch=0 is not a whole number of 1 or more'),
    (dict(n_epoch=2.5), None, r'n_epoch=2.5 is not a whole number'),
    (dict(n_epoch=None), None, r'n_epoch=None is not a whole number'),
    (dict(lr=[.1, .2]), None, r'lr=\[0.1, 0.2\] has 2 values, but the optimizer has 1 parameter group: give one value, a slice, or as many as groups'),
    ({}, lambda l: setattr(l, 'opt_func', partial(OptimWrapper, opt=torch.optim.LBFGS)), r"LBFGS.step\(\) needs a closure, and fastai's fit gives it none: choose another optimizer"),
])
def test_errors(kwargs, change, msg):
    learn = digits_learner()
    if change: change(learn)
    state,weights = dict(vars(learn)),deepcopy(learn.model.state_dict())
    rng,cbs = learn.dls.train.rng.getstate(),list(learn.cbs)
    with pytest.raises(ValueError, match=msg) as e: learn.bs_find(**kwargs)
    assert '\n' not in str(e.value)
    assert vars(learn) == state and list(learn.cbs) == cbs and learn.dls.train.rng.getstate() == rng and learn.opt is None
    for k,v in learn.model.state_dict().items(): assert is_lazy(v) or torch.equal(v, weights[k])


def test_an_error_keeps_the_last_result(quiet):
    learn = digits_learner()
    quiet(learn, .1, 40)
    stats = learn.recorder.bs_stats
    with pytest.raises(ValueError): learn.bs_find(n_batch=0)
    learn.model[0].forward = lambda x: 1/0
    with pytest.raises(ZeroDivisionError): quiet(learn, .1, 40)
    assert learn.recorder.bs_stats is stats
