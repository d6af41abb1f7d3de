"What the elements of the gradient tell of other batch sizes: from the finder to the table"
from math import exp, inf, log

import numpy as np, pytest, torch
from fastai.basics import Adam, CrossEntropyLossFlat, SGD
from fastai.callback.fp16 import MixedPrecision
from hypothesis import given, strategies as st
from torch import nn

from fastai_bs_finder.adaptive import Elements, steps_and_lr
from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.metric import Sample
from fastai_bs_finder.noise import GradSums
from fastai_bs_finder.predict import implied_noise_scale, rel_steps
from fastai_bs_finder.result import BSResult, ByElement
from footprint import assert_no_footprint
from results import result
from test_footprint import rich_learner

sizes = [4.*2**i for i in range(9)]


def one_ratio(B, n=6, spread=0.):
    "φ and ν of elements that all have the noise scale `B`"
    rng = np.random.default_rng(0)
    phi = [[(1 + spread*rng.standard_normal())/(1 + B/b)**.5 for b in sizes] for _ in range(n)]
    return ByElement(sizes, phi, [[1.]*len(sizes)]*n)


@given(st.floats(.1, 1e4), st.sampled_from([1, 16, 100, 4096]), st.sampled_from([1, 64, 128, 1000]))
def test_steps_imply_a_noise_scale(B, bs, bs0):
    if bs != bs0: assert implied_noise_scale(rel_steps(bs, bs0, B), bs, bs0) == pytest.approx(B, rel=1e-4)
    assert implied_noise_scale(bs0/bs/1.1 if bs > bs0 else bs0/bs*1.1, bs, bs0) == (inf if bs != bs0 else 0)
    assert implied_noise_scale(1.1 if bs > bs0 else .9, bs, bs0) == 0


@pytest.mark.parametrize('spent', [10**6, 320])
def test_one_noise_scale_for_all_is_the_one_of_old(spent):
    "As if measured in the optimizer's metric, its growth along the training included"
    facts = dict(n=50_000, n_epoch=3, opt='adam', lr_given=.01, spent=spent, step_time={64: .01, 256: .02})
    old = result(*[(300, 300, 300)]*3, **facts)
    new = old.changed(by_element=one_ratio(300))
    for bs in (16, 32, 64, 128, 256, 1024):
        a,b = old.at_bs(bs),new.at_bs(bs)
        for q in ('steps', 'time', 'epochs', 'lr'): assert b[q] == pytest.approx(a[q], rel=.02), (bs, q)
        if bs > 64: assert b['steps_lo'] < a['steps']*.93 and b['steps_hi'] > a['steps']*1.1   # the error of the rule
    np.testing.assert_allclose(new.times(), old.times(), rtol=.05, atol=.02)


def test_elements_outvote_the_noise_scale():
    old = result(*[(30, 20, 40)]*3, opt='adam', lr_given=.01, step_time={64: .01, 1024: .02})
    new = old.changed(by_element=one_ratio(1000))
    new = new.changed(suggested=dict(fastest=fastest(new)))
    assert old.suggested['fastest'] < new.suggested['fastest'] and new.at_bs(1024)['steps'] < .5*old.at_bs(1024)['steps']
    assert new.noise_scale_for(64) == old.noise_scale_for(64) == old.noise_scale_for(256) and new.noise_scale_for(256)[0] == pytest.approx(1000, rel=.05)
    few = old.changed(by_element=one_ratio(1000, n=3))
    assert few.at_bs(256) == old.at_bs(256)
    assert old.changed(by_element=one_ratio(1000), biased=True).at_bs(256) == old.at_bs(256)


def test_no_training_gets_far_below_twenty_steps():
    facts = dict(opt='adam', lr_given=.01, spent=10**6, by_element=one_ratio(10**5))
    long,short = (result(*[(300, 250, 350)]*3, n=n, n_epoch=1, **facts) for n in (10**6, 64*50))
    assert long.at_bs(1024)['steps'] == pytest.approx(1/16, rel=.1) and short.at_bs(1024)['steps'] == pytest.approx(.4, rel=.02)
    assert short.at_bs(96)['steps'] == pytest.approx(long.at_bs(96)['steps'], rel=.02)


def test_scatter_is_an_interval():
    old = result(*[(300, 250, 350)]*3, opt='adam', lr_given=.01, step_time={64: .01, 256: .02})
    rng = np.random.default_rng(1)
    wild = ByElement(sizes, [[v*exp(.5*rng.standard_normal()*log(b/64)) for v,b in zip(row, sizes)] for row in one_ratio(300).phi], one_ratio(300).nu)
    sure,open_ = (old.changed(by_element=o) for o in (one_ratio(300), wild))
    assert sure.noise_scale_for(256)[1:] == pytest.approx((300, 300), rel=.05)
    lo,hi = open_.noise_scale_for(256)[1:]
    assert lo < 200 and hi > 500 and np.isfinite(open_.times()).all(axis=None)


def test_the_interval_of_the_steps_goes_beyond_proportion():
    "Real trainings take more than four times the steps with a quarter of the batch, or fewer than a quarter with four times: the error of the rule is on both sides"
    r = result(*[(300, 250, 350)]*3, opt='adam', lr_given=.01, by_element=one_ratio(10**5), step_time={64: .01, 256: .02})
    small,large = r.at_bs(16),r.at_bs(256)
    assert 3.9 < small['steps'] < 4 and small['steps_hi'] == pytest.approx(1.4*small['steps'], rel=.02) and small['steps_lo'] == pytest.approx(small['steps']/1.4, rel=.02)
    assert large['steps'] > .25 > large['steps_lo'] and large['time_hi']/large['time'] == pytest.approx(large['steps_hi']/large['steps'])


def test_the_lr_follows_the_elements():
    "Where ν falls with the batch size, the learning rate grows by more than the root rule says"
    by = one_ratio(300)
    by = ByElement(sizes, by.phi, [[(64/b)**.2 for b in sizes]]*len(by))
    r = result(*[(300, 300, 300)]*3, opt='adam', lr_given=slice(.01, .1), by_element=by)
    _,lr = steps_and_lr(np.array(by.phi), np.array(by.nu), 4)
    assert r.at_bs(256)['lr'] == slice(pytest.approx(.01*lr[6], rel=.02), pytest.approx(.1*lr[6], rel=.02)) and r.at_bs(64)['lr'] == slice(.01, .1)


def test_a_file_keeps_them(tmp_path):
    r = result(*[(300, 250, 350)]*3, opt='adam', by_element=one_ratio(300, spread=.1))
    r.to_csv(tmp_path/'r.csv')
    assert BSResult.from_csv(tmp_path/'r.csv').table.equals(r.table)


def test_finding_with_adam_goes_by_the_elements():
    def find(opt_func, lr, **kwargs):
        learn = digits_learner(opt_func=opt_func)
        with learn.no_bar(), learn.no_logging(): learn.bs_find(lr, 200, show_plot=False, regret=0, race=False, **kwargs)
        return learn.recorder.bs_result
    r = find(Adam, 3e-3)
    assert len(r.by_element) == len(r) - 1 and r.by_element.sizes[0] >= 1 and 16 in r.by_element.sizes
    assert r.at_bs(128)['steps'] != r.changed(by_element=None).at_bs(128)['steps']
    assert .5 < r.at_bs(128)['steps']/r.changed(by_element=None).at_bs(128)['steps'] < 2
    assert find(SGD, .1).by_element is None


def test_with_mixed_precision_too():
    def find(cbs):
        learn = digits_learner(opt_func=Adam, cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.bs_find(3e-3, 200, show_plot=False, regret=0, race=False)
        return np.log(learn.recorder.bs_result.table.steps)
    assert find([]).to_numpy() == pytest.approx(find([MixedPrecision()]).to_numpy(), abs=.1)


# The sample

def grads(params, seed): return [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype) + .1 for p in params]

def sums_of(params, seed, bs=8):
    sums = GradSums()
    for i in range(4): sums.add(grads(params, 10*seed + i), bs)
    return sums


def add(sample, sums): sample.add(sums, sample.squares(sums))


def test_a_small_model_is_its_own_sample():
    params = [nn.Parameter(torch.zeros(5, 7)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    sample,own = Sample(params, sizes, np.array([.1, .1, .1]), 1e-3),Elements(sizes, 1e-3)
    for seed in range(3):
        sums = sums_of(params, seed)
        add(sample, sums)
        flat = [torch.cat([(torch.view_as_real(t) if t.is_complex() else t).flatten() for t in ts]) for ts in (sums.totals, sums.squares)]
        found = own.add(*flat, 4, 32)
    assert len(sample.phi) == 2 and len(flat[0]) == 42
    np.testing.assert_allclose([sample.phi[-1], sample.nu[-1]], found, rtol=1e-5)


def test_a_large_model_is_sampled_at_random():
    params = [nn.Parameter(torch.zeros(300, 300)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(30_000))]
    torch.manual_seed(0)
    was = torch.get_rng_state()
    sample = Sample(params, sizes, np.ones(3), 1e-5)
    assert torch.equal(was, torch.get_rng_state())
    n = {i: len(o) for i,o in sample.places.items()}
    assert sum(n.values()) == 2**14 and n[0] == pytest.approx(3*n[2], rel=.1)
    assert all(0 <= o.min() and o.max() < params[i].numel() for i,o in sample.places.items()) and len(sample.places[0].unique()) > .9*n[0]
    whole = Elements(sizes)
    for seed in range(3):
        sums = sums_of(params, seed)
        add(sample, sums)
        found = whole.add(torch.cat([t.flatten() for t in sums.totals]), torch.cat([t.flatten() for t in sums.squares]), 4, 32)
    for got,all_ in zip((sample.phi[-1], sample.nu[-1]), found): np.testing.assert_allclose(np.array(got)/got[0], all_/all_[0], rtol=.2)


def test_of_many_tensors_some_are_sampled():
    params = [nn.Parameter(torch.zeros(n)) for n in [10]*300 + [5000]*20]
    sample = Sample(params, sizes, np.ones(320), 1e-5)
    n = {i: len(o) for i,o in sample.places.items()}
    assert 12 <= len(n) <= 24 and sum(n.values()) > 16000 and sum(i >= 300 for i in n) > .8*len(n)
    for seed in range(2): add(sample, sums_of(params, seed))
    assert len(sample.phi) == 1 and len(sample.elements.lrs) == sum(n.values())


def test_learning_rates_weigh():
    params = [nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))]
    def found(lrs, some=params):
        sample = Sample(params, sizes, np.array(lrs), 0.)
        for seed in range(3):
            sums = sums_of(params, seed)
            sums.totals,sums.squares = ([t if p in some else None for p,t in zip(map(id, params), ts)] for ts in (sums.totals, sums.squares)) if some is not params else (sums.totals, sums.squares)
            add(sample, sums)
        return np.array([sample.phi[-1], sample.nu[-1]])
    assert found([.1, 1e-9]) == pytest.approx(found([.1, .1], {id(params[0])}), rel=.1)   # the other's elements still tell the distribution
    np.testing.assert_allclose(found([.1, .1]), found([.3, .3]))


def test_nothing_is_learned_without_squares_or_of_batches_without_weight():
    params = [nn.Parameter(torch.zeros(50))]
    sample = Sample(params, sizes, np.ones(1), 0.)
    for kwargs,sums in ((dict(weight=0.), GradSums(per_element=True)), ({}, GradSums(per_element=False))):
        for i in range(3): sums.add(grads(params, i), 8, **kwargs)
        add(sample, sums)
        add(sample, sums)
    assert not sample.phi and not sample.nu


def test_a_weighted_mean_tells_noise_and_scale_by_element():
    "They add up to those of the whole gradient; with even weights it is a plain mean"
    params = [nn.Parameter(torch.zeros(300)), nn.Parameter(torch.zeros(7, 3))]
    def one(weights):
        sample,sums = Sample(params, sizes, np.ones(2), 0.),GradSums()
        for i,w in enumerate(weights): sums.add(grads(params, i), 8, weight=w)
        add(sample, sums)
        e = sample.elements
        return e.noise/e.weight,e.square/e.weight,sums
    noise,square,sums = one([3., 20., 0., 7., 9.])
    assert (float(noise.sum()), float((square - noise/40).sum())) == pytest.approx(sums.noise_and_scale(), rel=1e-4)
    for got,wanted in zip(one([2.]*5)[:2], one([None]*5)[:2]): torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_class_weights_go_by_the_elements():
    weights = torch.tensor([1., 5., 1., 1., 2., 1., 1., 9., 1., 1.])
    def find(weight=None):
        learn = digits_learner(opt_func=Adam)
        learn.loss_func = CrossEntropyLossFlat(weight=weight)
        with learn.no_bar(), learn.no_logging(): learn.bs_find(3e-3, 300, show_plot=False, regret=0, race=False)
        return learn.recorder.bs_result
    weighted,plain = find(weights),find()
    assert weighted.run.loss == 'weighted' and len(weighted.by_element) == len(weighted) - 1
    assert weighted.at_bs(128)['steps'] == pytest.approx(plain.at_bs(128)['steps'], rel=.4)


def test_no_footprint():
    def make(): return rich_learner(opt_func=Adam)
    assert_no_footprint(make, lambda learn: learn.bs_find(3e-3, show_plot=False), lambda learn: learn.fit(1, 3e-3))
