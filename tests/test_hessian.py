"The full noise scale in benchmarks/hessian.py, against explicit Hessians"
import math, sys
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn
from fastai.callback.fp16 import MixedPrecision
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.finder import BSFinder
from fastai_bs_finder.noise import GradSums
from reference import flat_grad

sys.path.append(str(Path(__file__).parents[1]/'benchmarks'))
from hessian import HessianFinder, HessianSums


def hessian_at(model, x, y, loss_func):
    shapes = [(k, p.shape, p.numel()) for k,p in model.named_parameters()]
    def loss(w):
        parts = dict(zip([k for k,*_ in shapes], [o.view(s) for o,(_,s,_) in zip(w.split([n for *_,n in shapes]), shapes)]))
        return loss_func(torch.func.functional_call(model, parts, (x,)), y)
    return torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_hessian_sums_against_explicit_hessians():
    torch.manual_seed(0)
    model,loss_func = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(),nn.CrossEntropyLoss()
    params,sums,hess = list(model.parameters()),GradSums(),HessianSums()
    own,other,n,sizes,grads = [],0.,0,(5, 8, 3, 6),[]
    for b in sizes:
        x,y = torch.randn(b, 4).double(),torch.randint(2, (b,))
        H = hessian_at(model, x, y, loss_func)
        model.zero_grad()
        loss = loss_func(model(x), y)
        hess.add(loss, params, sums)
        loss.backward()
        if grads:
            u = H @ grads[-1]
            own.append(float(grads[-1] @ u))
            for g,bb in list(zip(grads, sizes))[:-1]:
                other += float(bb*(g @ u))
                n += bb
        grads.append(flat_grad(model))
        sums.add([p.grad for p in params], b)
        hess.keep([p.grad.clone() for p in params], b)
    scale = other/n
    noise = np.mean([b*(o - scale) for b,o in zip(sizes, own)])
    assert hess.noise_and_scale() == pytest.approx((noise, scale), rel=1e-6)
    assert all(map(math.isnan, HessianSums().noise_and_scale()))


def test_hessian_sums_see_the_steep_direction():
    "The noise is the same in two directions, and the gradient lies in the flat one: the steep one is the one to mind"
    torch.manual_seed(0)
    H,G,w = torch.tensor([1., 100.]),torch.tensor([1., .1]),torch.zeros(2, requires_grad=True)
    def measure(k=200, bs=4):
        sums,hess = GradSums(),HessianSums()
        for _ in range(k):
            a = -G/H + torch.randn(bs, 2)/H  # per-example gradients at w = 0: G + noise of variance 1 in each direction
            loss = (H*(w - a)**2).sum(1).mean()/2
            hess.add(loss, [w], sums)
            g = torch.autograd.grad(loss, w)
            sums.add(g, bs)
            hess.keep(g, bs)
        return sums.noise_and_scale(),hess.noise_and_scale()
    simple,full = np.mean([measure() for _ in range(20)], 0)
    assert simple[0]/simple[1] == pytest.approx(2/1.01, rel=.15)
    assert full[0]/full[1] == pytest.approx((1 + 100)/(1 + 100*.01), rel=.15)


def test_hessian_finder_adds_columns():
    def found(finder):
        learn = digits_learner()
        with learn.no_bar(), learn.no_logging(): learn.bs_find(.1, 100, 5, show_plot=False, profile=False, finder=finder)
        return learn.recorder.bs_stats
    a,b = found(BSFinder),found(HessianFinder)
    np.testing.assert_allclose(b[a.columns], a, rtol=1e-5)   # what else is measured stays the same
    assert len(b) and np.isfinite(b.full_raw_noise).all() and not set(b.columns) - set(a.columns) - {c for c in b if c.startswith('full_')}


class Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x): return 2*g*x
    @staticmethod
    def backward(ctx, _): raise RuntimeError("no second derivative here")


class Once(torch.autograd.Function):
    "A square that has only a first derivative"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2
    @staticmethod
    def backward(ctx, g): return Last.apply(g, *ctx.saved_tensors)


class Squares(nn.Module):
    def forward(self, x): return Once.apply(x)


@pytest.mark.parametrize('change,msg', [
    (lambda learn: learn.model.insert(1, Squares()), 'needs second derivatives of the loss, and one is missing: no second derivative here'),
    (lambda learn: learn.add_cb(MixedPrecision()), 'needs full precision'),
])
def test_hessian_errors(change, msg):
    learn = digits_learner()
    change(learn)
    weights = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=msg): learn.bs_find(.1, 40, finder=HessianFinder)
    assert all(torch.equal(a, b) for a,b in zip(weights, learn.model.parameters())) and not hasattr(learn.recorder, 'bs_stats')
