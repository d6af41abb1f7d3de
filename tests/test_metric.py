"Noise and scale in the metric of the optimizer, and per module, against second implementations"
import math
from functools import partial

import numpy as np, pytest, torch
from torch import nn
from fastai.basics import Adam, Callback, Lamb, OptimWrapper, QHAdam, RAdam, RMSProp, SGD

from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.metric import _weighted_sq_norm
from reference import flat_grad


class Stored(Callback):
    "Stores every gradient, flat, with the optimizer's denominators at that time"
    order = -20
    def __init__(self, denominators, log): self.denominators,self.log = denominators,log.append
    def after_backward(self): self.log((flat_grad(self.model), self.denominators(self.learn.opt, self.model)))


def flat(f, model): return torch.cat([torch.as_tensor(f(p)).expand(p.shape).flatten() for p in model.parameters()]).double()


def seen(v, debias, eps): return torch.where(v > 0, (v/debias).sqrt() + eps, math.inf)


def of_fastai(debiased):
    def f(opt, model):
        def one(p):
            s,h = opt.state[p],opt.hypers[0]
            if 'sqr_avg' not in s: return torch.tensor(math.nan)
            return seen(s['sqr_avg'], (1 - h['sqr_mom']**s['step']) if debiased else 1, h['eps'])
        return flat(one, model)
    return f


def of_pytorch(key, debiased):
    def f(opt, model):
        def one(p):
            s = opt.opt.state[p]
            if key not in s: return torch.tensor(math.nan)
            return seen(s[key], (1 - .999**float(s['step'])) if debiased else 1, 1e-8)
        return flat(one, model)
    return f


def groups(opt, model): return flat(lambda p: 1/next(h['lr'] for pg,h in zip(opt.param_lists, opt.hypers) if any(p is o for o in pg)), model)


def split(model): return [list(model[0].parameters()), list(model[2].parameters())]


@pytest.mark.parametrize('opt_func,lr,denominators', [
    (Adam, .01, of_fastai(True)), (RAdam, .01, of_fastai(True)), (QHAdam, .01, of_fastai(True)), (Lamb, .01, of_fastai(True)), (partial(RMSProp, mom=0.), .001, of_fastai(False)),
    (partial(OptimWrapper, opt=torch.optim.Adam), .01, of_pytorch('exp_avg_sq', True)), (partial(OptimWrapper, opt=torch.optim.AdamW, amsgrad=True), .01, of_pytorch('max_exp_avg_sq', True)),
    (partial(OptimWrapper, opt=torch.optim.RMSprop), .001, of_pytorch('square_avg', False)),
    (partial(OptimWrapper, opt=torch.optim.Adagrad), .01, of_pytorch('sum', False)),
    (SGD, slice(.01, .1), groups), (partial(SGD, mom=.9), [.1, .02], groups),
], ids='Adam RAdam QHAdam Lamb RMSProp torch.Adam torch.AMSGrad torch.RMSprop torch.Adagrad SGD SGD-momentum'.split())
def test_equals_the_equation_on_stored_gradients(opt_func, lr, denominators):
    log,learn = [],digits_learner(opt_func=opt_func, splitter=split)
    learn.model.double()
    learn.dls.train.after_batch = lambda b: (b[0].double(), b[1])
    learn.add_cb(Stored(denominators, log))
    with learn.no_bar(), learn.no_logging(): learn.bs_find(lr, 50, 5, n_train=5, show_plot=False, profile=False)
    stats = learn.recorder.bs_stats
    assert stats.batch.tolist() == [10, 20, 30, 40, 50]
    for at,row in stats.set_index('batch').iterrows():
        g,P = torch.stack([g for g,_ in log[at - 5:at]]),1/log[at - 5][1]
        A,C = 16*((g**2)*P).sum(),80*((g.mean(0)**2)*P).sum()
        noise = (A - C)/4
        ratio = noise/((C - noise)/80)
        assert row.opt_raw_noise/row.opt_raw_scale == pytest.approx(float(ratio), rel=1e-3)
    lo,hi = fieller(stats.opt_raw_noise, stats.opt_raw_scale, ema_weights(5, .9))
    assert (stats.opt_lo.iloc[-1], stats.opt_hi.iloc[-1]) == pytest.approx((lo, hi))


def test_a_fresh_adam_counts_from_its_second_moments_on():
    learn = digits_learner(opt_func=Adam)
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.001, 60, 5, n_train=0, show_plot=False, profile=False)
    first,*rest = learn.recorder.bs_stats.opt_raw_noise
    assert math.isnan(first) and np.isfinite(rest).all()
    assert learn.recorder.bs_result.run.opt == 'adam'


def test_sgd_with_one_learning_rate_has_the_simple_geometry():
    learn = digits_learner()
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.1, 60, 5, show_plot=False, profile=False)
    s = learn.recorder.bs_stats
    np.testing.assert_allclose(s.opt_noise_scale, s.noise_scale, rtol=1e-9)
    assert learn.recorder.bs_result.run.opt == 'sgd'


@pytest.mark.parametrize('n', [5, 3*2**20])
def test_large_sparse_and_half_tensors(n, monkeypatch):
    torch.manual_seed(0)
    p,v = nn.Parameter(torch.zeros(n, 1)),torch.rand(n, 1)
    v[1] = 0.
    opt = SGD([p], lr=1.)
    opt.state[p] = dict(sqr_avg=v)
    g = torch.zeros(n, 1)
    g[:4] = torch.tensor([[1.], [2.], [3.], [4.]])
    wanted = float((g**2/v.sqrt().clamp(min=1e-30))[[0, 2, 3]].sum())
    metric = OptMetric(opt, [p])
    for t in (g, g.to_sparse(1), g.bfloat16()): assert float(metric([t])) == pytest.approx(wanted, rel=1e-5)
    assert metric([None, g][1:]).shape == (1,)


def test_modules_add_up_and_frozen_ones_are_left_out():
    learn = digits_learner()
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.1, 200, 5, show_plot=False, profile=False)
    table,last = learn.recorder.bs_layers,learn.recorder.bs_stats.iloc[-1]
    assert table.index.tolist() == ['0', '2'] and table.layer.tolist() == ['Linear']*2 and table.params.tolist() == [4160, 650]
    assert (table.noise.sum(), table.scale.sum()) == pytest.approx((last.noise, last.scale))
    assert ((table.lo < table.noise_scale) & (table.noise_scale < table.hi)).all()
    learn.model[0].requires_grad_(False)
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.1, 200, 5, show_plot=False, profile=False)
    assert learn.recorder.bs_layers.index.tolist() == ['2']
    fig = learn.recorder.plot_bs_layers()
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['2 (Linear)']
    with pytest.raises(ValueError, match='run learn.bs_find'): digits_learner().recorder.plot_bs_layers()


@pytest.mark.parametrize('shape', ((), (4, 1), (4, 3)))
def test_one_second_moment_for_several_weights(shape):
    g,v = torch.randn(4, 3),torch.rand(shape) + .1
    assert float(_weighted_sq_norm(g, v, .9, 1e-3)) == pytest.approx(float((g.square()/((v/.9).sqrt() + 1e-3)).sum()), rel=1e-5)
