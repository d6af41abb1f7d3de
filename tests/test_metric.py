"Noise and scale in the metric of the optimizer, and per module, against second implementations"
import math, random
from functools import partial

import numpy as np, pytest, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, Lamb, Learner, OptimWrapper, Optimizer, QHAdam, RAdam, RMSProp, SGD, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import Larc, Lookahead, ranger

from fastai_bs_finder.all import *
from fastai_bs_finder.grow import GrowBatch
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.noise import GradSums
from footprint import assert_no_footprint
from learners import digits, loaders
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


def of_adamax(opt, model):
    def one(p):
        u = opt.opt.state[p].get('exp_inf')
        return torch.tensor(math.nan) if u is None else torch.where(u > 1e-8, u, math.inf)  # eps is in it: an element without a gradient so far has eps
    return flat(one, model)


def groups(opt, model): return flat(lambda p: 1/next(h['lr'] for pg,h in zip(opt.param_lists, opt.hypers) if any(p is o for o in pg)), model)


def split(model): return [list(model[0].parameters()), list(model[2].parameters())]


@pytest.mark.parametrize('opt_func,lr,denominators', [
    (Adam, .01, of_fastai(True)), (RAdam, .01, of_fastai(True)), (QHAdam, .01, of_fastai(True)), (Lamb, .01, of_fastai(True)), (partial(RMSProp, mom=0.), .001, of_fastai(False)),
    (partial(OptimWrapper, opt=torch.optim.Adam), .01, of_pytorch('exp_avg_sq', True)), (partial(OptimWrapper, opt=torch.optim.AdamW, amsgrad=True), .01, of_pytorch('max_exp_avg_sq', True)),
    (partial(OptimWrapper, opt=torch.optim.RMSprop), .001, of_pytorch('square_avg', False)),
    (partial(OptimWrapper, opt=torch.optim.Adagrad), .01, of_pytorch('sum', False)), (partial(OptimWrapper, opt=torch.optim.Adamax), .01, of_adamax),
    (SGD, slice(.01, .1), groups), (partial(SGD, mom=.9), [.1, .02], groups),
], ids='Adam RAdam QHAdam Lamb RMSProp torch.Adam torch.AMSGrad torch.RMSprop torch.Adagrad torch.Adamax SGD SGD-momentum'.split())
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
    g,p = torch.randn(4, 3),nn.Parameter(torch.zeros(4, 3))
    opt = Adam([p], lr=1., sqr_mom=.9, eps=1e-3)
    opt.state[p] = dict(sqr_avg=torch.rand(shape) + .1, step=3)
    wanted = float((g.square()/((opt.state[p]['sqr_avg']/(1 - .9**3)).sqrt() + 1e-3)).sum())
    metric = OptMetric(opt, [p])
    assert float(metric([g])) == pytest.approx(wanted, rel=1e-5) and float(metric([g.square()], squared=True)) == pytest.approx(wanted, rel=1e-5)


# Does the step normalize the gradient?

def params(*shapes, dtype=None):
    torch.manual_seed(0)
    return [nn.Parameter(.1*torch.randn(shape, dtype=dtype)) for shape in shapes]


class InPlace(torch.optim.Optimizer):
    "An optimizer of a user's own: `move` changes the parameters in place"
    def __init__(self, params, lr): super().__init__(params, dict(lr=lr))
    def each(self): return [(p, group['lr']) for group in self.param_groups for p in group['params'] if p.grad is not None]
    @torch.no_grad()
    def step(self, closure=None): self.move()


class SignSGD(InPlace):
    def move(self):
        for p,lr in self.each(): p -= lr*p.grad.sign()


class NormalizedSGD(InPlace):
    def move(self):
        norm = torch.stack([p.grad.norm() for p,_ in self.each()]).norm()
        for p,lr in self.each(): p -= lr*p.grad/norm


class OwnSGD(InPlace):
    def move(self):
        for p,lr in self.each(): p -= lr*p.grad


class Decays(InPlace):
    "Its weight decay has no name"
    def move(self):
        for p,lr in self.each(): p -= lr*(p.grad + 100*p)


class OwnBuffers(InPlace):
    "Its momentum is made at once, outside of its state"
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.buffers = [torch.zeros_like(p) for group in self.param_groups for p in group['params']]

    def move(self):
        for (p,lr),b in zip(self.each(), self.buffers): p -= lr*b.lerp_(p.grad, .1).sign()


class StateAtOnce(InPlace):
    "Its state is there before the first step"
    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group['params']: self.state[p] = dict(second=torch.zeros_like(p))

    def move(self):
        for p,lr in self.each(): p -= lr*p.grad/(self.state[p]['second'].mul_(.999).add_(p.grad**2).sqrt() + 1e-12)


class EveryNth(InPlace):
    def __init__(self, params, lr, n=16):
        super().__init__(params, lr)
        self.n,self.count = n,0

    def move(self):
        self.count += 1
        for p,lr in self.each():
            total = self.state[p].setdefault('total', torch.zeros_like(p)).add_(p.grad)
            if self.count % self.n == 0:
                p -= lr*total.sign()
                total.zero_()


class RandomSGD(InPlace):
    def move(self):
        for p,lr in self.each(): p -= lr*p.grad*(torch.rand_like(p) + np.random.rand() + random.random())


class Chained(torch.optim.Optimizer):
    "One optimizer for matrices and one for the rest"
    def __init__(self, params, lr, opts):
        super().__init__(params, dict(lr=lr))
        ps = [p for group in self.param_groups for p in group['params']]
        self.opts = [f(ps, lr=lr) for f,ps in zip(opts, ([p for p in ps if p.ndim > 1], [p for p in ps if p.ndim < 2]))]

    def step(self, closure=None):
        for o in self.opts: o.step()


def fastai_sign(ps, lr):
    def sign_step(p, lr, **kwargs): p.data.add_(p.grad.sign(), alpha=-lr)
    return Optimizer(ps, [sign_step], lr=lr)


in_torch = sorted(name for name,o in vars(torch.optim).items() if isinstance(o, type) and issubclass(o, torch.optim.Optimizer) and name not in ('Optimizer', 'LBFGS'))
of_torch = {f'torch.{name}': partial(OptimWrapper, opt=getattr(torch.optim, name)) for name in in_torch}
of_fastai_ = dict(SGD=SGD, momentum=partial(SGD, mom=.9), RMSProp=RMSProp, Adam=Adam, RAdam=RAdam, QHAdam=QHAdam, Larc=Larc, Lamb=Lamb, ranger=ranger,
                  lookahead_of_SGD=lambda ps, lr: Lookahead(SGD(ps, lr=lr, mom=.9)), lookahead_of_Adam=lambda ps, lr: Lookahead(Adam(ps, lr=lr)))
linear = 'SGD', 'momentum', 'lookahead_of_SGD', 'torch.SGD', 'torch.ASGD'


@pytest.mark.parametrize('name', [*of_fastai_, *of_torch])
def test_every_optimizer(name):
    shapes = [(6, 9)] if 'Muon' in name else [(6, 9), (9,), (2, 3, 4)]
    assert normalizes((of_fastai_ | of_torch)[name](params(*shapes), lr=.01)) == (name not in linear)


@pytest.mark.parametrize('cls,wanted', [(SignSGD, True), (NormalizedSGD, True), (OwnSGD, False), (Decays, False), (OwnBuffers, True), (StateAtOnce, True), (EveryNth, True), (partial(EveryNth, n=50), True),
    (RandomSGD, False), (partial(Chained, opts=(torch.optim.Adamax, torch.optim.Rprop)), True), (partial(Chained, opts=(torch.optim.SGD, torch.optim.Adam)), False)])
def test_optimizers_of_users(cls, wanted):
    opt = OptimWrapper(params((6, 9), (9,)), cls, lr=.01)
    assert normalizes(opt) == normalizes(opt.opt) == wanted
    for _ in range(30):
        for p,*_ in opt.all_params(): p.grad = 100*torch.randn_like(p)
        opt.step()
    assert normalizes(opt) == wanted


@pytest.mark.parametrize('kwargs,wanted', [(dict(eps=1e-8), True), (dict(eps=1e-5), True), (dict(eps=1.), False), (dict(wd=10.), True), (dict(wd=10., decouple_wd=False), True), (dict(mom=0.), True)])
def test_settings_of_adam(kwargs, wanted):
    opt = Adam(params((6, 9)), lr=1e-3, **kwargs)
    for p,*_ in opt.all_params(): p.grad = .01*torch.randn_like(p)
    opt.step()
    assert normalizes(opt) == wanted


@pytest.mark.parametrize('opt_func', [fastai_sign, lambda ps, lr: OptimWrapper(opt=Accelerator(cpu=True).prepare(torch.optim.Adamax(ps, lr=lr))), lambda ps, lr: OptimWrapper([ps[:1], ps[1:]], torch.optim.Adamax, lr=lr),
    lambda ps, lr: Adam([ps[:1], ps[1:]], lr=lr), partial(OptimWrapper, opt=torch.optim.Adam, fused=True), partial(OptimWrapper, opt=torch.optim.Rprop, foreach=True), lambda ps, lr: Adam(ps, lr=0.), partial(Adam, wd=1e4, decouple_wd=False)])
def test_ways_to_make_one(opt_func):
    assert normalizes(opt_func(params((6, 9), (9,), (), (0,)), lr=.01))
    AcceleratorState._reset_state(reset_partial_state=True)  # for the processes that other tests fork


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_dtypes(dtype):
    for f,wanted in ((partial(OptimWrapper, opt=torch.optim.Adamax), True), (partial(SGD, mom=.9), False)): assert normalizes(f(params((6, 9), dtype=dtype), lr=.01)) == wanted


@pytest.mark.parametrize('opt_func', [SGD, Adam, lambda ps, lr: Lookahead(SGD(ps, lr=lr)), *(partial(OptimWrapper, opt=o) for o in (torch.optim.Adamax, OwnBuffers, RandomSGD))])
def test_the_experiment_leaves_no_trace(opt_func):
    "Neither with a scheduler, whose `step` is the real optimizer's, nor with hooks"
    opt = opt_func(params((6, 9), (9,)), lr=.01)
    if isinstance(opt, OptimWrapper):
        torch.optim.lr_scheduler.StepLR(opt.opt, 1)
        opt.opt.register_step_post_hook(lambda *_: pytest.fail('a hook of the real optimizer was called'))
    for p,*_ in opt.all_params(): p.grad = torch.ones_like(p)
    def now(): return {str(k): repr(v) for k,v in (vars(opt) | vars(getattr(opt, 'opt', opt))).items()},[(p.data_ptr(), p.clone(), p.grad.clone()) for p,*_ in opt.all_params()]
    def rng(): return random.getstate(),repr(np.random.get_state()),torch.get_rng_state().tolist()
    before,random_state = now(),rng()
    normalizes(opt)
    assert rng() == random_state
    after = now()
    assert after[0] == before[0] and all(a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a,b in zip(after[1], before[1]))


class Stubborn(InPlace):
    "Nothing of it can be copied"
    def __deepcopy__(self, memo): raise TypeError('no copies')
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.lock = (i for i in ())

    def move(self):
        for p,lr in self.each(): self.state[p]['exp_avg_sq'] = p.grad**2


def test_names_decide_where_no_experiment_can_be_made():
    opt = OptimWrapper(params((6, 9)), Stubborn, lr=.01)
    assert not normalizes(opt)
    for p,*_ in opt.all_params(): p.grad = torch.ones_like(p)
    opt.step()
    assert normalizes(opt)


@pytest.mark.parametrize('opt,lr', [(torch.optim.Adamax, .064), (SignSGD, .004)])
def test_the_learning_rate_follows_the_experiment_everywhere(opt, lr):
    learn = digits_learner(opt_func=partial(OptimWrapper, opt=opt))
    with learn.no_bar(), learn.no_logging():
        learn.bs_find(lr, 400, show_plot=False, profile=False)
        result = learn.recorder.bs_result
        assert result.run.opt == 'adam' and lr < result.at_bs(128)['lr'] < 8**.5*lr
        learn.bs_sweep([16], budget=dict(steps=3), lrs=[lr], show_plot=False)
        assert learn.recorder.bs_sweep_result.opt == 'adam'
        learn.fit(1, lr, cbs=NoiseScale(share=None))
        assert learn.recorder.noise_scale_result.opt == 'adam'


# Complex parameters

class ComplexDigits(nn.Module):
    "A complex layer between real ones"
    def __init__(self, dtype=torch.complex64):
        super().__init__()
        self.into = nn.Linear(64, 16, dtype=dtype.to_real())
        self.w,self.b = nn.Parameter(torch.randn(16, 12, dtype=dtype)/4),nn.Parameter(torch.zeros(12, dtype=dtype))
        self.out = nn.Linear(12, 10, dtype=dtype.to_real())

    def forward(self, x): return self.out((self.into(x).to(self.w.dtype) @ self.w + self.b).tanh().abs())


class ComplexConv(nn.Module):
    "All of it is complex"
    def __init__(self):
        super().__init__()
        self.conv,self.out = nn.Conv2d(1, 4, 3, dtype=torch.complex64),nn.Linear(4*36, 10, dtype=torch.complex64)

    def forward(self, x): return self.out(torch.fft.fft2(self.conv(x.view(-1, 1, 8, 8).to(torch.complex64))).flatten(1)/8).abs()


def complex_learner(opt_func=SGD, make=ComplexDigits, n=480):
    set_seed(1)
    model,(X,y) = make(),digits()
    X = X.to(next(model.parameters()).dtype.to_real())
    return Learner(loaders(list(zip(X[:n], y[:n]))), model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func).remove_cb(ProgressCallback)


def as_real(t): return torch.view_as_real(t).flatten() if t.is_complex() else t.flatten()


def denominators(opt, p):
    "What the optimizer divides each real number of a parameter by"
    s,group = getattr(opt, 'opt', opt).state[p],getattr(opt, 'opt', opt).param_groups[0]
    if 'exp_inf' in s: return torch.where(as_real(s['exp_inf']) > 1e-8, as_real(s['exp_inf']), math.inf)
    key = next((k for k in ('max_exp_avg_sq', 'exp_avg_sq', 'square_avg', 'sum') if k in s), None)
    if key is None: return torch.ones_like(as_real(p))
    return seen(as_real(s[key]), 1 - .999**float(s['step']) if 'exp' in key else 1., group['eps'])


@pytest.mark.parametrize('make', [ComplexDigits, partial(ComplexDigits, torch.complex128), ComplexConv], ids=['complex64', 'complex128', 'convolution'])
@pytest.mark.parametrize('opt_func', [SGD, *(partial(OptimWrapper, opt=getattr(torch.optim, o)) for o in 'Adam NAdam RMSprop Adagrad Adamax'.split()), partial(OptimWrapper, opt=torch.optim.AdamW, amsgrad=True)],
                         ids='SGD Adam NAdam RMSprop Adagrad Adamax AMSGrad'.split())
def test_complex_gradients_one_by_one(opt_func, make):
    "Batches of a single example are the per-example gradients: noise and scale are then those of the data, exactly"
    learn = complex_learner(opt_func, make)
    learn.fit(1, 1e-3)
    params,(X,y) = list(learn.model.parameters()),learn.dls.train.one_batch()
    metric = OptMetric(learn.opt, params)
    sums,rows = GradSums((metric,)),[]
    for i in range(len(X)):
        grads = torch.autograd.grad(learn.loss_func(learn.model(X[i:i+1]), y[i:i+1]), params)
        sums.add(grads, 1)
        rows.append(torch.cat([as_real(g) for g in grads]).double())
    R,P = torch.stack(rows),1/torch.cat([denominators(learn.opt, p) for p in params]).double()
    found = sums.per_tensor()
    for i,weights in enumerate([torch.ones_like(P), P][:1 + metric.adaptive]):
        noise = float((R.var(0)*weights).sum())
        assert found.noise[i].sum() == pytest.approx(noise, rel=1e-4)
        assert found.scale[i].sum() == pytest.approx(float((R.mean(0)**2*weights).sum()) - noise/len(X), rel=1e-3, abs=1e-4*noise)


@pytest.mark.parametrize('make,opt_func', [(ComplexDigits, partial(SGD, mom=.9)), (ComplexDigits, Adam), (ComplexConv, partial(OptimWrapper, opt=torch.optim.Adam)), (ComplexDigits, partial(OptimWrapper, opt=torch.optim.RMSprop))],
                         ids=['SGD', 'Adam', 'torch.Adam, convolution', 'torch.RMSprop'])
def test_everything_takes_complex_parameters(make, opt_func):
    def make_learner():
        learn = complex_learner(opt_func, make)
        learn.fit(1, 1e-3)
        return learn
    def find(learn):
        learn.bs_find(1e-3, 60, 5, show_plot=False, profile=False)
        learn.max_bs()
        learn.bs_sweep([16, 32], budget=dict(steps=3), lrs=[1e-3], show_plot=False)
    assert_no_footprint(make_learner, find, lambda learn: learn.fit(1, 1e-3))
    learn = make_learner()
    for cb in (NoiseScale(share=None, n_batch=3), GrowBatch(n_batch=3)): learn.fit(2, 1e-3, cbs=cb)
    assert np.isfinite(learn.recorder.noise_scale[['noise', 'opt_noise']]).all(axis=None)


def test_accumulated_complex_gradients_are_those_of_the_whole_batch():
    after = []
    for bs,fits in ((16, 16), (64, 64), (64, 16)):
        learn = complex_learner(n=448)
        learn.dls.train.shuffle = False
        learn.set_bs(bs, fits=fits)
        learn.fit(1, .05)
        after.append([p.detach().clone() for p in learn.model.parameters()])
    for small,whole,pieces in zip(*after):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(small, whole)
