"The batch sizes that are suggested"
import math

import pytest
from hypothesis import given, strategies as st

from fastai_bs_finder.suggest import average, critical, fastest, quickest
from results import result

inf = math.inf


@given(st.floats(5, 5e4), st.floats(1e-4, .1), st.floats(1e-6, 1e-3), st.sampled_from([16, 64, 256]))
def test_the_shortest_time_is_at_the_geometric_mean_of_noise_scale_and_half_throughput(B, overhead, cost, bs):
    "In a long training, of more steps than a schedule needs; the noise scale is that of the training to come"
    s = result(*[(B, B, B)]*3, bs=bs, n=10**9, spent=100, suggested={}, step_time={b: overhead + cost*b for b in (bs//4, bs, 4*bs, 2**20)})
    best,exact = s.times().time.idxmin(),(s.noise_scale_ahead[0]*overhead/cost)**.5
    assert s.noise_scale_ahead[0] > B and best == quickest(s)
    if s.times().index[0] <= exact <= 2**20: assert best/1.5 <= exact*1.0001 and exact <= best*1.5*1.0001


@given(st.floats(5, 5e4), st.floats(1, 10), st.floats(1e-4, .1), st.floats(1e-6, 1e-3), st.sampled_from([16, 64, 256]), st.integers(300, 10**6), st.integers(1, 20))
def test_fastest_saves_a_good_deal_and_changes_as_little_as_that_takes(B, width, overhead, cost, bs, n, n_epoch):
    "Otherwise the size stays; no interval here is so wide that nothing is known"
    s = result(*[(B, B/width, B*width)]*3, bs=bs, n=n, n_epoch=n_epoch, step_time={b: overhead + cost*b for b in (bs//4, bs, 4*bs, 16*bs)})
    best,t = fastest(s),s.times()
    if best == bs: return
    if best is None:
        assert t.regret[bs] > 1
        return
    near = [b for b in t.index if t.worst[b] < 1 and t.time[b] <= 1.05*t.time[t.worst < 1].min()]
    assert 1.2*t.time[best] < t.time[bs]*1.05 and best in near
    clear = [b for b in near if t.regret[b] < .1]
    if not clear: assert t.regret[best] == t.regret[near].min()
    assert not any(abs(math.log(b/bs)) < abs(math.log(best/bs)) for b in clear) and (best in clear or not clear)
    assert n_epoch*n/bs*rel_steps_of(s, best) >= min(100, n_epoch*n/bs)*(1 - 1e-9)


def rel_steps_of(s, bs): return s.times().time[bs]*s.step_time(s.run.bs)/s.step_time(bs)


def test_a_clear_gain_is_taken_and_a_small_one_is_not():
    def found(per_example, **facts): return fastest(result(*[(1e4, 9e3, 1.1e4)]*3, step_time={b: .01 + per_example*b for b in (16, 64, 256, 1024)}, **facts))
    assert found(1e-6) == 1024 and found(.01) == 64
    assert fastest(result(*[(300, 250, 350)]*3, n=1281, step_time={b: .01 + 1e-6*b for b in (16, 64, 256)})) == 64   # 60 steps are fewer than a schedule needs
    s = result(*[(1e4, 1e-3, inf)]*3, step_time={b: 1e-4 + 1e-3*b for b in (16, 64, 256)})
    assert fastest(s) is None and s.times().regret[64] > 1   # all is possible, so the size in use is no advice either


@pytest.mark.parametrize('step_time', ({64: .01, 256: .01}, {64: .01, 256: .0101}, {16: .01, 64: .01, 1024: .01}))
def test_fastest_is_one_that_was_timed_or_smaller(step_time):
    "Two times that are the same by chance would make the whole training set the fastest batch"
    s = result(*[(1e4, 9e3, 1.1e4)]*3, step_time=step_time)
    assert s.table.time.idxmin() > max(step_time) and fastest(s) == max(step_time)


def test_one_time_is_not_enough(): assert fastest(result(*[(1e4, 9e3, 1.1e4)]*3, step_time={64: .01})) is None


def test_suggestions_stay_within_data_and_memory():
    huge = result(*[(1e6, 9e5, 1.1e6)]*3, n=5000, n_epoch=1000, step_time={b: .04 + 2e-6*b for b in (64, 4096)})
    assert critical(huge) == fastest(huge) == average(huge) == 4096
    huge = huge.changed(max_bs=1000)
    assert critical(huge) == fastest(huge) == average(huge) == 768
    at_least = result(*[(-5, 9e5, inf)]*3, n=5000, max_bs=1000)
    assert critical(at_least) == 768 and fastest(at_least) is None


def test_average():
    assert average(result((50, 40, inf), (100, 80, 130), (200, 150, 300))) == 128     # the mean of 100 and 200, rounded: 150
    assert average(result((50, 40, inf), (100, 80, inf), (200, 150, 300))) is None
    assert average(result()) is None


@pytest.mark.parametrize('n,drop_last,batch_norm,sizes', [(1281, False, True, (192, 192)), (1281, True, True, (256, 256)), (1281, False, False, (256, 256)),
                                                          (1280, False, True, (256, 256)), (1025, False, True, (192, 192))])
def test_a_size_that_leaves_a_batch_of_one_is_passed_over(n, drop_last, batch_norm, sizes):
    "Only where there is a batch-norm, and the loader does not leave that batch out"
    r = result(*[(230, 220, 240)]*3, n=n, n_epoch=1000, step_time={50: 1e-3, 256: 1.001e-3, 1024: 1e-2}).changed(drop_last=drop_last, batch_norm=batch_norm)
    assert (critical(r), average(r)) == sizes
    assert r.leaves_one(128) == (sizes[0] != 256) and not r.leaves_one(n) and not r.leaves_one(1)
    assert n % fastest(r) != 1 or sizes[0] == 256


@given(n=st.integers(2, 5000), processes=st.integers(1, 4), bs=st.integers(1, 5000))
def test_which_size_leaves_one(n, processes, bs):
    "What is left of the share of a process, in batches of its own"
    r = result((50, 40, 60), n=n).changed(batch_norm=True, processes=processes)
    share,own = -(-n//processes),-(-bs//processes)
    assert r.leaves_one(bs) == (1 < own < share and len(range(share)[share//own*own:]) == 1)
