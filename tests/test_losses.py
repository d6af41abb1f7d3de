"What a loss is, what batches weigh in it, and what follows for measurements and accumulated gradients"
import random
from collections import OrderedDict, UserDict, namedtuple
from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, DataLoaders, Learner, SGD, set_seed
from fastai.callback.mixup import MixUp
from fastai.losses import DiceLoss, FocalLossFlat, LabelSmoothingCrossEntropy

from fastai_bs_finder.all import *
from fastai_bs_finder.grow import GrowBatch
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.losses import BatchLoss
from reference import per_example_grads

n,classes = 24,5
rng = torch.Generator().manual_seed(0)
logits,y = torch.randn(n, classes, generator=rng),torch.randint(0, classes, (n,), generator=rng)
weight = torch.tensor([1., 20, 1, 1, 5])
some = torch.where(torch.arange(n) % 3 == 0, -100, y)
words,next_words = torch.randn(n, 7, classes, generator=rng),torch.randint(0, classes, (n, 7), generator=rng)
cut_short = torch.where(torch.arange(7) > torch.randint(1, 7, (n, 1), generator=rng), -100, next_words)


def cut(o, start, stop): return tuple(t[start:stop] for t in o) if isinstance(o, tuple) else o[start:stop]
def look(loss_func, pred, *yb): return BatchLoss().look(loss_func, pred, yb, len(yb[0]), cut)
def tokens(p, t, **kwargs): return F.cross_entropy(p.reshape(-1, classes), t.reshape(-1), **kwargs)
def elbo(p, t): return F.mse_loss(p[0], p[1], reduction='sum') + p[2].pow(2).sum()
def probabilities(p, t): return F.binary_cross_entropy(p.sigmoid(), F.one_hot(t, classes).to(p))
def masked(p, t):
    mask = (t > 1).to(p)
    return (F.cross_entropy(p, t, reduction='none')*mask).sum()/mask.sum()
def dice(p, t):
    p,t = p.sigmoid(),F.one_hot(t, classes)
    return 1 - 2*(p*t).sum()/(p.sum() + t.sum())
def views(z, t):
    "Two views of each example, one behind the other (SimCLR)"
    k = len(z)//2
    return F.cross_entropy((z @ z.T).fill_diagonal_(-1e9), torch.cat([torch.arange(k) + k, torch.arange(k)]))
def spread(p, t): return ((p[:, 0] - t)**2).mean()/p[:, 0].var()
def hardest(p, t): return F.cross_entropy(p, t, reduction='none').topk(len(t)//2).values.mean()
def barlow(p, t): return ((p - p.mean(0)).T @ (p - p.mean(0))/len(p)).pow(2).sum()
def triplets(p, t): return F.triplet_margin_loss(p, p.roll(1, 0), p.roll(2, 0))


@pytest.mark.parametrize('kind,loss,args', [
    ('mean', CrossEntropyLossFlat(), (logits, y)), ('mean', F.cross_entropy, (logits, y)), ('mean', FocalLossFlat(), (logits, y)),
    ('mean', LabelSmoothingCrossEntropy(), (logits, y)), ('mean', probabilities, (logits, y)), ('mean', nn.L1Loss(), (logits[:, 0], y)),
    ('mean', nn.MSELoss(), (logits, logits.roll(1, 0))), ('mean', tokens, (words, next_words)), ('mean', lambda p, t: F.cross_entropy(p, t) + 3., (logits, y)),
    ('mean', F.cross_entropy, (logits.half(), y)), ('mean', nn.KLDivLoss(reduction='batchmean'), (logits.log_softmax(1), logits.roll(1, 0).softmax(1))),
    ('sum', partial(F.cross_entropy, reduction='sum'), (logits, y)), ('sum', nn.MSELoss(reduction='sum'), (logits, logits.roll(1, 0))),
    ('sum', elbo, ((logits, logits.roll(1, 1), logits), y)), ('sum', DiceLoss(), (logits[..., None], y[:, None])), ('sum', lambda p, t: tokens(p, t)*len(t), (words, next_words)),
    ('weighted', CrossEntropyLossFlat(weight=weight), (logits, y)), ('weighted', nn.NLLLoss(weight=weight), (logits.log_softmax(1), y)),
    ('weighted', lambda p, t: F.cross_entropy(p, t, weight=weight), (logits, y)), ('weighted', F.cross_entropy, (logits, some)),
    ('weighted', tokens, (words, cut_short)), ('weighted', masked, (logits, y)),
    ('between', lambda z, t: F.cross_entropy(z @ z.T, torch.arange(len(z))), (logits, y)), ('between', spread, (logits, y)), ('between', hardest, (logits, y)),
    ('between', barlow, (logits, y)), ('between', dice, (logits, y)), ('sum', nn.GaussianNLLLoss(reduction='sum'), (logits[:, 0], y, torch.ones(n))), ('between', lambda p, t: F.cross_entropy(p, t).sqrt(), (logits, y)),
    ('', lambda p, t: F.cross_entropy(p + torch.randn_like(p), t), (logits, y)), ('', lambda p, t: F.cross_entropy(p.view(n, -1), t), (logits, y))])
def test_kinds(kind, loss, args):
    before = torch.get_rng_state(),np.random.get_state()[1].tolist(),random.getstate(),logits.clone()
    assert look(loss, *args) == kind
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]
    assert torch.equal(logits, before[3]) and getattr(loss, 'reduction', 'mean') != 'none'


class Queue(nn.Module):
    "Keeps the last predictions, to compare the next with"
    def __init__(self): super().__init__(); self.register_buffer('last', torch.zeros(0, classes)); self.calls = 0
    def forward(self, p, t):
        self.calls += 1
        self.last = torch.cat([self.last, p.detach()])[-50:]
        return (p @ self.last.T).logsumexp(1).mean()


def test_a_loss_that_keeps_what_it_sees_is_not_disturbed():
    loss = Queue()
    found = BatchLoss()
    found.look(loss, logits, (y,), n, cut)
    found.weight(loss, logits, (y,), n, cut)
    assert loss.calls == 0 and len(loss.last) == 0


def test_a_training_that_accumulates_calls_a_loss_with_a_state_once_per_batch():
    learn = digits_learner(bs=16)
    learn.loss_func = Counting()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1, cbs=AccumulateGrads(64))
    assert learn.loss_func.seen == len(learn.dls.train) + len(learn.dls.valid)


class Counting(nn.Module):
    "A warm-up of the loss itself"
    def __init__(self): super().__init__(); self.register_buffer('seen', torch.zeros(()))
    def forward(self, p, t):
        self.seen += 1
        return F.cross_entropy(p, t)*min(float(self.seen)/100, 1)


def test_two_batches_of_one_example():
    for kind,loss in dict(mean=F.cross_entropy, sum=lambda p, t: F.cross_entropy(p, t, reduction='sum'), weighted=CrossEntropyLossFlat(weight=weight)).items():
        found = BatchLoss()
        assert [found.look(loss, logits[i:i + 1], (y[i:i + 1],), 1, cut) for i in (list(y).index(1), list(y).index(0))] == ['', kind]


def test_a_mean_by_chance_is_found_out():
    loss,found = CrossEntropyLossFlat(weight=weight),BatchLoss()
    ones = torch.full_like(y, 1)
    assert [found.look(loss, logits, (t,), n, cut) for t in (ones, y, ones)] == ['mean', 'weighted', 'weighted']


@pytest.mark.parametrize('loss,target,weights', [(CrossEntropyLossFlat(weight=weight), y, weight[y]), (lambda p, t: F.cross_entropy(p, t, weight=weight.to(p)), y, weight[y]),
                                                 (F.cross_entropy, some, (some >= 0).float()), (masked, y, (y > 1).float())])
def test_weights(loss, target, weights):
    found = BatchLoss()
    found.look(loss, logits, (target,), n, cut)
    parts = [slice(0, 3), slice(3, 4), slice(4, 15), slice(15, 24)]
    ws = np.array([found.weight(loss, logits[p], (target[p],), len(target[p]), cut) for p in parts])
    np.testing.assert_allclose(ws/ws.sum(), [weights[p].sum()/weights.sum() for p in parts], rtol=1e-5)


class Grab(Callback):
    "Keeps the gradients of the first step, and makes none"
    order = 90
    def before_step(self):
        self.learn.grabbed = [p.grad.clone() for p in self.learn.model.parameters()]
        raise CancelFitException


def first_step(model, items, bs, n_acc, loss, collate=None):
    "The gradient of the first step"
    dls = DataLoaders(*(torch.utils.data.DataLoader(items, bs, collate_fn=collate) for _ in range(2)))
    learn = Learner(dls, model, loss_func=loss, opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0., cbs=[Grab()] + [AccumulateGrads(n_acc)]*(n_acc > bs))
    for p in model.parameters(): p.grad = None
    return torch.cat([g.flatten() for g in learn.grabbed])


def assert_same_step(model, items, bs, loss, collate=None):
    whole,pieces = (first_step(model, items, size, len(items), loss, collate) for size in (len(items), bs))
    assert (pieces - whole).norm() <= 1e-5*whole.norm()


losses = dict(flat=CrossEntropyLossFlat, module=nn.CrossEntropyLoss, function=lambda **kwargs: partial(F.cross_entropy, **kwargs),
              closure=lambda **kwargs: lambda p, t: F.cross_entropy(p, t, **kwargs))


@given(n=st.integers(2, 30), bs=st.integers(1, 12), loss=st.sampled_from(list(losses)), weighted=st.booleans(), smoothing=st.sampled_from([0., .1]),
       reduction=st.sampled_from(['mean', 'sum']), ignored=st.floats(0, .9), seed=st.integers(0, 10_000))
def test_accumulated_is_the_whole_batch(n, bs, loss, weighted, smoothing, reduction, ignored, seed):
    torch.manual_seed(seed)
    X,t,model = torch.randn(n, 4),torch.randint(0, classes, (n,)),nn.Linear(4, classes)
    t[1:][torch.rand(n - 1) < ignored] = -100
    loss_func = losses[loss](reduction=reduction, label_smoothing=smoothing, **dict(weight=weight) if weighted else {})
    assert_same_step(model, list(zip(X, t)), min(bs, n - 1), loss_func)


@given(lengths=st.lists(st.integers(1, 7), min_size=2, max_size=20), bs=st.integers(1, 8), time_first=st.booleans(), seed=st.integers(0, 10_000))
@settings(max_examples=20)
def test_accumulated_sentences_of_different_lengths(lengths, bs, time_first, seed):
    "A mean over the words of all of them"
    torch.manual_seed(seed)
    items = [(torch.randn(7, 4), F.pad(torch.randint(0, classes, (k,)), (0, 7 - k), value=-100)) for k in lengths]
    def collate(b): return tuple(torch.stack(o, int(time_first)) for o in zip(*b))
    assert_same_step(nn.Linear(4, classes), items, min(bs, len(items) - 1), tokens, collate)


class ByAttribute(OrderedDict):
    "A dictionary whose values are attributes, too, as Hugging Face's models return it"
    def __getattr__(self, k):
        try: return self[k]
        except KeyError as e: raise AttributeError(k) from e


class Wrapped(UserDict):
    "A mapping that is no `dict`, as Hugging Face's tokenizers return it"


class Cache:
    "What a model hands on for the next call, and cannot be cut into examples"


class Returns(nn.Module):
    "A model whose output is a structure of some class"
    def __init__(self, make):
        super().__init__()
        self.lin,self.make = nn.Linear(4, classes),make

    def forward(self, x): return self.make(self.lin(x))


Named = namedtuple('Named', 'logits hidden')
outputs = {
    'attributes': (lambda p: ByAttribute(logits=p, hidden=None), lambda o: o.logits),
    'named': (lambda p: Named(p, (p, p)), lambda o: o.logits),
    'wrapped': (lambda p: Wrapped(logits=p), lambda o: o['logits']),
    'list': (lambda p: [p, 'name'], lambda o: o[0]),
    'a loss of its own beside them': (lambda p: ByAttribute(loss=p.mean(), logits=p), lambda o: o.logits),
    'a cache beside them': (lambda p: ByAttribute(logits=p, past=Cache()), lambda o: o.logits),
}


@pytest.mark.parametrize('name', outputs)
def test_what_a_model_returns_keeps_its_class(name):
    "A loss over words, by a function that looks into it; sentences of several lengths"
    make,logits_of = outputs[name]
    torch.manual_seed(0)
    items = [(torch.randn(7, 4), F.pad(torch.randint(0, classes, (k,)), (0, 7 - k), value=-100)) for k in (1, 7, 2, 6, 3, 1, 1, 7, 5)]
    assert_same_step(Returns(make), items, 3, lambda o, t: tokens(logits_of(o), t))


@pytest.mark.parametrize('loss', [
    lambda o, t: F.cross_entropy(o.logits.transpose(1, 2), t), lambda o, t: tokens(o.logits, t, weight=weight, label_smoothing=.1),
    lambda o, t: F.nll_loss(o.logits.log_softmax(-1).flatten(0, 1), t.flatten()), lambda o, t: nn.CrossEntropyLoss()(o.logits.flatten(0, 1), t.flatten())*3])
def test_accumulated_sentences_that_are_padded_batch_by_batch(loss):
    "Batches of other lengths do not fit beside each other, but PyTorch's losses in a function tell what they divide by"
    torch.manual_seed(0)
    items = [(torch.randn(k, 4), torch.randint(0, classes, (k,))) for k in (2, 7, 3, 6, 6, 5, 1, 1, 1, 2)]
    def collate(b): return nn.utils.rnn.pad_sequence([x for x,_ in b], True),nn.utils.rnn.pad_sequence([t for _,t in b], True, -100)
    assert_same_step(Returns(outputs['attributes'][0]), items, 3, loss, collate)


def test_a_loss_that_the_model_computed_is_not_judged_by_its_predictions():
    "It stays what it is, whatever becomes of them"
    torch.manual_seed(0)
    learn = Learner(digits_learner(bs=16).dls, digits_learner().model, loss_func=lambda o, t: o.loss)
    learn.model = Returns(lambda p: ByAttribute(loss=p.pow(2).mean(), logits=p))
    learn.model.lin = nn.Linear(64, classes)
    learn.bs_find(.01, 40, 4, show_plot=False, profile=False)
    assert learn.recorder.bs_result.run.loss == 'mean'


def test_a_piece_in_which_nothing_counts_is_left_out():
    items = [(x, torch.tensor(t)) for x,t in zip(torch.randn(9, 4), [1, 2, 3, -100, -100, -100, 0, 1, -100])]
    assert_same_step(nn.Linear(4, classes), items, 3, CrossEntropyLossFlat())


def test_accumulating_what_is_between_examples_warns():
    learn = digits_learner(bs=16)
    learn.loss_func = between
    with pytest.warns(UserWarning, match='depends on the other examples in its batch'), learn.no_bar(), learn.no_logging(): learn.fit(1, .01, cbs=AccumulateGrads(64))


def truth(model, items, loss, weights=None):
    "Noise and scale of large batches, from the gradients of single examples; of a weighted mean by the delta method"
    g = per_example_grads(model, *map(torch.stack, zip(*items)), loss)
    w = torch.ones(len(g)).double() if weights is None else weights.double()
    G = (w[:, None]*g).sum(0)/w.sum()
    S = float((((w[:, None]*(g - G))/w.mean())**2).sum()/(len(g) - 1))
    return S,float((G**2).sum()) - S/len(g)


def measured(model, items, loss, bs, seeds, num_it=200):
    "Mean noise and scale over runs at fixed weights"
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        dls = DataLoaders(torch.utils.data.DataLoader(items, bs, shuffle=True, drop_last=True), torch.utils.data.DataLoader(items[:bs], bs))
        learn = Learner(dls, model, loss_func=loss, opt_func=SGD)
        with learn.no_bar(), learn.no_logging(): learn.bs_find(0., num_it, 10, beta=.999, n_train=0, show_plot=False, profile=False)
        found.append(learn.recorder.bs_stats[['noise', 'scale']].iloc[-1])
    return np.mean(found, axis=0),learn.recorder.bs_result.run.loss


def class_weighted():
    X = torch.randn(3000, 8)
    t = (X[:, 0] + .7*torch.randn(3000) > 1.5).long()
    w = torch.tensor([1., 8.])
    return nn.Linear(8, 2),list(zip(X, t)),CrossEntropyLossFlat(weight=w),w[t],'weighted'

def summed():
    X = torch.randn(3000, 8)
    return nn.Linear(8, 2),list(zip(X, (X[:, 0] > .5).long())),CrossEntropyLossFlat(reduction='sum'),None,'sum'

def of_words():
    X,k = torch.randn(3000, 7, 4),torch.randint(1, 8, (3000,))
    t = torch.where(torch.arange(7) < k[:, None], (X[..., 0] > 0).long() + (X[..., 1] > .5).long(), -100)
    return nn.Linear(4, classes),list(zip(X, t)),tokens,k.float(),'weighted'


@pytest.mark.parametrize('seeds', [6, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize('case', [class_weighted, summed, of_words])
def test_noise_and_scale_are_those_of_single_examples(case, seeds):
    torch.manual_seed(0)
    model,items,loss,weights,kind = case()
    for p in model.parameters(): p.data *= .3
    noise_and_scale,found = measured(model, items, loss, 32, seeds)
    assert found == kind
    np.testing.assert_allclose(noise_and_scale, truth(model, items, loss, weights), rtol=.05)


class OfAllPairs(nn.Module):
    "Similarities of all pairs of examples"
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(64, 8),nn.Linear(64, 8)
    def forward(self, x): return self.a(x) @ self.b(x).T

class Centered(nn.Module):
    "Outputs less those of the other examples of the batch"
    def __init__(self): super().__init__(); self.a = nn.Linear(64, 10)
    def forward(self, x): return (h := self.a(x)) - h.mean(0)


def pairs(z, t): return F.cross_entropy(z, torch.arange(len(z))) + F.cross_entropy(z.T, torch.arange(len(z)))


@pytest.mark.parametrize('model,loss', [(OfAllPairs, pairs), (Centered, CrossEntropyLossFlat()), (None, lambda z, t: between(z, t)),
                                        (None, lambda p, t: triplets(p, t)), (None, barlow)])
def test_no_advice_where_examples_depend_on_each_other(model, loss):
    learn = digits_learner(bs=16)
    if model: learn.model = model()
    learn.loss_func = loss
    with learn.no_bar(): sug = learn.bs_find(.01, 120)
    result = learn.recorder.bs_result
    assert set(sug) == {None} and result.table is None and result.advised is None and 'depends on the other examples in its batch' in str(result)
    assert learn.set_bs(sug).dls.bs == 16


@pytest.mark.parametrize('model', [nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.5), nn.Linear(32, 10)),
                                   nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 10))])
def test_the_statistics_of_batch_norm_are_set_aside(model):
    learn = digits_learner(bs=16)
    learn.model = model
    modes = [m.training for m in model.modules()]
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.01, 120, show_plot=False, profile=False)
    assert learn.recorder.bs_result.run.loss == 'mean' and [m.training for m in model.modules()] == modes


def test_mixup_of_a_mean():
    learn = digits_learner(bs=16)
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.01, 120, show_plot=False, profile=False) if learn.add_cb(MixUp()) else None
    assert learn.recorder.bs_result.run.loss == 'mean' and learn.recorder.bs_result.table is not None


def test_the_advice_for_a_sum_is_that_for_its_mean():
    tables = []
    for reduction,lr in ('mean', .16), ('sum', .01):
        set_seed(0)
        learn = digits_learner(bs=16)
        learn.loss_func,learn.dls.train.drop_last = CrossEntropyLossFlat(reduction=reduction),True  # a shorter batch of a sum is a shorter step
        with learn.no_bar(), learn.no_logging(): learn.bs_find(lr, 400, 10, show_plot=False, profile=False)
        tables.append(learn.recorder.bs_table)
    of_mean,of_sum = tables
    np.testing.assert_allclose(of_sum.steps, of_mean.steps, rtol=1e-3)
    np.testing.assert_allclose((of_sum.lr*of_sum.index).astype(float), of_mean.lr.astype(float), rtol=1e-3)


def noise_scales(reduction, lr, bs, n_acc):
    "Noise and scale along a training"
    set_seed(0)
    learn = digits_learner(bs=bs)
    learn.loss_func = CrossEntropyLossFlat(reduction=reduction)
    cbs = [NoiseScale(share=None, every=20), *([AccumulateGrads(n_acc)] if n_acc else [])]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr, cbs=cbs)
    return learn.recorder.noise_scale[['raw_noise', 'raw_scale']]


@pytest.mark.parametrize('bs,n_acc', [(16, None), (8, 64)])
def test_noise_along_a_training_with_a_sum_is_that_with_its_mean(bs, n_acc):
    of_mean,of_sum = (noise_scales(reduction, lr, bs, n_acc) for reduction,lr in (('mean', .16), ('sum', .16/(n_acc or bs))))
    assert len(of_mean) > 3
    np.testing.assert_allclose(of_sum, of_mean, rtol=.02, atol=1e-3)


@pytest.mark.parametrize('reduction', ('mean', 'sum'))
def test_growing_follows_the_loss(reduction):
    "A larger batch at a higher learning rate of a mean, and at a lower one of a sum"
    set_seed(0)
    learn = digits_learner(bs=8)
    learn.loss_func = CrossEntropyLossFlat(reduction=reduction)
    with learn.no_bar(), learn.no_logging(): learn.fit(10, .1 if reduction == 'mean' else .0125, cbs=GrowBatch())
    last = learn.recorder.bs_changes.iloc[-1]
    assert last.bs > 8 and (1 < last.lr_factor < last.bs/8 if reduction == 'mean' else 8/last.bs < last.lr_factor < 1)


def between(z, t): return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def test_no_pieces_of_what_is_between_examples():
    learn = digits_learner(bs=16)
    learn.loss_func = between
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='bs=128 does not fit in memory .32 examples do., and cannot be accumulated.* Give 32 or less'): learn.set_bs(128, fits=32)
    assert learn.dls.bs == 16 and not any(isinstance(o, AccumulateGrads) for o in learn.cbs) and learn.opt is None
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    learn.set_bs(32, fits=32)


def test_a_training_with_what_is_between_examples_says_so(capsys):
    learn = digits_learner(bs=16)
    learn.loss_func = between
    with learn.no_bar(): learn.fit(1, .01, cbs=NoiseScale(share=None, every=20))
    assert 'depends on the other examples in its batch' in capsys.readouterr().out.replace('\n', ' ')


class TakeTurns(Callback):
    "As a GAN's: in some batches only the first half of the model is trained, in others the second"
    def __init__(self, rhythm): self.rhythm = rhythm
    def before_batch(self):
        on = self.rhythm[self.train_iter % len(self.rhythm)]
        for i,m in enumerate(self.model):
            for p in m.parameters(): p.requires_grad_(on in (i, 2))


class SkipAtRandom(nn.Module):
    "A layer that is skipped in a fifth of the batches (stochastic depth)"
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(64, 64),nn.Linear(64, 10)
    def forward(self, x): return self.b(x + self.a(x) if torch.rand(()) > .2 else x)


@pytest.mark.parametrize('rhythm', ([0, 1], [0, 0, 1], [0, 2], [1, 2, 2, 2], [0]*5 + [1]*5))
def test_two_trainings_that_take_turns(rhythm):
    learn = digits_learner(bs=16, cbs=TakeTurns(rhythm))
    learn.model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))
    with learn.no_bar(), learn.no_logging(): sug = learn.bs_find(.01, 100, 5, show_plot=False, profile=False)
    result = learn.recorder.bs_result
    assert set(sug) == {None} and result.table is None and str(result).startswith('Measure each network by itself')


class PartlyUsed(nn.Module):
    "With a layer that is never used"
    def __init__(self): super().__init__(); self.a,self.unused = nn.Linear(64, 10),nn.Linear(64, 10)
    def forward(self, x): return self.a(x)


@pytest.mark.parametrize('model', (SkipAtRandom, PartlyUsed))
def test_layers_without_a_gradient_now_and_then_or_never_are_one_training(model):
    learn = digits_learner(bs=16)
    learn.model = model()
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.01, 100, 5, show_plot=False, profile=False)
    assert learn.recorder.bs_result.hindrance == '' and learn.recorder.bs_result.table is not None


class WithLoss(nn.Module):
    "A model that computes its loss, as those of Hugging Face do"
    def __init__(self): super().__init__(); self.net = nn.Linear(6, 4)
    def forward(self, x, t): return dict(loss=F.cross_entropy(self.net(x), t, reduction='sum'))


def of_model(bs):
    torch.manual_seed(0)
    items = [(x, t, t) for x,t in zip(torch.randn(128, 6), torch.randint(0, 4, (128,)))]
    dls = DataLoaders(*(torch.utils.data.DataLoader(items, bs) for _ in range(2)))
    dls.n_inp = 2
    return Learner(dls, WithLoss(), loss_func=lambda p, t: p['loss'], opt_func=SGD)


def test_a_sum_that_the_model_computes():
    found = []
    for learn in (of_model(64), of_model(16)):
        with learn.no_bar(), learn.no_logging():
            learn.set_bs(64, fits=len(next(iter(learn.dls.train))[0]))
            learn.fit(1, 0., cbs=Grab())
        found.append(torch.cat([g.flatten() for g in learn.grabbed]))
    torch.testing.assert_close(*found)


def test_mixup_of_a_sum():
    learn = digits_learner(bs=16)
    learn.loss_func = CrossEntropyLossFlat(reduction='sum')
    learn.add_cb(MixUp())
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.001, 60, 5, show_plot=False, profile=False)
    assert learn.recorder.bs_result.run.loss == 'sum'


def test_two_views_of_each_example():
    def collate(b):
        x = torch.stack([x for x,_ in b])
        return torch.cat([x, x + .1]),torch.arange(len(b))
    torch.manual_seed(0)
    items = [(x, 0) for x in torch.randn(300, 6)]
    dls = DataLoaders(*(torch.utils.data.DataLoader(items, 16, shuffle=True, collate_fn=collate) for _ in range(2)))
    learn = Learner(dls, nn.Linear(6, 8), loss_func=views, opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.1, 60, 5, show_plot=False, profile=False)
    assert (learn.recorder.bs_result.run.loss, learn.recorder.bs_result.run.bs) == ('between', 16)


def test_the_loss_may_change_after_bs_find():
    learn = digits_learner(bs=16)
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.1, 60, 5, show_plot=False, profile=False)
    learn.loss_func = between
    with pytest.raises(ValueError, match='cannot be accumulated'): learn.set_bs(64, fits=16)


def test_what_cannot_be_found_out_is_said():
    learn = digits_learner(bs=16)
    learn.loss_func = lambda p, t: F.cross_entropy(p + torch.randn_like(p), t)
    with pytest.warns(UserWarning, match='could not be identified'), learn.no_bar(), learn.no_logging(): learn.fit(1, .01, cbs=AccumulateGrads(64))
