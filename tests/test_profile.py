"Training steps at other batch sizes: their time by a clock that the test turns, and what remains of them"
import dataclasses, math, pickle, re, time

import numpy as np, pytest, torch
from torch.utils import data as torch_data
from fastai.basics import Callback, CancelEpochException
from fastai.callback.data import WeightedDL
from fastai.tabular.core import TabWeightedDL
from fastcore.imports import noop

from fastai_bs_finder import finder, memory, mock, profile as profile_room
from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.loaders import draw_few
from fastai_bs_finder.mock import mock_training, run_steps
from fastai_bs_finder.predict import StepTime
from fastai_bs_finder.profile import profile_steps
from fastai_bs_finder.result import Profile
from footprint import assert_no_footprint, changes, state
from learners import maker
from results import result


class Clock:
    "`time.perf_counter`, that only moves when it is told to"
    now = 0.
    def perf_counter(self): return Clock.now


class Takes(Callback):
    "Turns the clock by `overhead` and `cost` per example at every batch, and notes the sizes in `log`"
    def __init__(self, overhead, cost, log=None): self.overhead,self.cost,self.log = overhead,cost,(log if log is not None else []).append
    def after_pred(self):
        Clock.now += self.overhead + self.cost*len(self.yb[0])
        self.log(len(self.yb[0]))


@pytest.fixture
def clock(monkeypatch):
    Clock.now = 0.
    for room in (finder, memory, mock, profile_room): monkeypatch.setattr(room, 'time', Clock())


def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return learn.bs_find(*args, show_plot=False, **kwargs)


def test_the_profile_measures_what_steps_take(clock):
    learn = digits_learner(cbs=Takes(.01, .001))
    with mock_training(learn): found = profile_steps(learn, [16, 64, 4, 256], 100.)
    seconds = found.step_time
    assert not found.trouble and found.failed is found.max_bs is None and seconds == pytest.approx({b: .01 + .001*b for b in (4, 16, 64, 256)})
    t = StepTime(seconds)
    assert (t.overhead, t.cost, t(1000), t.half_throughput) == pytest.approx((.01, .001, 1.01, 10))


def test_one_clock_times_the_size_in_use_and_others():
    "On a real clock: sizes that take the same are found to take the same, whether the mock training's own steps were timed or others"
    class Sleep(Callback):
        def after_pred(self): time.sleep(.02)
    learn = digits_learner(cbs=Sleep)
    quiet(learn, .1, 60, profile=5.)
    found = learn.recorder.bs_result.profile.step_time
    assert set(found) >= {16, 64} and found[16] == pytest.approx(found[64], rel=.1) == pytest.approx(.02, rel=.25)


def test_a_busy_machine_does_not_make_small_batches_slower_than_large_ones(clock):
    class Busy(Callback):
        def after_pred(self): Clock.now += .1*(len(self.yb[0]) == 16)
    learn = digits_learner(cbs=[Takes(.01, .001), Busy])
    with mock_training(learn): found = profile_steps(learn, [16, 64], 100.)
    assert found.step_time == pytest.approx({16: .074, 64: .074})


@pytest.mark.parametrize('share', [.2, .5, 1.])
def test_the_share_of_the_time_is_kept(clock, share):
    log,learn = [],digits_learner(cbs=Takes(.01, 1e-4))
    learn.cbs[-1].log = log.append
    quiet(learn, .1, 400, profile=share, regret=0, race=False)
    measuring = sum(.01 + 1e-4*b for b in log[:400])
    profile = Clock.now - measuring
    found = learn.recorder.bs_result
    assert 0 < profile <= share*measuring + (.01 + 1e-4*512)
    assert found.suggested['fastest'] in found.profile.step_time   # the answer itself was timed
    assert len(found.profile.timings) > 1 and all(len(v) >= (7 if share == 1 else 3) for v in found.profile.timings.values())   # with time for it, until eight steps agree, of which the first warms up


def test_profile_false_takes_no_step_more(clock):
    log,learn = [],digits_learner()
    learn.add_cb(Takes(.01, 1e-4, log))
    sug = quiet(learn, .1, 200, profile=False)
    assert len(log) == 200 and sug.fastest is None and learn.recorder.bs_table.time.isna().all()
    assert learn.recorder.bs_result.profile == Profile()


def test_a_run_too_short_says_so(clock):
    learn = digits_learner(cbs=Takes(.01, 1e-4))
    assert quiet(learn, .1, 60, profile=.01).fastest is None
    assert 'there was no time to try them' in str(learn.recorder.bs_result)


@pytest.mark.parametrize('profile,asked', [(.03, False), (1., True)])
def test_times_that_are_the_same_by_chance_do_not_make_the_training_set_the_fastest_batch(clock, profile, asked):
    "Sizes are tried by steps of four times at most, and what was not tried is not suggested"
    class Busy(Callback):
        def after_pred(self): Clock.now += .02*(len(self.yb[0]) == 4)
    log = []
    learn = digits_learner(cbs=[Takes(.01, 3e-4, log), Busy])
    sug = quiet(learn, .1, 400, 10, profile=profile, regret=0, race=False, n_epoch=30)
    found = learn.recorder.bs_result
    timed = list(found.profile.step_time)
    assert (sug.fastest or 0) <= timed[-1] and all(b <= 4*a for a,b in zip(timed, timed[1:])) and (64 in timed) == asked
    assert ('there was no time to try them' in str(found)) != asked


@pytest.mark.parametrize('profile', ['yes', -1, math.nan, math.inf, None])
def test_bad_shares(profile):
    with pytest.raises(ValueError, match=r'profile=.* is not True, False or a share'): quiet(digits_learner(), .1, 40, profile=profile)


class Stubborn(torch_data.Dataset):
    def __init__(self, batches): self.batches = batches
    def __len__(self): return len(self.batches)
    def __getitem__(self, i): return self.batches[i]


def test_a_loader_that_does_not_listen_is_said():
    learn = digits_learner(bs=50)
    batches = list(learn.dls.train)
    learn.dls.loaders[0] = torch_data.DataLoader(Stubborn(batches), batch_size=None, shuffle=True)
    learn.dls.loaders[0].n_inp = 1
    assert quiet(learn, .1, 120, n_batch=5, profile=5.).critical and learn.recorder.bs_result.run.bs == 50
    assert 'the training loader does not take another batch size' in str(learn.recorder.bs_result)


@pytest.mark.parametrize('name', ['text: language_model_learner', 'text: text_classifier_learner', 'tabular: TabularDataLoaders, embeddings', 'plain PyTorch: model and loaders', 'a stream without a length, fastai loader'])
def test_other_batch_sizes_of_every_loader(name, fastai_data):
    learn = maker(name, fastai_data)[0]()
    before,bs = state(learn),8
    with mock_training(learn): sizes = run_steps(learn, bs//2, lambda seconds: len(seconds) == 3).sizes + run_steps(learn, bs*2, lambda seconds: len(seconds) == 3).sizes
    assert sizes == [bs//2]*3 + [bs*2]*3
    assert changes(before, state(learn)) == []


class OutOfMemory(Callback):
    def __init__(self, most): self.most = most
    def before_batch(self):
        if self.training and len(self.yb[0]) > self.most: raise torch.OutOfMemoryError(f"no memory for {len(self.yb[0])} examples")


def test_out_of_memory_in_the_profile_is_no_accident():
    def find(learn): return learn.bs_find(.1, 300, show_plot=False, profile=1.)
    make = lambda: digits_learner(cbs=OutOfMemory(40))
    assert_no_footprint(make, find, lambda learn: learn.fit(1, .1))
    learn = make()
    assert find(learn).critical <= 63 and max(learn.recorder.bs_result.profile.step_time) <= 40
    table = learn.recorder.bs_table
    assert table.fits[64].startswith('accumulate') and table.fits[32] == 'yes'
    with learn.no_bar(): assert learn.max_bs() < 64


class Sixteen(torch.nn.Module):
    "A model for batches of 16 only"
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
    def forward(self, x): return self.layer(x.view(16, 64))


def test_a_model_for_one_batch_size_keeps_its_measurements():
    learn = digits_learner()
    learn.model,learn.dls.train.drop_last = Sixteen(),True
    assert quiet(learn, .1, 300, profile=1.).critical
    assert re.search(r'Only batches of 16 examples work here, other sizes fail \(shape', str(learn.recorder.bs_result))


class EndsEpochs(Callback):
    order = 0
    def __init__(self, after): self.after,self.seen = after,0
    def after_batch(self):
        self.seen += 1
        if self.seen >= self.after: raise CancelEpochException("enough")


def test_epochs_that_never_get_to_a_step_end():
    assert quiet(digits_learner(cbs=EndsEpochs(100)), .1, 200, regret=0).fastest is None
    with pytest.raises(ValueError, match='does not make batches of another size'): digits_learner(cbs=EndsEpochs(1)).max_bs()


def test_learning_rate_zero():
    learn = digits_learner()
    assert quiet(learn, 0., 300).critical
    s = learn.recorder.bs_stats
    assert s.opt_noise_scale.iloc[-1] == pytest.approx(s.noise_scale.iloc[-1])


def test_drawing_few_survives_a_worker_process():
    learn = digits_learner()
    with mock_training(learn):
        run_steps(learn, 32, lambda seconds: len(seconds) == 2)
        dl = pickle.loads(pickle.dumps(learn.dls.train))
        idxs = dl.get_idxs()
    assert len(idxs) == len(set(idxs)) == 40*32 and 'get_idxs' not in vars(learn.dls.train)


@pytest.mark.parametrize('cls', [WeightedDL, TabWeightedDL], ids=lambda c: c.__name__)
def test_a_loader_with_weights_draws_few(cls):
    weights = np.arange(1000) % 2
    dl = cls(list(range(1000)), bs=4, wgts=weights, shuffle=True, after_batch=noop)
    draw_few(dl)
    idxs = dl.get_idxs()
    assert len(idxs) == 40*4 and weights[idxs].all() and all(type(i) is int for i in idxs)


class Fails(Callback):
    def before_batch(self):
        if len(self.yb[0]) > 16: raise KeyboardInterrupt


def test_an_interrupt_in_the_profile_leaves_nothing():
    learn = digits_learner(cbs=Fails)
    before = state(learn)
    with pytest.raises(KeyboardInterrupt): learn.bs_find(.1, 300, show_plot=False, profile=1.)
    assert changes(before, state(learn)) == [] and learn.dls.train.bs == 16 and not hasattr(learn.recorder, 'bs_stats')


def test_step_time_between_and_beyond():
    t = StepTime({64: 1., 16: 1., 256: 1.})
    assert t(1) == t(100) == t(10_000) == pytest.approx(1.) and t.half_throughput == math.inf
    t = StepTime({16: .5, 64: 2.})
    assert t(32) == pytest.approx(1.) and t(640) == pytest.approx(20.)
    assert StepTime({16: .5})(16) == pytest.approx(.5)


def test_a_size_that_was_slow_by_chance_is_timed_once_more(monkeypatch):
    "Else the machine's worst moment would decide; sizes far from the fastest are not worth it"
    rounds,slow = [],{512: 1.3}
    def timed(learn, sizes, budget, known):
        rounds.append(list(sizes))
        found = {b: min((1 + b/500)*slow.get(b, 1), known.step_time.get(b, math.inf)) for b in sizes}
        for b in sizes: slow.pop(b, None)
        return dataclasses.replace(known, step_time=known.step_time | found)
    monkeypatch.setattr(finder, 'profile_steps', timed)
    before = finder._timed(None, result(*[(1000, 800, 1200)]*3), [16, 64, 512, 1024], 1.)
    after = finder.time_the_best(None, before, 1.)
    assert before.profile.step_time[512] > 2.5 and after.profile.step_time[512] == 1 + 512/500
    assert {64, 512, 1024} <= set(rounds[1]) and 16 not in rounds[1] and len(rounds) < 5
