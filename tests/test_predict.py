"What other batch sizes are predicted to take"
import math

import numpy as np, pandas as pd, pytest
from fastcore.foundation import L
from hypothesis import given, strategies as st

from fastai_bs_finder.predict import *

inf = math.inf


@pytest.mark.parametrize('lr,bs,new,noise_scale,opt,wanted', [
    (.1, 64, 256, None, 'sgd', .4), (.1, 64, 256, None, 'adam', .2), (.4, 256, 64, None, 'sgd', .1),
    (.1, 64, 256, 64, 'sgd', .1*2/1.25), (.1, 64, 256, 64, 'adam', .1*(2/1.25)**.5), (.1, 64, 2**40, 64, 'sgd', .2), (.1, 64, 256, inf, 'sgd', .4), (.1, 64, 64, 7, 'adam', .1),
])
def test_scale_lr(lr, bs, new, noise_scale, opt, wanted): assert scale_lr(lr, bs, new, noise_scale, opt) == pytest.approx(wanted)


def test_scale_lr_of_every_kind():
    def twice(lr): return scale_lr(lr, 64, 256)
    assert twice(slice(.25, 1.)) == slice(.5, 2.) and twice(slice(1.)) == slice(2.)
    assert twice([.25, 1.]) == [.5, 2.] and twice((.25, 1.)) == (.5, 2.) and type(twice((.25, 1.))) is tuple
    assert list(twice(L(.25, 1.))) == [.5, 2.] and twice(np.array([.25, 1.])).tolist() == [.5, 2.] and twice(np.float64(.25)) == .5
    lr = [1., 2.]
    twice(lr)
    assert lr == [1., 2.]


@pytest.mark.parametrize('kwargs,msg', [(dict(opt='rmsprop'), "opt='rmsprop' is not one of 'sgd', 'adam'"), (dict(bs=0), 'bs=0 is not a number above 0'),
                                        (dict(new_bs=-3), 'new_bs=-3 is not'), (dict(noise_scale=-1), 'noise_scale=-1 is not'), (dict(bs='64'), "bs='64' is not")])
def test_scale_lr_errors(kwargs, msg):
    with pytest.raises(ValueError, match=msg): scale_lr(**dict(lr=.1, bs=64, new_bs=128) | kwargs)


@given(st.lists(st.one_of(st.floats(.01, 1e8), st.just(inf)), min_size=1, max_size=20), st.integers(1, 10**5), st.integers(1, 10**5))
def test_the_mean_predicts_what_adding_up_step_by_step_does(B, bs, new):
    mean = noiseless_mean(B, bs)
    wanted = np.mean([bs/new if b == inf else (1 + b/new)/(1 + b/bs) for b in B])
    assert rel_steps(new, bs, mean) == pytest.approx(wanted, rel=1e-6)
    assert min(B)*(1 - 1e-9) <= mean <= max(B)*(1 + 1e-6)


@pytest.mark.parametrize('x,n,down,want', [(0, None, False, 1), (1.4, None, False, 1), (1.5, None, False, 2), (11, None, False, 12), (11, None, True, 8), (1e6, None, False, 1048576),
                                          (1e9, 7, False, 6), (1e9, 1, False, 1), (5, 5, False, 4), (95.9, None, True, 64), (96, None, True, 96), (.2, None, True, 1)])
def test_round_bs(x, n, down, want): assert round_bs(x, n, down) == want


counts = st.integers(1, 10**7)
noise_scales = st.floats(.01, 1e8) | st.just(inf)


@given(counts, counts, st.floats(1, 100))
def test_growth_is_that_of_the_part_still_to_come(seen, ahead, more):
    assert growth(seen, ahead) >= 1 and growth(ahead + seen, ahead) == 1
    assert growth(seen, ahead*more) >= growth(seen, ahead) >= growth(seen*more, ahead)
    if ahead >= seen: assert growth(seen, ahead*1024) == pytest.approx(8*growth(seen, ahead))


@given(counts, counts, noise_scales, st.floats(1, 1e7))
def test_no_training_gets_shorter_than_a_schedule_or_longer_for_its_sake(bs, bs0, B, steps0):
    found = steps_of_training(bs, bs0, B, steps0)
    assert steps0*found >= min(steps0, 100)*(1 - 1e-9)
    assert found in (rel_steps(bs, bs0, B), min(100/steps0, 1))
    assert steps_of_training(bs, bs0, B) == rel_steps(bs, bs0, B)


@given(st.integers(1, 6).flatmap(lambda k: st.lists(st.lists(st.floats(1e-3, 1e3), min_size=k, max_size=k), min_size=1, max_size=6)))
def test_regrets_by_hand(times):
    columns = list(zip(*times))
    wanted = [max(t/min(c) for t,c in zip(row, columns)) - 1 for row in times]
    assert regrets(np.array(times)) == pytest.approx(wanted)
    assert min(wanted) >= 0 and (len(times) > 1 or wanted == [0])


@given(st.integers(1, 200), st.floats(.001, 50), st.just(math.nan) | st.floats(.01, 2), st.floats(0, 500))
def test_whole_epochs_lose_neither_the_loss_nor_the_time_saved(n_epoch, rel_epochs, rel_time, least):
    found,x = whole_epochs(n_epoch, rel_epochs, rel_time, least),n_epoch*rel_epochs
    assert type(found) is int and found >= max(1, least - 1e-5)
    assert whole_epochs(n_epoch, 1., 1.) == n_epoch
    if found == max(1, math.ceil(round(least, 6))): return
    assert abs(found - x) < 1
    if found < x - .25 - 1e-5: assert rel_time*math.ceil(x)/x > (1 + rel_time)/2   # rounding up would lose half of what is saved, or more
    if found > x: assert math.isnan(rel_time) or rel_time*found/x <= (1 + rel_time)/2*(1 + 1e-9)
