"When bs_find stops, and with which batches it measures"
import subprocess, sys
from math import inf

import pytest, torch
from torch import nn
from torch.utils import data as torch_data
from fastai.callback.all import ProgressCallback

from fastai_bs_finder import finder, memory, mock, profile as profile_room
from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from footprint import assert_no_footprint, changes, forget, state
from fastai_bs_finder.result import BSResult
from fastai_bs_finder.words import as_lr
from results import result
from test_footprint import rich_learner
from test_profile import Clock, Stubborn, Takes


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    Clock.now = 0.
    for room in (finder, memory, mock, profile_room): monkeypatch.setattr(room, 'time', Clock())


def find(learn, *args, lr=.1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.bs_find(lr, *args, show_plot=False, **dict(race=False) | kwargs)
    return learn.recorder.bs_result


def clear(**kwargs): return digits_learner(cbs=Takes(.01, 1e-6), **kwargs)  # a larger batch costs nothing
def close(**kwargs): return digits_learner(cbs=Takes(.01, 2e-4), **kwargs)  # sizes much alike


def test_a_clear_choice_needs_six_measurements():
    r = find(clear(), n_epoch=100)
    assert len(r) == 6 and r.run.enough == 'clear' and r.run.spent == r.stats.batch.iloc[-1] < 120 and r.run.num_it == 200 and not r.run.stopped
    assert f'After {r.run.spent} batches the choice was clear.' in str(r) and r.suggested['fastest'] > 16


def test_an_open_choice_goes_on_to_the_bound():
    r = find(close(), 150, n_epoch=10**5, regret=1e-4)
    assert (r.run.spent, r.run.num_it, r.run.enough, r.run.stopped) == (150, 150, '', '') and len(r) > 6
    assert r.stats.batch.is_monotonic_increasing and r.stats.step.is_monotonic_increasing and r.stats.samples.is_monotonic_increasing
    assert 'This choice may take up to' in ' '.join(str(r).split()) or 'for now' in str(r)


def test_or_until_it_costs_more_than_it_can_save():
    short,long = find(close(bs=4), 150, n_epoch=1, regret=1e-4),find(close(bs=4), 150, n_epoch=60, regret=1e-4)
    assert short.run.enough == 'cost' and len(short) == 6 and 'ore batches would' in str(short)
    assert long.run.spent > short.run.spent


def test_or_until_nothing_is_learned_any_more(monkeypatch):
    drowned,known = ([(1000, *ends)]*8 for ends in ((0, inf), (0, 4000)))
    def stuck(rows, losses):
        res = result(*rows)
        res.stats['loss'] = losses
        return res.stuck
    flat,falls,fell = [3, 2, 1, 1.]*2,[8, 7, 6, 5, 4, 3, 2, 1.],[3, 2, 1, 1, 1, 1, 1, .9]
    assert stuck(drowned, flat) and not stuck(drowned, falls) and not stuck(drowned, fell) and not stuck(known, flat) and not stuck(drowned[1:], flat[1:])
    assert finder.why_enough(result(*drowned), 100) == 'stuck' and finder.why_enough(result(*known), 100) == ''
    assert str(result(*drowned, enough='stuck')).startswith("Stay with bs=64 for now; the training loss has stopped falling, and a lower lr may tell more.")
    monkeypatch.setattr(BSResult, 'stuck', property(lambda self: len(self) >= 8))
    r = find(close(), 200, n_epoch=10**5, regret=1e-9)  # a bound is one for all that is tried
    assert r.run.enough == 'stuck' and len(r) == 8 and r.run.lr == .1
    costly = result(*drowned, enough='stuck', spent=300, lr_given=.1)
    assert finder._at_a_lower_lr(None, 'a callback', costly, 500) == ('a callback', costly)


@pytest.mark.parametrize('lr,too_high,tries', [(.1, .1, 2), (.1, .01, 3), (slice(.01, .1), .1, 2)])
def test_a_stuck_training_starts_again_with_a_lower_learning_rate(monkeypatch, lr, too_high, tries):
    monkeypatch.setattr(BSResult, 'stuck', property(lambda self: self.run.lr >= .99*too_high))
    searches,start = [],finder._Search.start
    monkeypatch.setattr(finder._Search, 'start', lambda self, bs: (searches.append(self.lr), start(self, bs)))
    def search(learn): find(learn, lr=lr, n_epoch=1000)
    assert_no_footprint(lambda: rich_learner(cbs=Takes(.01, 1e-6)), search, lambda learn: learn.fit(1, .1))
    searches.clear()
    search(learn := clear())
    r,lower = learn.recorder.bs_result,scale_lr(lr, 10**(tries - 1), 1, opt='sgd')
    assert searches == [scale_lr(lr, 10**i, 1, opt='sgd') for i in range(tries)] and r.run.lr_stuck == lr and r.run.lr_given == lower
    twice = scale_lr(lower, 1, 2, opt='sgd')
    assert r.plan(256)[1] == twice and r.plan(16)[1] == lower and as_lr(r.plan(4)[1]) not in (as_lr(lower), as_lr(twice))
    text = ' '.join(str(r).split())
    assert f'Train with bs={r.advised} at lr≈{as_lr(r.plan(r.advised)[1])} for' in text and f', because at lr={as_lr(lr)} the training loss stopped falling.' in text
    stays = r.changed(suggested=dict(fastest=16))
    assert str(stays).startswith(f'Stay with bs=16 at lr={as_lr(lower)}')
    untimed = r.changed(suggested=dict(critical=256, fastest=None), step_time={})
    assert str(untimed).startswith(f'Stay with bs=16 at lr={as_lr(lower)}, or try bs=256')


def test_a_training_that_is_stuck_at_any_learning_rate_says_so(monkeypatch):
    monkeypatch.setattr(BSResult, 'stuck', property(lambda self: len(self) >= 8))
    r = find(close(), n_epoch=10**5, regret=1e-9)
    assert (r.run.enough, r.run.lr, r.run.lr_stuck) == ('flat', .1, None)
    assert 'the training loss has stopped falling, at lower learning rates, too' in str(result(*[(1000, 0, inf)]*8, enough='flat'))


@pytest.mark.parametrize('bs,num_it,bound', [(16, None, 200), (4, None, 375), (16, 130, 130), (4, 130, 130)])
def test_a_number_is_a_bound(bs, num_it, bound):
    r = find(clear(bs=bs), num_it, n_epoch=100)
    assert r.run.num_it == bound and r.run.spent < bound and r.run.enough


@pytest.mark.parametrize('make,n_epoch', [(clear, 3), (clear, 100), (close, 1)])
def test_regret_0_spends_it_all(make, n_epoch):
    r = find(make(), 150, regret=0, n_epoch=n_epoch)
    assert r.run.spent == 150 and not r.run.enough and len(r.profile.step_time) > 1


def test_going_on_leaves_no_footprint():
    def make(): return rich_learner(cbs=Takes(.01, 2e-4))
    def search(learn): assert find(learn, 150, n_epoch=10**5, regret=1e-4).run.spent == 150
    assert_no_footprint(make, search, lambda learn: learn.fit(1, .1))


def test_measurements_go_on_from_where_they_were():
    "The weights of the second part are not those of the start, and the average is one"
    r,known = find(close(), 150, n_epoch=10**5, regret=1e-4),find(close(), 150, n_epoch=10**5, regret=0)
    same = 'noise scale loss batch step'.split()
    assert (r.stats.loc[:5, same] == known.stats.loc[:5, same]).all(axis=None) and r.stats.loss.iloc[-1] < r.stats.loss[5] < r.stats.loss[0]
    assert r.stats.noise.diff().abs()[6:].max() < .2*r.stats.noise.max()


# Smaller batches than those in use

def test_large_batches_are_measured_with_smaller_ones():
    def make(): return rich_learner(bs=512, cbs=Takes(.01, 1e-6))
    assert_no_footprint(make, lambda learn: find(learn), lambda learn: learn.fit(1, .1))
    learn = make()
    r = find(learn, profile=2.)
    assert (r.run.bs, r.run.measured_bs) == (512, 64) and learn.dls.train.bs == 512 and len(r) >= 6
    assert 'measured with bs=64 at lr=' in str(r) and r.table.time[512] == 1 and r.run.lr_given == .1 and r.run.lr == pytest.approx(.1*8**-.5)
    assert 64 in r.profile.step_time and 512 in r.profile.step_time and r.plan(512)[:2] == (3, .1)
    assert learn.recorder.bs_stats.samples.iloc[-1] <= 64*r.run.spent
    assert find(digits_learner(bs=512, cbs=Takes(.01, 1e-6))).run.lr == pytest.approx(.1/8)   # SGD


@pytest.mark.parametrize('kwargs', [dict(num_it=6, n_batch=3), dict(num_it=6), dict(n_batch=3)])
def test_but_not_where_it_was_said_how(kwargs):
    r = find(digits_learner(bs=512, cbs=Takes(.01, 1e-6)), **kwargs)
    assert r.run.measured_bs == 0 and r.run.bs == 512


def test_nor_where_it_is_not_called_for():
    for bs,n_epoch in ((64, 1), (512, 200)): assert find(digits_learner(bs=bs, cbs=Takes(.01, 1e-6)), n_epoch=n_epoch).run.measured_bs == 0


class For500(nn.Module):
    "A model for batches of 500 only"
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
    def forward(self, x): return self.layer(x.view(500, 64))


def one_size():
    learn = digits_learner(bs=500, cbs=Takes(.01, 1e-6))
    learn.model = For500()
    return learn

def stubborn():
    learn = digits_learner(bs=500, cbs=Takes(.01, 1e-6))
    batches = list(learn.dls.train)
    learn.dls.loaders[0] = torch_data.DataLoader(Stubborn(batches), batch_size=None, shuffle=True)
    learn.dls.loaders[0].n_inp = 1
    return learn

@pytest.mark.parametrize('make', [one_size, stubborn])
def test_where_smaller_ones_fail_those_in_use_do(make):
    learn = make().remove_cb(ProgressCallback)
    was = state(learn)
    r = find(learn)
    assert r.run.measured_bs == 0 and r.run.bs == 500 and len(r)
    forget(learn)
    assert changes(was, state(learn)) == []


def test_an_error_at_any_size_comes_through():
    learn = digits_learner(bs=500).remove_cb(ProgressCallback)
    learn.model[0].forward = lambda x: 1/0
    was = state(learn)
    with pytest.raises(ZeroDivisionError): find(learn)
    assert changes(was, state(learn)) == []


def test_a_short_training_is_not_compiled_for():
    "Importing `torch._dynamo` takes seconds, which a call of a few need not pay on the CPU"
    code = ("import sys; from fastai_bs_finder.all import *; from fastai_bs_finder.demo import digits_learner; import torch; "
            "torch.cuda.is_available = lambda: False; learn = digits_learner(); learn.bs_find(.1, show_plot=False); "
            "print(len(learn.recorder.bs_stats) > 5, [m for m in sys.modules if m.startswith('torch._dynamo')])")
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert p.stdout.splitlines()[-1] == 'True []', p.stdout[-300:] + p.stderr[-2000:]
