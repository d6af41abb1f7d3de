"Libraries that fastai users train with, as they are today: learners of each train, find, set, sweep and track (make ecosystem)"
import random, warnings
from collections import deque
from functools import partial
from importlib import import_module

import pytest, torch
from torch import nn
from torch.utils import data as torch_data
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy, set_seed
from fastai.vision.all import ConvLayer, vision_learner

from fastai_bs_finder.all import *
from fastai_bs_finder.loaders import batch_size, n_train_examples
from footprint import assert_no_footprint, changes, forget, same, state, trained
from learners import digits, loaders, mlp
from reference import paper_estimate
from test_applications import Store, find
from test_losses import Grab

pytestmark = pytest.mark.slow
bs,splits,one_batch = 8,(list(range(200)), list(range(200, 240))),Learner.one_batch
transformer = dict(n_layers=1, d_model=16, n_heads=2, d_ff=32)


def waves(n_channels=2, n=240, length=40):
    "Two kinds of time series, and which kind each is"
    y = torch.arange(n)%2
    t = torch.arange(length)/length
    X = torch.sin(2*torch.pi*(2 + y[:, None, None])*(t + torch.rand(n, n_channels, 1))) + torch.randn(n, n_channels, length)/2
    return X.numpy(),y.numpy()


def series():
    import tsai.basics as ts  # not tsai.all: it imports names that pyts and fastcore have no more
    X,y = waves()
    tfms = [None, ts.TSClassification()]
    dls = ts.get_ts_dls(X, y, splits=splits, tfms=tfms, batch_tfms=ts.TSStandardize(), bs=bs, num_workers=0)
    return ts.ts_learner(dls, 'InceptionTime', arch_config=dict(nf=4), metrics=ts.accuracy)


def series_in_one():
    import tsai.basics as ts
    X,y = waves()
    return ts.TSClassifier(X, y, splits=splits, arch='TSTPlus', arch_config=transformer, bs=bs, tfms=[None, ts.TSClassification()],
                           batch_tfms=[ts.TSStandardize()], metrics=ts.accuracy)


def forecaster():
    import tsai.basics as ts
    X,_ = waves(length=48)
    config = transformer | dict(patch_len=8, stride=8)
    return ts.TSForecaster(X[..., :40], X[..., 40:], splits=splits, arch='PatchTST', arch_config=config, bs=bs,
                           tfms=[None, ts.TSForecasting()], batch_tfms=[ts.TSStandardize()], metrics=ts.mae)


def pictures():
    X,y = digits()
    X = nn.functional.interpolate(X[:240].view(-1, 1, 8, 8), scale_factor=4).expand(-1, 3, -1, -1).contiguous()
    return loaders(list(zip(X, y[:240])), 40)


def timm_model(arch, prepare):
    learn = vision_learner(pictures(), arch, n_out=10, loss_func=CrossEntropyLossFlat(), normalize=False, pretrained=False,
                           metrics=accuracy)
    prepare(learn)
    return learn


def sentences(n=240):
    "Lists of tokens of several lengths, and which of two tokens is in them more often"
    rng = random.Random(3)
    def sentence(kind): return torch.tensor(rng.choices(range(2, 12), [1 + 3*(k == kind) for k in range(10)], k=rng.randint(4, 14)))
    return [(sentence(i%2), i%2) for i in range(n)]


def padded(items):
    ids = nn.utils.rnn.pad_sequence([x for x,_ in items], batch_first=True)
    return dict(input_ids=ids, attention_mask=(ids > 0).long()),torch.tensor([y for _,y in items])


def with_labels(items):
    "All in one dictionary, as a Hugging Face model takes it; the labels are the targets, too"
    x,y = padded(items)
    return x | dict(labels=y),y


def next_tokens(items):
    "What is padded does not count in the loss"
    x,_ = padded(items)
    y = x['input_ids'].masked_fill(x['attention_mask'] == 0, -100)
    return x | dict(labels=y),y


def text_loaders(collate):
    ds = sentences()
    def loader(d, train):
        return torch_data.DataLoader(d, bs, shuffle=train, drop_last=train, collate_fn=collate, generator=torch.Generator().manual_seed(5))
    return DataLoaders(loader(ds[:200], True), loader(ds[200:], False))


class Unpacked(nn.Module):
    "A model that takes a dictionary apart: fastai gives it as it is"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model(**x)


def logits_loss(out, y): return nn.functional.cross_entropy(out.logits, y)
def token_loss(out, y): return nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
def own_loss(out, y): return out.loss


def bert(collate, loss):
    import transformers as hf
    config = hf.BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                           max_position_embeddings=16, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    return Learner(text_loaders(collate), Unpacked(hf.BertForSequenceClassification(config)), loss_func=loss)


def gpt(loss):
    import transformers as hf
    config = hf.GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1, resid_pdrop=0.,
                           embd_pdrop=0., attn_pdrop=0.)
    return Learner(text_loaders(next_tokens), Unpacked(hf.GPT2LMHeadModel(config)), loss_func=loss)


def sparsified():
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import Schedule, sched_agp
    from fasterai.sparse.sparsify_callback import SparsifyCallback
    cb = SparsifyCallback(sparsity=.5, granularity='weight', context='local', criteria=large_final, schedule=Schedule(sched_agp))
    net = nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return Learner(pictures(), net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cb)


def distilled():
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
    from fasterai.distill.losses import SoftTarget
    X,y = digits()
    cb = KnowledgeDistillationCallback(mlp().eval(), SoftTarget)
    return Learner(loaders(list(zip(X[:240], y[:240])), 40), mlp(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cb)


# name -> (function that makes the learner, learning rate)
libraries = {
    'tsai: ts_learner, InceptionTime': (series, 1e-3),
    'tsai: TSClassifier, a transformer': (series_in_one, 1e-3),
    'tsai: TSForecaster, PatchTST': (forecaster, 1e-3),
    'timm: vision_learner, frozen body': (partial(timm_model, 'mobilenetv3_small_050', Learner.freeze), 1e-3),
    'timm: vision_learner, unfrozen': (partial(timm_model, 'resnet10t', Learner.unfreeze), 1e-3),
    'transformers: BERT in a plain Learner, loss of its logits': (partial(bert, padded, logits_loss), 1e-3),
    'transformers: BERT in a plain Learner, the loss that it returns': (partial(bert, with_labels, own_loss), 1e-3),
    'transformers: GPT-2 in a plain Learner, loss per token': (partial(gpt, token_loss), 1e-3),
    'fasterai: SparsifyCallback': (sparsified, 1e-3),
    'fasterai: KnowledgeDistillationCallback': (distilled, 1e-3),
}


entrances = dict(tsai='tsai.basics', timm='timm', transformers='transformers', fasterai='fasterai.sparse.sparsify_callback')


@pytest.fixture(autouse=True)
def library(name, monkeypatch):
    "Imports it before a seed is set. tsai then puts a loop into fastai in which PyTorch's loaders fail, so others get fastai's own"
    library = name.split(':')[0]
    pytest.importorskip(library)
    import_module(entrances[library])
    if library != 'tsai': monkeypatch.setattr(Learner, 'one_batch', one_batch)


def maker(name):
    "A function that makes the learner of that name, from the same seed each time, and its learning rate"
    make,lr = libraries[name]
    def f():
        set_seed(1)
        return make()
    return f,lr


class StoreAny(Store):
    "The same whatever the targets are"
    def after_backward(self):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters() if p.requires_grad]
        self.keep((batch_size(self.dls.train), n_words(*self.yb), torch.cat([g.flatten().double() for g in grads])))


def n_words(y): return int((y[:, 1:] != -100).sum()) if y.ndim == 2 else len(y)


def weighted_estimate(grads, w, b):
    "Noise and scale from gradients that are weighted means, of batches of `b` examples that weigh `w`; the paper's where all weigh `b`"
    G,w,k = torch.stack(grads),torch.tensor(w).double(),len(w)
    a,n,mean = w**2/b,b*k,(w[:, None]*G).sum(0)/w.sum()
    noise = (a*((G - mean)**2).sum(1)).sum()/(k - 2 + a.sum()*n/w.sum()**2)*(n/w.sum())**2
    return noise.item(),((mean**2).sum() - noise/n).item()


@pytest.mark.parametrize('name', libraries)
def test_finds(name, record_property):
    record_property('works with', ('library', name, 'works'))
    make,lr = maker(name)
    learn,last = make(),deque(maxlen=4)
    learn.add_cb(StoreAny(last))
    learn.bs_find(lr, 20, 4, show_plot=False, profile=False)
    stats = learn.recorder.bs_stats
    (b,*others),words,grads = zip(*last)
    assert stats.batch.tolist() == [4, 12, 20] and others == [b]*3 and learn.recorder.bs_result.run.bs == b
    assert stats[['raw_noise', 'raw_scale']].iloc[-1].tolist() == pytest.approx(weighted_estimate(grads, words, b), rel=1e-3)
    if 'per token' not in name: assert weighted_estimate(grads, words, b) == pytest.approx(paper_estimate(list(grads), b))


@pytest.mark.parametrize('name', libraries)
def test_footprint_free(name, record_property):
    record_property('works with', ('library', name, 'footprint-free'))
    make,lr = maker(name)
    assert_no_footprint(make, partial(find, lr=lr), lambda learn: learn.fit(1, lr))


@pytest.mark.parametrize('name', libraries)
def test_other_calls_leave_no_footprint(name):
    make,lr = maker(name)
    learn = make()
    was = state(learn)
    assert learn.max_bs() >= 16
    rows = learn.bs_sweep([8, 16], budget=1, lrs=[lr], show_plot=False)
    assert rows.bs.tolist() == [8, 16] and rows.loss.notna().all()
    forget(learn)
    assert changes(was, state(learn)) == []


@pytest.mark.parametrize('name', libraries)
@pytest.mark.parametrize('fits', [None, 8])
def test_sets(name, fits):
    "A step of the optimizer takes 32 examples, at once or in pieces"
    make,lr = maker(name)
    learn,tally = make(),Tally()
    learn.set_bs(32, fits=fits)
    learn.fit(1, lr, cbs=tally)
    n = n_train_examples(learn)
    assert (tally.steps, tally.batches) == ((-(-n//32), n//fits) if fits else (n//32, n//32))


alone = [name for name in libraries if name.startswith('transformers') or 'Distillation' in name]   # without batch-norm and dropout
of_its_own = 'transformers: GPT-2, a mean over words that it computes itself'
not_known = pytest.mark.xfail(strict=True, reason='what a batch weighs in a loss inside of the model is not known')


@pytest.mark.parametrize('name', [*alone, pytest.param(of_its_own, marks=not_known)])
def test_pieces_are_the_whole_batch(name):
    "The gradient of the first step"
    grads = []
    for fits in (None, 8):
        set_seed(1)
        learn = gpt(own_loss) if name == of_its_own else libraries[name][0]()
        learn.set_bs(32, fits=fits)
        learn.fit(1, 0., cbs=Grab())
        grads.append(torch.cat([g.flatten() for g in learn.grabbed]))
    assert (grads[1] - grads[0]).norm() <= 1e-5*grads[0].norm()


class Tally(Callback):
    "How many batches and steps a training takes"
    def before_fit(self): self.batches,self.steps = 0,0
    def before_batch(self): self.batches += self.training
    def after_step(self): self.steps += 1


@pytest.mark.parametrize('name', libraries)
def test_tracks(name):
    "A training with `NoiseScale` is the very training without it, with a row or more"
    make,lr = maker(name)
    learn = make()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'NoiseScale measures no more|The snapshot cannot')
        learn.fit(2, lr, cbs=NoiseScale(every=8, share=None))
    after = trained(learn)
    assert len(learn.recorder.noise_scale) >= 2 and not learn.recorder.noise_scale_result.error
    other = make()
    other.fit(2, lr)
    without = trained(other)
    for k in ('weights', 'opt', 'losses', 'rng'): assert same(after[k], without[k]), k
