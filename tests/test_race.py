"A race of batch sizes: who is ahead, what follows from it, and that nothing remains of it"
import math

import pytest, torch
from fastai.basics import Callback

from fastai_bs_finder import finder, memory, mock, profile as profile_room
from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.mock import mock_training
from fastai_bs_finder.race import draw_batches, run_race
from fastai_bs_finder.result import Race
from footprint import assert_no_footprint, changes, forget, state
from learners import applications, maker
from results import result
from test_footprint import rich_learner
from test_profile import Clock, Takes


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    Clock.now = 0.
    for room in (finder, memory, mock, profile_room): monkeypatch.setattr(room, 'time', Clock())


def quick(make=digits_learner, cbs=(), **kwargs):
    "A learner whose steps take as long at any size, so that large batches are suggested, and are raced"
    return make(cbs=[Takes(.01, 1e-6), *cbs], **kwargs)


def find(learn, **kwargs): return learn.bs_find(.1, show_plot=False, **dict(n_epoch=10) | kwargs)


class InRace(Callback):
    "Calls `f` in training steps of a race at another size than the one in use; the profile trains with lr=0"
    order = -10
    def __init__(self, f): self.f = f
    def after_loss(self):
        if self.training and self.opt.hypers[-1]['lr'] > 0 and len(self.yb[0]) > 16: self.f(self.learn)


def uphill(learn): learn.loss_grad = -learn.loss_grad

def throw(error):
    def f(learn): raise error
    return f


def test_the_winner_is_suggested():
    learn = quick()
    sug,r = find(learn),learn.recorder.bs_result
    assert sug.fastest > 16 and r.race.sizes == [16, sug.fastest] and r.race.winner(sug.fastest) == sug.fastest
    assert r.race.steps[0] >= r.race.steps[1] == 64 and r.race.losses[1] < r.race.losses[0] < 2.3 and r.race.errors[1] > r.race.errors[0] == 0
    assert f'n a race of {r.race.seconds:.2g} s each, bs={sug.fastest} reached a loss of' in str(r)


def test_a_suggestion_that_loses_is_not_fastest():
    learn = quick(cbs=[InRace(uphill)])
    sug,r = find(learn),learn.recorder.bs_result
    assert sug.fastest == 16 and not r.race.losses[1] <= r.race.losses[0] and r.changed(suggested={}).times().time.idxmin() > 16
    assert str(r).startswith('Stay with bs=16: in a race of')
    assert learn.set_bs(sug).dls.bs == 16


@pytest.mark.parametrize('late', [False, True])
def test_a_loss_that_runs_away_is_no_noise(late):
    "All looks are far apart then, or the last one from the others"
    def run(losses):
        from fastai_bs_finder.race import _standing
        return _standing([16, 64], [9, 9], 1., losses)
    ours = [[.5, .6, .4], [.45, .55, .4], [.4, .5, .35]]
    theirs = [[.5, .6, .4], [.5, .5, .4], [9e9, 8e9, 9e9]] if late else [[9., 9, 7], [5e4, 6e4, 5e4], [9e9, 8e9, 9e9]]
    assert run([ours, theirs]).winner(64) == 16
    assert run([theirs, ours]).winner(64) == 64
    assert run([ours, [[.5, .5, .4], [.4, .6, .5], [.45, .5, .35]]]).winner(64) == 64


def test_no_race_if_not_wanted_or_not_worth_it():
    learn = quick()
    sug = find(learn, race=False)
    assert learn.recorder.bs_result.race is None and sug.fastest > 16 and 'race' not in str(learn.recorder.bs_result)
    find(learn, n_epoch=1)   # 94 steps in all: a share of those is too few to tell
    assert learn.recorder.bs_result.race is None
    find(learn, profile=False)
    assert learn.recorder.bs_result.race is None
    same_size = digits_learner(cbs=Takes(1e-5, 1e-3))
    assert find(same_size).fastest in (None, 16) and same_size.recorder.bs_result.race is None


def test_a_larger_size_has_the_steps_to_catch_up():
    learn = quick()
    for n_epoch,least in (10, 64), (300, 0):
        find(learn, n_epoch=n_epoch)
        race = learn.recorder.bs_result.race
        assert race.sizes[1] > 16 and race.steps[1] >= 64 and (race.steps[1] <= 65) == bool(least)


@pytest.mark.parametrize('error', [None, torch.OutOfMemoryError('no room')])
def test_nothing_remains_of_a_race_or_one_that_fails(error):
    seen = []
    def make():
        learn = quick(rich_learner, [])
        cb = InRace(lambda learn: (seen.append(1), error and throw(error)(learn)))
        return learn.add_cb(cb)
    assert_no_footprint(make, find, lambda learn: learn.fit(1, .1))
    assert seen
    learn = make()
    sug = find(learn)
    assert (learn.recorder.bs_result.race is None) == bool(error) and (sug.fastest > 16 or not error) and len(learn.recorder.bs_stats) >= 6


def test_an_interrupt_in_a_race_leaves_nothing():
    learn = quick(rich_learner, [InRace(throw(KeyboardInterrupt()))])
    was = state(learn)
    with pytest.raises(KeyboardInterrupt): find(learn)
    assert changes(was, state(learn)) == [] and not hasattr(learn.recorder, 'bs_stats') and not hasattr(learn, 'lr_finder')


def raced(learn, bs, seconds=.08):
    "A race of made-up times"
    r = result(*[(300, 200, 400)]*3, bs=bs, n=None, lr_given=1e-3, step_time={bs: .01, 2*bs: .01})
    with mock_training(learn):
        was = state(learn)
        race = run_race(learn, r, [bs, 2*bs], seconds)
        assert changes(was, state(learn)) == []
    return race


slow = 'TabularPandas', 'collaborative filtering: collab_learner', 'vision'  # much like others


@pytest.mark.parametrize('name', [pytest.param(k, marks=[pytest.mark.slow]*any(o in k for o in slow)) for k in applications])
def test_learners_of_all_kinds(name, fastai_data):
    "A hidden state, loaders of PyTorch, of text, and without a length"
    learn = maker(name, fastai_data)[0]()
    was,bs = state(learn),learn.dls.train.bs if hasattr(learn.dls.train, 'bs') else learn.dls.train.batch_size
    race,again = raced(learn, bs),raced(learn, bs)
    assert race.sizes == [bs, 2*bs] and race.steps == [8, 8] and all(0 < v < 20 for v in race.losses) and race == again
    forget(learn)
    assert changes(was, state(learn)) == []


def test_all_look_at_the_same_examples():
    learn = digits_learner()
    with mock_training(learn):
        a,b = draw_batches(learn, 64, 300),draw_batches(learn, 64, 300)
        assert len(a) == 5 and all(torch.equal(u, v) for p,q in zip(a, b) for u,v in zip(p, q))
        next(iter(a))[0].zero_()   # a model that changes its input in place
        assert next(iter(a))[0].any()


def test_a_third_size():
    r = result(*[(3000, 2500, 3500)]*3, n_epoch=100, step_time={64: .01, 256: .011, 2048: .03})
    def third(seconds, losses, worth=math.inf): return finder._one_more(r, 512, seconds, worth, Race([64, 512], [9, 9], seconds, losses, [0, .01]))
    assert third(5., [.5, .4]) in (768, 1024, 1536) and third(5., [.4, .5]) in (128, 192, 256)
    assert third(1., [.5, .4]) is None and third(1., [.4, .5]) in (128, 192, 256)   # a third size beyond takes some time


def test_how_the_third_one_does_is_known_too():
    asked = []
    def more(race):
        asked.append(race)
        return 48
    learn = digits_learner()
    r = result(*[(300, 200, 400)]*3, bs=16, n=1500, lr_given=.1, step_time={16: .01, 64: .01})
    with mock_training(learn): race = run_race(learn, r, [16, 32], .2, more)
    assert race.sizes == [16, 32, 48] and len(race.losses) == len(race.errors) == len(race.steps) == 3 and [o.sizes for o in asked] == [[16, 32]]
    assert asked[0].losses == race.losses[:2]


def test_on_a_stream_a_race_takes_no_longer_than_the_measurements(fastai_data):
    make,lr = maker('a stream without a length, fastai loader', fastai_data)
    learn = make()
    learn.add_cb(Takes(.01, 1e-6))
    sug = learn.bs_find(.1, show_plot=False)
    r = learn.recorder.bs_result
    assert r.run.n is None and r.race is not None and sug.fastest
    assert r.race.seconds <= r.run.spent*.0101
