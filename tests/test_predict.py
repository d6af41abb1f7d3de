"What other batch sizes are predicted to take, and the words about it"
import math, pickle

import numpy as np, pandas as pd, pytest
from fastcore.foundation import L
from hypothesis import given, strategies as st

from fastai_bs_finder.all import *
from fastai_bs_finder.predict import bs_table

inf,nan = math.inf,math.nan


def measured(*rows, opt=None, **attrs):
    "`bs_stats` with rows of `(noise_scale, lo, hi)`; a negative noise scale means a negative scale; `opt`: rows of the optimizer's metric"
    def cols(rows, prefix=''): return pd.DataFrame([{f'{prefix}noise': 10., f'{prefix}scale': 10/x, f'{prefix}noise_scale': x, f'{prefix}lo': lo, f'{prefix}hi': hi, f'{prefix}raw_noise': 10., f'{prefix}raw_scale': 10/x}
                                                    for x,lo,hi in rows])
    s = pd.concat([cols(rows), *([cols(opt, 'opt_')] if opt else [])], axis=1)
    s.insert(0, 'loss', 1.)
    s.attrs.update(dict(bs=64, n=50_000, lr=.1, opt='sgd', num_it=100, n_batch=10, n_train=10, beta=.9, stopped=None, step_every_batch=False) | attrs)
    return s


linear = {b: .004 + 2e-5*b for b in (16, 64, 256, 1024)}   # seconds: half of the throughput at 200 examples
known = (350, 300, 400),(400, 300, 500),(450, 350, 600)


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


def test_the_mean_noise_scale():
    assert mean_noise_scale(measured((100, 100, 100), (100, 100, 100))) == pytest.approx((100, 100, 100))
    B,lo,hi = mean_noise_scale(measured((100, nan, nan), (200, 100, 400), (-50, 300, inf)))
    assert B == pytest.approx(noiseless_mean([100, 200, 300], 64)) and lo == pytest.approx(noiseless_mean([100, 300], 64)) and hi == inf   # as open as the last one
    assert mean_noise_scale(measured((-50, 300, inf), (200, 100, 400)))[2] == pytest.approx(noiseless_mean([inf, 400], 64))
    t = bs_table(measured((-5, nan, nan), (100, 0, 400), (100, 0, 400)))
    assert t.lr_lo[256] == .1 and t.steps_hi[256] == 1   # no noise at all, for all we know
    assert mean_noise_scale(measured((-50, 300, inf)))[2] == inf
    for ns,used in (600, 600), (10**6, 800), (-50, 200): assert mean_noise_scale(measured((ns, 200, inf)))[0] == pytest.approx(used)
    for rows in ([(-50, 0, inf)], [(-50, nan, nan)]): assert mean_noise_scale(measured(*rows)) is None


def test_the_optimizers_geometry_is_used_where_it_was_measured():
    both = measured((100, 90, 110), (100, 90, 110), opt=[(nan, nan, nan), (400, 390, 410)])
    assert mean_noise_scale(both)[0] == pytest.approx(400) and critical(both) == 384 and average(both) == 384
    none = measured((100, 90, 110), opt=[(nan, nan, nan)])
    none.opt_noise = nan
    assert mean_noise_scale(none)[0] == pytest.approx(100) and critical(none) == 96


def test_the_table():
    s = measured(*known, step_time=linear, max_bs=3000)
    t = bs_table(s)
    B,lo,hi = mean_noise_scale(s)
    assert list(t.columns[:7]) == 'steps examples epochs time sec_per_epoch lr fits'.split() and t.index.name == 'bs'
    assert t.index.is_monotonic_increasing and t.index[-1] == 49152 and t.index[0] == 8 and set(t.index) - {2**i for i in range(17)} == {3*2**i for i in range(2, 15)}
    assert (t.loc[64, ['steps', 'examples', 'epochs', 'time']] == 1).all() and t.lr[64] == .1
    for b in (16, 256, 2048):
        assert t.steps[b] == pytest.approx(rel_steps(b, 64, B)) and t.examples[b] == t.epochs[b] == pytest.approx(rel_examples(b, 64, B))
        assert t.time[b] == pytest.approx(rel_steps(b, 64, B)*(.004 + 2e-5*b)/(.004 + 2e-5*64)) and t.sec_per_epoch[b] == pytest.approx((.004 + 2e-5*b)*50_000/b)
        assert t.lr[b] == pytest.approx(scale_lr(.1, 64, b, B, 'sgd'))
        assert (t.steps_lo[b], t.steps_hi[b]) == pytest.approx(sorted(rel_steps(b, 64, x) for x in (lo, hi)))
    for q in ('steps', 'examples', 'epochs', 'time'): assert ((t[f'{q}_lo'] <= t[q]) & (t[q] <= t[f'{q}_hi'])).all()
    assert type(t.lr[256]) is float and type(t.loc[256].lr) is float
    assert t.fits.tolist() == ['yes']*len(t[t.index <= 3000]) + [f'accumulate {k}' for k in (2, 2, 3, 3, 5, 6, 9, 11, 17)]
    assert t.time[4096] == pytest.approx(rel_steps(4096, 64, B)*2*(.004 + 2e-5*2048)/(.004 + 2e-5*64))


def test_the_table_of_little():
    t = bs_table(measured(*known, bs=100, n=None, lr_given=slice(.01, .1)))
    assert 100 in t.index and t.index[-1] <= 8*600 and t.time.isna().all() and (t.fits == '').all() and isinstance(t.lr[128], slice)
    assert bs_table(measured((-50, 0, inf))) is None


def test_the_table_reads_well():
    t = bs_table(measured(*known, step_time=linear, max_bs=3000))
    text,html = repr(t),t._repr_html_()
    assert '64 (in use)' in text and 'accumulate 2' in text and '_lo' not in text and '_hi' not in html and '64 (in use)' in html
    row = next(l for l in text.splitlines() if l.startswith('512 '))
    assert row.split()[1:3] == ['0.25', '(0.23-0.27)']
    assert 'nan' not in repr(bs_table(measured(*known)))
    assert 'True' in repr(t.isna() | True) and type(pickle.loads(pickle.dumps(t))) is pd.DataFrame
    assert 'steps' in repr(t[['steps', 'fits']]) and t.query('time < .7').time.max() < .7


@given(st.floats(5, 5e4), st.floats(1e-4, .1), st.floats(1e-6, 1e-3), st.sampled_from([16, 64, 256]), st.integers(3000, 10**6))
def test_fastest_is_the_geometric_mean_of_noise_scale_and_half_throughput(B, overhead, cost, bs, n):
    s = measured(*[(B, B, B)]*3, bs=bs, n=n, step_time={b: overhead + cost*b for b in (bs//4, bs, 4*bs, 2**20)})
    best,t = fastest(s),bs_table(s)
    assert t.time[best] == t.time.min()
    exact = (B*overhead/cost)**.5
    if t.index[0] <= exact <= t.index[-1]: assert best/1.5 <= exact*1.0001 and exact <= best*1.5*1.0001


@pytest.mark.parametrize('step_time', ({64: .01}, {64: .01, 256: .01}, {64: .01, 256: .0101}, {16: .01, 64: .01, 1024: .01}))
def test_fastest_is_one_that_was_timed_or_smaller(step_time):
    "Two times that are the same by chance would make the whole training set the fastest batch"
    s = measured(*[(1e4, 9e3, 1.1e4)]*3, step_time=step_time)
    assert bs_table(s).time.idxmin() > max(step_time) if len(step_time) > 1 else fastest(s) is None
    assert len(step_time) == 1 or fastest(s) == max(step_time)


def test_suggestions_stay_within_data_and_memory():
    huge = measured(*[(1e6, 9e5, 1.1e6)]*3, n=5000, step_time={b: .04 + 2e-6*b for b in (64, 4096)})
    assert critical(huge) == fastest(huge) == average(huge) == 4096
    huge.attrs['max_bs'] = 1000
    assert critical(huge) == fastest(huge) == average(huge) == 768
    at_least = measured(*[(-5, 9e5, inf)]*3, n=5000, max_bs=1000)
    assert critical(at_least) == 768 and fastest(at_least) is None


@pytest.mark.parametrize('stats,words', [
    (measured(*known, step_time=linear, max_bs=3000), "bs=256 should reach the same loss in 0.61 of the time of bs=64 (0.58-0.65), seeing 1.4 times the examples: use lr≈0.28, about 1.4 times the epochs."),
    (measured(*[(6, 5, 7)]*3, step_time=linear), "On this machine, no batch size should be much faster than bs=64."),
    (measured(*[(-5, 400, inf)]*3, step_time=linear), "bs=256 should reach the same loss in 0.61 of the time of bs=64 (at most 0.61), seeing 1.4 times the examples (at most 1.4)"),
    (measured(*[(600, 200, inf)]*3, step_time=linear), "bs=384 should reach the same loss in 0.55 of the time of bs=64 (at most 0.82), seeing 1.5 times the examples (at most 2.2)"),
    (measured(*known), "bs=512 should reach the same loss in about 0.25 of the steps of bs=64"),
    (measured(*known, profile_note="How fast other batch sizes are on this machine is not known, the loader does not listen."), "is not known, the loader does not listen."),
    (measured(*known, step_time=linear, max_bs=200), "A larger batch would do, but only about 200 examples fit in memory: accumulate the gradients of several."),
    (measured(*known, step_time=linear, n=200), "A larger batch would do, but the training set has only 200 examples."),
    (measured(*known, step_time=linear, lr_given=slice(.01, .1)), "use lr≈slice(0.028, 0.28)"),
    (measured(*[(300, 10, 9000)]*3, step_time=linear), "bs=256 may reach the same loss in 0.66 of the time of bs=64 (0.44-1.6), but the interval is too wide to rely on it: spend more batches (num_it=400)"),
    (measured(*[(3000, 10, 20000)]*3, step_time={64: .01, 256: .01}), "in 0.27 of the time of bs=64 (0.25-0.90), seeing 1.1 times the examples (1.0-3.6): use"),
    (measured(*known, step_time=linear, n=900), "That leaves about 5 steps of what is an epoch with bs=64, and a schedule needs a hundred or so"),
    (measured(*known, step_time=linear, n=900, batch_norm=True), "That leaves about 5 steps of what is an epoch with bs=64, and a schedule and batch-norm's averages need a hundred"),

])
def test_words(stats, words):
    said = bs_summary(stats)
    assert words in said and 'nan' not in said and 'inf' not in said


@pytest.mark.parametrize('rows', ([(400, nan, nan)], [(400, nan, nan)]*2))
def test_no_advice_from_what_nobody_is_sure_of(rows):
    said = bs_summary(measured(*rows, step_time=linear))
    assert 'too few to say how sure that is' in said and 'same loss' not in said


def test_several_processes_need_fewer_batches_each():
    assert bs_summary(measured((400, nan, nan), processes=4)).endswith('spend more batches (num_it=200), or fewer per measurement (n_batch=2).')
    assert 'fewer' not in bs_summary(measured((400, nan, nan)))
    few = bs_summary(measured(*known, bs=60, processes=4, step_time={60: .01, 250: .011}))
    assert 'bs=60 (4 processes × 15)' in few and 'bs=192 (4 processes × 48)' in few
    assert 'bs=64 (3 processes × 22, 66 in all)' in bs_summary(measured(*known, bs=64, processes=3))
