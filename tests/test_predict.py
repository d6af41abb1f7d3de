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
