"What a loader of any kind collates, how many examples a batch holds, and how some are cut out"
import random
from collections import namedtuple

import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.utils import data as torch_data
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, SGD

from fastai_bs_finder.all import *
from fastai_bs_finder.batches import _layouts, _sizes, n_examples, part_of
from footprint import changes, random_states, state
from learners import dict_batches, plain_pytorch, two_inputs_two_targets

T,D = 12,5


class Items(torch_data.Dataset):
    "Sequences with 1 to 3 labels each; counts how many were read, and draws noise from a generator of its own"
    def __init__(self, n=50, labels=lambda i: 1 + i % 3): self.n,self.labels,self.rng,self.read = n,labels,np.random.default_rng(0),0
    def __len__(self): return self.n
    def __getitem__(self, i):
        self.read += 1
        x = torch.full((T, D), float(i)) + self.rng.normal()*0
        return x,torch.full((self.labels(i),), i % 7)


Named = namedtuple('Named', 'x y')
def xs(b, axis=0): return torch.stack([x for x,_ in b], axis)
def firsts(b): return torch.stack([y[0] for _,y in b])
def all_labels(b): return torch.cat([y for _,y in b])
def n_labels(b): return torch.tensor([len(y) for _,y in b])


collations = {
    'time first, targets too': lambda b: (xs(b, 1), xs(b, 1)[..., 0]),
    'time first, one target': lambda b: (xs(b, 1), firsts(b)),
    'CTC: targets concatenated': lambda b: (xs(b, 1), all_labels(b), torch.full((len(b),), T), n_labels(b)),
    'boxes, with the image of each': lambda b: (xs(b), torch.cat([y[:, None].repeat(1, 4) for _,y in b]), torch.repeat_interleave(torch.arange(len(b)), n_labels(b))),
    'EmbeddingBag: texts concatenated': lambda b: (all_labels(b), n_labels(b).cumsum(0), firsts(b)),
    'images of different sizes in a list (Lightning #10093)': lambda b: ([x[:1 + len(y)] for x,y in b], firsts(b)),
    'detection: lists of images, and of dictionaries (torchgeo #1928)': lambda b: (tuple(x for x,_ in b), [dict(labels=y, area=y.sum()) for _,y in b]),
    'dictionaries, with a number and a constant': lambda b: (dict(seq=xs(b, 1), scale=torch.ones(3)), dict(label=firsts(b), weight=.5)),
    'a named tuple': lambda b: (Named(xs(b, 1), n_labels(b)), all_labels(b)),
    'two views of each': lambda b: (torch.cat([xs(b), xs(b)]), torch.cat([firsts(b), firsts(b)])),
    'tokens in one row': lambda b: (xs(b), xs(b)[..., 0].flatten()),
}
makers = {'PyTorch': lambda ds, bs, collate, **kwargs: torch_data.DataLoader(ds, bs, collate_fn=collate, **kwargs),
          'fastai': lambda ds, bs, collate, **kwargs: DataLoader(ds, bs, create_batch=collate, **kwargs)}


def on(dl, n_inp=1, model=None, loss_func=None):
    learn = Learner(DataLoaders(dl, dl), model or nn.Linear(1, 1), loss_func=loss_func or F.mse_loss, opt_func=SGD)
    learn.dls.n_inp = n_inp
    return learn


def counts(dl):
    learn,res = on(dl),[]
    for b in dl:
        learn._split(b)
        res.append(n_examples(learn))
    return res


def sizes(n, bs): return [bs]*(n//bs) + [n % bs]*bool(n % bs)


@pytest.mark.parametrize('kind', makers)
@pytest.mark.parametrize('bs', (8, T, D, 16))  # some are as long as another axis
@pytest.mark.parametrize('name', collations)
def test_an_example_is_an_item_of_the_data_set(kind, bs, name):
    if (kind, name) == ('fastai', 'a named tuple'): pytest.skip("fastai's loader cannot make one")
    for labels in (lambda i: 1 + i % 3, lambda i: 3 if i == 31 else 1):  # here the few items that are asked have one label each
        assert counts(makers[kind](Items(50, labels), bs, collations[name])) == sizes(50, bs)


@pytest.mark.parametrize('name', collations)
def test_the_last_batch_may_come_first_and_the_data_set_may_be_small(name):
    assert counts(makers['PyTorch'](Items(3), 16, collations[name])) == [3]
    if name != 'a named tuple': assert counts(makers['fastai'](Items(9), 16, collations[name])) == [9]


def test_an_axis_that_grows_with_the_first_few():
    "Padded to the longest: of 4 that is 4, of 6 it is 6"
    for n in (50, 3): assert counts(makers['PyTorch'](Items(n), 16, lambda b: (torch.zeros(min(len(b), 6), len(b)),)*2)) == sizes(n, 16)


def test_batches_of_a_stream():
    class Stream(torch_data.IterableDataset):
        def __iter__(self): return iter([Items()[i] for i in range(40)])
    for name in ('time first, targets too', 'CTC: targets concatenated'): assert counts(makers['PyTorch'](Stream(), 16, collations[name])) == [16, 16, 8]


def test_batches_that_come_ready_made():
    batches = [(torch.ones(n, D), torch.ones(n)) for n in (7, 5, 7, 7)]
    assert counts(batches) == counts(torch_data.DataLoader(batches, None)) == counts(torch_data.DataLoader(batches, 1, collate_fn=lambda b: b[0])) == [7, 5, 7, 7]


@pytest.mark.parametrize('kind', makers)
def test_nothing_is_read_where_there_is_no_doubt_and_few_items_otherwise(kind):
    ds = Items()
    for collate,most in ((lambda b: (xs(b)[..., 0, :], firsts(b)), 0), (collations['time first, targets too'], 2*sum(_sizes))):
        dl = makers[kind](ds, 8, collate)
        learn,read = on(dl),ds.read
        list(dl)
        each,read = ds.read - read,ds.read
        batches = list(dl)
        for b in batches:
            learn._split(b)
            n_examples(learn)
        assert ds.read - read - each == 0 and bool(_layouts[dl].asked) == bool(most)


@pytest.mark.parametrize('kind', makers)
def test_asking_leaves_no_footprint(kind):
    class Noisy(Items):
        def __getitem__(self, i):
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(i)
    ds = Noisy()
    dl = makers[kind](ds, 8, collations['CTC: targets concatenated'])
    learn = on(dl)
    learn._split(next(iter(dl)))
    before = random_states(),ds.rng.bit_generator.state,ds.read,dict(vars(dl)),vars(ds).copy()
    assert n_examples(learn) == 8 and _layouts[dl].asked
    assert (random_states(), ds.rng.bit_generator.state, ds.read, dict(vars(dl)), vars(ds).copy()) == before


def test_a_data_set_that_cannot_be_asked():
    class ByKey(Items):
        def __getitem__(self, i): return super().__getitem__(int(i.removeprefix('k')))
    keys = [f'k{i}' for i in range(50)]
    dl = torch_data.DataLoader(ByKey(), 8, sampler=keys, collate_fn=collations['time first, targets too'])
    assert counts(dl) == sizes(50, 8)


def all_concatenated(b): return all_labels(b).float(),all_labels(b).float()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
    def forward(self, x): return self.w*x*torch.arange(len(x))


def test_what_nobody_can_tell_is_told_by_the_user():
    learn = on(makers['PyTorch'](Items(), 8, all_concatenated, shuffle=True), model=Scale())
    was = state(learn)
    with pytest.raises(ValueError, match=r'examples of a batch cannot be counted.*learn.bs_find\(..., count=lambda xb, yb'): learn.bs_find(1e-3, 10, 2, show_plot=False)
    with pytest.raises(ValueError, match=r'count=lambda xb, yb'): learn.fit(1, 1e-3, cbs=AccumulateGrads(16))
    for count,words in ((3, 'count=3 is not a function'), (lambda xb, yb: 2.5, 'a batch holds 2.5 examples'), (lambda xb, yb: 0, 'a batch holds 0 examples')):
        with pytest.raises(ValueError, match=words): learn.bs_find(1e-3, 10, 2, show_plot=False, count=count)
    learn.bs_find(1e-3, 10, 2, show_plot=False, profile=False, count=lambda xb, yb: 8)
    assert learn.recorder.bs_result.run.bs == 8
    learn.fit(1, 1e-3, cbs=AccumulateGrads(16))
    learn.count_examples(None)
    with pytest.raises(ValueError, match='cannot be counted'): learn.bs_find(1e-3, 10, 2, show_plot=False)


def test_what_the_user_tells_goes_first_and_stays_off_the_learner():
    learn = two_inputs_two_targets()
    was = state(learn)
    assert learn.count_examples(lambda xb, yb: 2*len(xb[0])) is learn and changes(was, state(learn)) == []
    learn._split(next(iter(learn.dls.train)))
    assert n_examples(learn) == 32


@pytest.mark.parametrize('make', (two_inputs_two_targets, dict_batches, plain_pytorch))
def test_parts_of_the_usual_batches(make):
    learn = make()
    learn._split(next(iter(learn.dls.train)))
    pred = learn.model(*learn.xb)
    for o in (learn.xb, learn.yb, pred):
        a,b = part_of(learn, o, 0, 5),part_of(learn, o, 5, 16)
        def same(o, a, b):
            assert type(o) is type(a)
            if isinstance(o, torch.Tensor): return torch.equal(torch.cat([a, b]), o) and len(a) == 5
            return all(same(o[k], a[k], b[k]) for k in (o if isinstance(o, dict) else range(len(o))))
        assert same(o, a, b)


@pytest.mark.parametrize('bs', (8, T, D))
@pytest.mark.parametrize('name', ['time first, targets too', 'time first, one target', 'images of different sizes in a list (Lightning #10093)',
                                  'detection: lists of images, and of dictionaries (torchgeo #1928)', 'dictionaries, with a number and a constant'])
def test_a_part_is_what_the_loader_would_have_collated(bs, name):
    ds,collate = Items(),collations[name]
    learn = on(makers['PyTorch'](ds, bs, collate))
    learn._split(next(iter(learn.dls.train)))
    x,y = collate([ds[i] for i in range(2, 5)])
    def equal(a, b):
        if isinstance(a, torch.Tensor): return torch.equal(a, b)
        if isinstance(a, (dict, list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(equal(a[k], b[k]) for k in (a if isinstance(a, dict) else range(len(a))))
        return a == b
    assert equal(part_of(learn, learn.xb, 2, 5), (x,)) and equal(part_of(learn, learn.yb, 2, 5), (y,))


def test_parts_of_predictions():
    learn = on(makers['PyTorch'](Items(), 8, collations['time first, targets too']))
    learn._split(next(iter(learn.dls.train)))
    assert part_of(learn, torch.ones(T, 8, 3), 0, 2).shape == (T, 2, 3)
    assert part_of(learn, dict(a=torch.ones(8, T), b=None), 0, 2)['a'].shape == (2, T)
    assert part_of(learn, torch.ones(8, 8), 0, 2).shape == (8, 2)  # as the targets
    assert part_of(learn, [torch.ones(3), torch.ones(4)]*4, 0, 3)[2].shape == (3,)
    with pytest.raises(ValueError, match=r'shape \(7, 9\) cannot be cut'): part_of(learn, torch.ones(7, 9), 0, 2)
    whole = dict(loss=torch.tensor(1.), logits=torch.ones(8, T), cache=object())  # the loss and the cache are those of all examples
    part = part_of(learn, whole, 0, 2)
    assert part['loss'] is whole['loss'] and part['cache'] is whole['cache'] and part['logits'].shape == (2, T)


@pytest.mark.parametrize('name', ['CTC: targets concatenated', 'boxes, with the image of each', 'EmbeddingBag: texts concatenated'])
def test_what_cannot_be_cut(name):
    learn = on(makers['PyTorch'](Items(), 8, collations[name]))
    learn._split(next(iter(learn.dls.train)))
    with pytest.raises(ValueError, match='cannot be cut into examples'): part_of(learn, learn.xb, 0, 2), part_of(learn, learn.yb, 0, 2)


@pytest.mark.parametrize('name,rows', [('two views of each', 2), ('tokens in one row', T)])
def test_several_rows_per_example_are_cut_in_proportion(name, rows):
    learn = on(makers['PyTorch'](Items(), 8, collations[name]))
    learn._split(next(iter(learn.dls.train)))
    assert len(part_of(learn, learn.yb, 1, 3)[0]) == 2*rows and part_of(learn, torch.ones(8*rows, 5), 1, 3).shape == (2*rows, 5)


def test_a_batch_that_a_callback_changes():
    "SimCLR's callback makes two views of each image; a callback that puts time first"
    class Views(Callback):
        def before_batch(self): self.learn.xb = (torch.cat([self.x, self.x]),)
    class Seen(Callback):
        def before_fit(self): self.seen = []
        def after_batch(self): self.seen.append(n_examples(self.learn))
    learn = on(makers['fastai'](Items(48), 8, lambda b: (xs(b), firsts(b).float())), model=nn.Sequential(nn.Flatten(), nn.Linear(T*D, 1)),
               loss_func=lambda p, y: F.mse_loss(p[:len(y), 0], y))
    seen = Seen()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0., cbs=[Views(), seen])
    assert set(seen.seen) == {8}


V,n_seqs = 8,200


class Tagger(nn.Module):
    "A bidirectional network over sequences with time first"
    def __init__(self):
        super().__init__()
        self.emb,self.rnn,self.out = nn.Embedding(V, 8),nn.GRU(8, 8, bidirectional=True),nn.Linear(16, V)
    def forward(self, x): return self.out(self.rnn(self.emb(x))[0])


def tags_loss(pred, y): return F.cross_entropy(pred.flatten(0, 1), y.flatten())
def ctc_loss(pred, y, in_lens, lens): return F.ctc_loss(pred.log_softmax(-1), y, in_lens, lens, reduction='none').mean()
def boxes_loss(pred, y, image, lens): return (F.cross_entropy(pred.mean(0)[image], y, reduction='none')/lens[image]).sum()/len(lens)


def tagged(rng):
    x = torch.tensor(rng.integers(0, V, T))
    return x,(x.flip(0) + 1) % V


def labelled(rng):
    x = torch.tensor(rng.integers(0, V, T))
    return x,1 + x[:rng.integers(1, 5)] % (V - 1)


learning = {
    'time first': (tagged, lambda b: (xs(b, 1), torch.stack([y for _,y in b], 1)), tags_loss),
    'CTC, targets concatenated': (labelled, collations['CTC: targets concatenated'], ctc_loss),
    'several boxes per image': (labelled, lambda b: (xs(b, 1), all_labels(b), torch.repeat_interleave(torch.arange(len(b)), n_labels(b)), n_labels(b)), boxes_loss),
}


@pytest.mark.parametrize('name,seeds', [*((name, 4) for name in learning), *(pytest.param(name, 40, marks=pytest.mark.slow) for name in learning)])
def test_noise_and_scale_are_those_of_examples(name, seeds):
    "Against the gradient of each example, collated alone"
    item,collate,loss_func = learning[name]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    items,model = [item(rng) for _ in range(n_seqs)],Tagger()
    def grad(x, *y): return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss_func(model(x), *y), [*model.parameters()])])
    g = torch.stack([grad(*collate([o])) for o in items])
    assert torch.allclose(grad(*collate(items)), g.mean(0), atol=1e-5)
    noise = ((g - g.mean(0))**2).sum().item()/(n_seqs - 1)
    scale = (g.mean(0)**2).sum().item() - noise/n_seqs
    learn,rows = on(torch_data.DataLoader(items, 8, shuffle=True, drop_last=True, collate_fn=collate), model=model, loss_func=loss_func),[]
    with learn.no_bar(), learn.no_logging():
        for seed in range(seeds):
            torch.manual_seed(seed)
            learn.bs_find(0., 250, 10, beta=.99, n_train=0, show_plot=False, profile=False)
            rows.append(learn.recorder.bs_stats.iloc[-1][['noise', 'scale']].astype(float))
            assert learn.recorder.bs_result.run.bs == 8
    found = sum(rows)/seeds
    print(f'{name}: noise {found.noise:.4g} of {noise:.4g}, scale {found.scale:.4g} of {scale:.4g}')
    assert found.noise == pytest.approx(noise, rel=.05) and found.scale == pytest.approx(scale, rel=.05 if seeds > 10 else .15)


@pytest.mark.parametrize('name', learning)
def test_accumulation_is_the_whole_batch(name):
    "And the steps of an epoch are those of the whole batches"
    item,collate,loss_func = learning[name]
    rng = np.random.default_rng(1)
    items = [item(rng) for _ in range(50)]
    def trained(accumulate):
        torch.manual_seed(0)
        learn = on(torch_data.DataLoader(items, 16, collate_fn=collate), model=Tagger(), loss_func=loss_func)
        class Steps(Callback):
            n = 0
            def after_step(self): self.n += 1
        steps = Steps()
        with learn.no_bar(), learn.no_logging():
            learn.set_bs(16, fits=4 if accumulate else None)
            learn.fit(1, .1, cbs=steps)
        return nn.utils.parameters_to_vector(learn.model.parameters()).detach(),steps.n
    (a,steps),(b,same) = trained(False),trained(True)
    assert steps == same == 4 and torch.allclose(a, b, atol=1e-6)


def test_a_training_is_the_same_whether_its_batches_are_counted_by_experiment_or_by_the_user():
    "Bit for bit: asking a loader in the midst of a training leaves no trace"
    class Noisy(Items):
        def __getitem__(self, i):
            x,y = super().__getitem__(i)
            return x + torch.randn_like(x) + self.rng.normal(),y.float()
    def trained(count):
        torch.manual_seed(0)
        dl = torch_data.DataLoader(Noisy(), 8, shuffle=True, collate_fn=lambda b: (xs(b, 1), firsts(b)))
        learn = on(dl, model=nn.Linear(D, 1), loss_func=lambda p, y: F.mse_loss(p.mean((0, 2)), y))
        learn.count_examples(count)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .01, cbs=AccumulateGrads(16))
        return learn.model.weight
    assert torch.equal(trained(None), trained(lambda xb, yb: len(yb[0])))
