"AccumulateGrads against one backward pass over exactly the examples of each window"
import numpy as np, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, L, set_seed
from fastai.callback.core import CancelBatchException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.losses import BaseLoss
from fastai.optimizer import Adam, SGD
from fastai.torch_core import find_bs
from hypothesis import example, given, settings, strategies as st
from torch import nn

from fastai_bs_finder.accumulate import AccumulateGrads
from learners import digits


def net():
    set_seed(1)
    return nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


def exact_loss(pred, y): return nn.functional.cross_entropy(pred, y).float()  # fastai's Recorder takes no float64


def learner(n, bs, opt_func=SGD, drop_last=False, lr=.1, exact=False, **kwargs):
    X,y = digits()
    ds = list(zip(X[:n].double() if exact else X[:n], y[:n]))
    dls = DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=False, drop_last=drop_last)
    return Learner(dls, net().double() if exact else net(), loss_func=exact_loss if exact else CrossEntropyLossFlat(), opt_func=opt_func, lr=lr, **kwargs)


def fit(learn, n_epoch, cbs, how='fit', **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n_epoch, cbs=cbs, **kwargs)
    return [p.detach().clone() for p in learn.model.parameters()]


class Steps(Callback):
    "Keeps the gradient of each step, as the optimizer gets it"
    order = 20
    def before_fit(self): self.grads,self.lrs = [],[]
    def before_step(self):
        self.grads.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        self.lrs.append(self.opt.hypers[-1]['lr'])


def windows(n, bs, n_acc, drop_last):
    "The examples of each step in an epoch"
    res,window = [],[]
    for i in range(0, n - n%bs if drop_last else n, bs):
        window += range(i, min(i + bs, n))
        if len(window) >= n_acc: res,window = res + [window],[]
    return res + [window]*bool(window)


def reference(n, bs, n_acc, drop_last, epochs, opt_func, lr=.1):
    "Gradients and final parameters of a plain loop with one backward pass per window"
    (X,y),model,grads = digits(),net().double(),[]
    opt = opt_func(list(model.parameters()), lr=lr, wd=0.)
    for _ in range(epochs):
        for idxs in windows(n, bs, n_acc, drop_last):
            exact_loss(model(X[idxs].double()), y[idxs]).backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            opt.step()
            opt.zero_grad()
    return grads,list(model.parameters())


def compare(callback, n, bs, n_acc, drop_last, epochs, opt_func):
    learn,steps = learner(n, bs, opt_func, drop_last, exact=True, wd=0.),Steps()
    params = fit(learn, epochs, [callback(n_acc), steps])
    grads,wanted = reference(n, bs, n_acc, drop_last, epochs, opt_func)
    assert len(steps.grads) == len(grads)
    for a,b in zip([*steps.grads, *params], [*grads, *wanted]): torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-8)


def adam(params, **kwargs): return Adam(params, **(dict(eps=1e-3) | kwargs))  # with 1e-5 the sign of rounding errors decides about its first steps


def test_a_batch_that_is_a_window_is_not_weighed():
    "It costs two more losses; the rest of an epoch is no window of its own"
    weighed = []
    class Weighs(AccumulateGrads):
        def before_fit(self):
            super().before_fit()
            was = self.batch_loss.weight
            self.batch_loss.weight = lambda *args: weighed.append(self.iter) or was(*args)
    steps,window = Steps(),Weighs(32)
    alone = fit(learner(100, 32), 1, [window, steps])
    assert window.batch_loss.kind == 'mean'  # `NoiseScale` goes by it
    assert weighed == [3] and len(steps.grads) == 4
    assert all(torch.equal(a, b) for a,b in zip(alone, fit(learner(100, 32), 1, [])))
    fit(learner(100, 32), 1, [Weighs(64)])
    assert weighed == [3, 0, 1, 2, 3]


@pytest.mark.parametrize('opt_func', (SGD, adam))
def test_110_examples(opt_func):
    compare(AccumulateGrads, 110, 8, 32, False, 2, opt_func)
    assert list(map(len, windows(110, 8, 32, False))) == [32, 32, 32, 14]


def test_fastais_own_accumulation_fails_the_same_test():
    with pytest.raises(AssertionError): compare(GradientAccumulation, 110, 8, 32, False, 2, SGD)


@example(n=7, bs=3, n_acc=2, drop_last=False, epochs=2, opt_func=SGD)
@example(n=20, bs=6, n_acc=100, drop_last=True, epochs=2, opt_func=SGD)
@given(n=st.integers(1, 120), bs=st.integers(1, 40), n_acc=st.integers(1, 130), drop_last=st.booleans(), epochs=st.integers(1, 3), opt_func=st.sampled_from([SGD, adam]))
@settings(max_examples=settings.default.max_examples//8)
def test_equals_one_backward_over_the_window(n, bs, n_acc, drop_last, epochs, opt_func):
    compare(AccumulateGrads, n, min(n, bs), n_acc, drop_last, epochs, opt_func)


@pytest.mark.parametrize('n,how', [(128, 'fit_one_cycle'), (110, 'fit_one_cycle'), (110, 'fit_flat_cos'), (110, 'fit_sgdr')])
def test_schedules_advance_by_steps(n, how):
    args = dict(cycle_len=2) if how == 'fit_sgdr' else {}
    (a,steps_a),(b,steps_b) = [(learner(n, bs, opt_func=adam), Steps()) for bs in (8, 32)]
    params = fit(a, 2, [AccumulateGrads(32), steps_a], how, **args)
    wanted = fit(b, 2, [steps_b], how, **args)
    assert steps_a.lrs == pytest.approx(steps_b.lrs)
    for p,q in zip(params, wanted): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_accumulated_gradient_is_clipped():
    clipped = [fit(learner(110, bs), 2, [*cbs, GradientClip(.1)]) for bs,cbs in ((8, [AccumulateGrads(32)]), (32, []))]
    for p,q in zip(*clipped): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


class Scaled(Callback):
    "What MixedPrecision does to loss and gradients in fp16, without fp16: the loss times a power of two, the gradients divided by it before the step"
    order = MixedPrecision.order
    def before_backward(self): self.learn.loss_grad = self.loss_grad*1024
    def before_step(self):
        for p in self.model.parameters(): p.grad /= 1024


def test_loss_scaling():
    scaled = [fit(learner(110, 8), 2, [AccumulateGrads(32), *cbs]) for cbs in ([], [Scaled()])]
    for p,q in zip(*scaled): torch.testing.assert_close(p, q)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_mixed_precision_on_a_gpu():
    a,b = [fit(learner(110, bs).to_fp16(), 2, cbs) for bs,cbs in ((8, AccumulateGrads(32)), (32, None))]
    for p,q in zip(a, b): torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_an_overflow_drops_the_window_and_no_more():
    class Overflow(Callback):
        order = MixedPrecision.order
        def before_step(self):
            if self.epoch == 0 and self.iter == 3:
                from fastai.callback.core import CancelStepException
                raise CancelStepException
    learn,steps = learner(64, 8),Steps()
    fit(learn, 1, [AccumulateGrads(32), Overflow(), steps])
    X,y = digits()
    model = net()
    nn.functional.cross_entropy(model(X[32:64]), y[32:64]).backward()
    torch.testing.assert_close(steps.grads[-1], torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert len(steps.grads) == 1


def test_what_other_callbacks_add_to_the_loss_is_a_mean_too():
    "Added early or late"
    def penalty(order):
        def after_loss(self): self.learn.loss_grad = self.loss_grad + self.model[0].weight.square().sum()
        return type('Penalty', (Callback,), dict(order=order, after_loss=after_loss))()
    a,b,c = [fit(learner(110, bs), 2, cbs) for bs,cbs in ((32, [penalty(0)]), (8, [penalty(0), AccumulateGrads(32)]), (8, [penalty(70), AccumulateGrads(32)]))]
    for p,q,r in zip(a, b, c):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(p, r, rtol=1e-4, atol=1e-6)


def test_the_recorded_losses_are_means_per_example():
    learn = learner(110, 8, lr=0., train_bn=False)
    learn.recorder.train_metrics = True
    fit(learn, 1, AccumulateGrads(32), lr=0.)
    X,y = digits()
    loss = nn.functional.cross_entropy(learn.model(X[:110]), y[:110]).item()
    train_loss,valid_loss = learn.recorder.values[-1][:2]
    assert train_loss == pytest.approx(np.mean([nn.functional.cross_entropy(learn.model(X[i:min(i + 8, 110)]), y[i:min(i + 8, 110)]).item() for i in range(0, 110, 8)]), rel=.02)
    assert valid_loss == pytest.approx(loss, rel=1e-5)


def test_mixup():
    "Draws its weights per micro-batch, so only that it trains on all examples can be told"
    learn = learner(110, 8)
    learn.loss_func = CrossEntropyLossFlat()
    steps = Steps()
    fit(learn, 2, [MixUp(), AccumulateGrads(32), steps])
    assert len(steps.grads) == 8 and all(torch.isfinite(g).all() for g in steps.grads)


@pytest.mark.parametrize('pct,sizes', [(.3, [32, 16]), (.5, [32, 32])])
def test_an_epoch_that_ends_early_loses_nothing(pct, sizes):
    learn,steps = learner(110, 8),Steps()
    seen = []
    class Count(Callback):
        order = AccumulateGrads.order - 1
        def before_step(self):
            if self.accumulate_grads._completes(self.accumulate_grads.count): seen.append(self.accumulate_grads.count)
    fit(learn, 1, [ShortEpochCallback(pct), AccumulateGrads(32), Count(), steps])
    assert seen == sizes and len(steps.grads) == len(sizes)


def test_a_batch_that_is_skipped_does_not_count():
    class Skip(Callback):
        def before_batch(self):
            if self.training and self.iter in (1, 13): raise CancelBatchException
    learn,steps = learner(110, 8),Steps()
    fit(learn, 1, [AccumulateGrads(32), Skip(), steps])
    (X,y),model,grads = digits(),net(),[]
    left = [i for i in range(110) if i//8 not in (1, 13)]
    for idxs in (left[:32], left[32:64], left[64:]):
        model.zero_grad()
        nn.functional.cross_entropy(model(X[idxs]), y[idxs]).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        with torch.no_grad():
            for p in model.parameters(): p -= .1*p.grad
    assert len(steps.grads) == len(grads)
    for a,b in zip(steps.grads, grads): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


class Boom(Callback):
    "Breaks off in the middle of a window"
    order = 70
    def after_batch(self):
        if self.training and self.iter == 1: raise self.error


@pytest.mark.parametrize('error', (KeyboardInterrupt, RuntimeError('boom')))
@pytest.mark.parametrize('stays', (False, True))
def test_a_window_that_was_broken_off_is_forgotten(error, stays):
    "Whether the callback was given to `fit` or stays on the learner"
    a,b,boom = learner(110, 8),learner(110, 8),Boom()
    boom.error = error
    if stays: a.add_cb(AccumulateGrads(32))
    with pytest.raises((KeyboardInterrupt, RuntimeError)): fit(a, 1, [boom] + [AccumulateGrads(32)]*(not stays))
    if stays: assert a.accumulate_grads.count == 16
    else: assert not any(p.grad.any() for p in a.model.parameters())
    again = fit(a, 1, [] if stays else AccumulateGrads(32))
    for p,q in zip(again, fit(b, 1, AccumulateGrads(32))): assert torch.equal(p, q)


@pytest.mark.parametrize('n_acc', (0, -1, 2.5, True, '32', None))
def test_bad_n_acc(n_acc):
    with pytest.raises(ValueError, match='n_acc=.* is not a whole number of 1 or more'): AccumulateGrads(n_acc)


def test_two_accumulations_are_an_error():
    learn = learner(110, 8)
    was = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match='2 callbacks that accumulate gradients, .*GradientAccumulation.*remove_cb'): fit(learn, 1, [GradientAccumulation(32), AccumulateGrads(32)])
    assert all(map(torch.equal, was, learn.model.parameters())) and not any(isinstance(o, GradientAccumulation) for o in learn.cbs)


def test_batches_that_cannot_be_counted():
    learn = learner(20, 4)
    class Hide(Callback):
        order = 3
        def before_batch(self): self.learn.xb,self.learn.yb = (dict(x=self.x),),(dict(y=self.y),)
    learn.model,learn.loss_func = nn.Module(),lambda p, t: nn.functional.cross_entropy(p, t['y'])
    learn.model.net = net()
    learn.model.forward = lambda b: learn.model.net(b['x'])
    fit(learn, 1, [Hide(), AccumulateGrads(8)])  # fastai's find_bs finds a tensor in a dictionary
    learn.loss_func = lambda p, t: nn.functional.cross_entropy(p, t.y)
    class Hidden:
        def __init__(self, y): self.y = y
    class HideMore(Callback):
        order = 3
        def before_batch(self): self.learn.xb,self.learn.yb = (Hidden(self.x),),(Hidden(self.y),)
    learn.model.forward = lambda b: learn.model.net(b.y)
    with pytest.raises(ValueError, match='cannot be counted'): fit(learn, 1, [HideMore(), AccumulateGrads(8)])


def test_ddp_sends_each_window_once(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        learn,sent = learner(110, 8),[]
        def hook(state, bucket):
            sent.append(bucket.buffer().clone())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future
        learn.model = nn.parallel.DistributedDataParallel(learn.model)
        learn.model.register_comm_hook(None, hook)
        params = fit(learn, 1, AccumulateGrads(32))
        assert len(sent) == 4
        for p,q in zip(params, fit(learner(110, 32), 1, None)): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    finally: torch.distributed.destroy_process_group()


def test_a_loader_that_gives_more_than_it_says():
    class More(torch.utils.data.IterableDataset):
        def __len__(self): return 64
        def __iter__(self): return iter(list(zip(digits()[0][:100], digits()[1][:100])))
    learn,steps = learner(32, 8),Steps()
    learn.dls.loaders[0] = torch.utils.data.DataLoader(More(), 8)
    fit(learn, 1, [AccumulateGrads(32), steps], 'fit_one_cycle')
    assert len(steps.grads) >= 3
