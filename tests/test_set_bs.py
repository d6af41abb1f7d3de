"`learn.set_bs` on every kind of learner"
from collections import namedtuple
from math import inf

import pytest, torch
from torch.utils import data as torch_data
from fastai.basics import Callback, DataLoader, DataLoaders
from fastai.callback.training import GradientAccumulation
from hypothesis import given, strategies as st

from fastai_bs_finder.accumulate import AccumulateGrads, micro_bs
from fastai_bs_finder.batches import n_examples
from fastai_bs_finder.finder import *
from fastai_bs_finder.memory import *
from fastai_bs_finder.set_bs import *
from fastai_bs_finder.loaders import batch_size, n_train_examples
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.result import keep_result
from footprint import changes, forget, state
from results import result
from learners import Learner, applications, digits, loaders, maker, mlp, nn


class Sizes(Callback):
    order,run_valid = 70,False
    def before_fit(self): self.sizes,self.steps = [],0
    def after_batch(self): self.sizes.append(n_examples(self.learn))
    def after_step(self): self.steps += 1


def quiet_fit(learn, n_epoch=1, cbs=(), lr=1e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, lr, cbs=list(cbs))


@pytest.mark.parametrize('name', applications)
def test_every_application(name, fastai_data):
    "The loader yields that size, an epoch has all examples that it should, training runs, and the way back"
    make,lr = maker(name, fastai_data)
    learn = make()
    with learn.no_logging(): learn.set_bs(12)
    assert batch_size(learn.dls.train) == 12
    sizes,n = Sizes(),n_train_examples(learn)
    stream = 'stream' in name  # has no length, which fit needs
    if not stream:
        quiet_fit(learn, 1, [sizes], 1e-4)
        assert set(sizes.sizes[:-1]) == {12}
        assert sum(sizes.sizes) == (n - n % 12 if learn.dls.train.drop_last else n)
    loaders = [*learn.dls.loaders]
    with learn.no_logging(): learn.set_bs(12)   # nothing to do: the training to come stays the same
    assert all(a is b for a,b in zip(loaders, learn.dls.loaders))
    with learn.no_logging(): learn.set_bs(24, fits=12)
    assert batch_size(learn.dls.train) == 12 and any(isinstance(o, AccumulateGrads) for o in learn.cbs)
    if not stream:
        quiet_fit(learn, 1, [sizes], 1e-4)
        assert sizes.steps == -(-len(sizes.sizes)//2)
    old = batch_size(make().dls.train)
    with learn.no_logging(): learn.set_bs(old)
    assert batch_size(learn.dls.train) == old and not any(isinstance(o, GradientAccumulation) for o in learn.cbs)


class Index(torch_data.Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.tensor([float(i)]),torch.tensor([float(i)])


class Seen(Callback):
    run_valid = False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen += self.y.flatten().int().tolist()


@pytest.mark.parametrize('kind', ('fastai', 'PyTorch'))
@pytest.mark.parametrize('drop_last', (False, True))
@pytest.mark.parametrize('bs', (1, 7, 32, 100))
def test_an_epoch_sees_every_example_once_in_random_order(kind, drop_last, bs):
    make = DataLoader if kind == 'fastai' else torch_data.DataLoader
    learn = Learner(DataLoaders(make(Index(100), 8, shuffle=True, drop_last=drop_last), make(Index(100), 8)), nn.Linear(1, 1), loss_func=nn.functional.mse_loss)
    with learn.no_logging(): learn.set_bs(bs)
    seen = Seen()
    quiet_fit(learn, cbs=[seen], lr=0.)
    assert len(seen.seen) == len(set(seen.seen)) == (100 - 100 % bs if drop_last else 100) and seen.seen != sorted(seen.seen)
    assert batch_size(learn.dls.valid) == bs


@given(bs=st.integers(1, 5000), fits=st.integers(1, 5000))
def test_micro_batches(bs, fits):
    m = micro_bs(bs, fits)
    assert 1 <= m <= fits and (m == bs if bs <= fits else m > fits/2)
    k = -(-bs//m)
    if bs > fits: assert k*m - bs <= min((-(-bs//c)*c - bs for c in range(fits//2 + 1, fits + 1)))


def test_what_it_says(capsys):
    learn = digits_learner()
    assert learn.set_bs(64) is learn
    learn.set_bs(257, fits=100)
    learn.dls.train.drop_last = True
    learn.set_bs(800)
    out = capsys.readouterr().out.splitlines()
    n = learn.dls.train.n
    assert out[0] == f"Batches of 64 examples, {-(-n//64)} steps per epoch."
    assert out[1] == f"Batches of 86 examples, the gradients of 3 accumulated: 258 examples per step, {-(-(-(-n//86))//3)} steps per epoch."
    assert f"drop_last=True leaves {n - 800} of {n:,} examples out of each epoch" in out[2]


def test_the_answer_of_bs_find_and_its_advice(capsys):
    learn = digits_learner()
    sug = learn.bs_find(.1, 300, show_plot=False)
    def said(bs):
        learn.set_bs(bs)
        return capsys.readouterr().out.splitlines()[-1]
    n,(n_epoch,lr,_) = learn.dls.train.n,learn.recorder.bs_result.plan(64, 3)
    assert said(64) == (f"Batches of 64 examples, {-(-n//64)} steps per epoch. To get as far as in 3 epochs at the old size, train for {n_epoch} at lr≈{lr:.2g}: "
                        "learn.fit_one_cycle(*learn.bs_plan(3))")
    assert said(16) == f'Batches of 16 examples, {-(-n//16)} steps per epoch.'  # the size that was measured with
    learn.set_bs(sug)
    assert learn.dls.bs == (sug.fastest or 16)
    assert learn.set_bs(Sug(32, 48)).dls.bs == 48
    Own = namedtuple('Own', 'mine critical')
    assert learn.set_bs(Own(32, None)).dls.bs == 32
    with pytest.raises(ValueError, match="no batch size in {'mine': None, 'critical': None}"): learn.set_bs(Own(None, None))


Sug = namedtuple('Sug', 'critical fastest')
known = (350, 300, 400),(400, 300, 500),(450, 350, 600)
timed = {b: .004 + 2e-5*b for b in (16, 64, 256, 1024)}


@pytest.mark.parametrize('found,why', [
    (result(*known, bs=16), 'the speed of other batch sizes on this machine is not known'),
    (result((300, 1, inf), bs=16, step_time={b: 1e-3*b for b in (4, 16, 64)}), 'the noise scale is not known well enough'),
    (result((-350, 0, inf), bs=16, step_time=timed), 'the noise scale is not known'),
    (result(bs=16), 'the noise scale is not known'),
    (result(*known, bs=16, step_time=timed, alike=True), 'the training loader does not draw its batches at random'),
    (result(*known, bs=16, step_time=timed, mixed=True), 'this learner trains two networks in turn'),
    (result(*known, bs=16, step_time=timed, loss='between'), "what an example adds to this loss depends on the other examples in its batch")])
def test_what_is_not_known_to_be_faster_changes_nothing(found, why, capsys):
    assert found.suggested['fastest'] is None
    learn = digits_learner()
    was,sug = state(learn),Sug(*found.suggested.values())
    assert learn.set_bs(sug) is learn and capsys.readouterr().out == 'The batch size stays at 16: bs_find could not name a faster one.\n'
    said = f'The batch size stays at 16: bs_find could not name a faster one, because {why}.'
    for o in (sug, found):
        keep_result(learn.recorder, 'bs_result', found if o is sug else None)
        assert learn.set_bs(o) is learn and ' '.join(capsys.readouterr().out.split()) == said
    keep_result(learn.recorder, 'bs_result', found)
    learn.set_bs(Sug(7, None))  # somebody else's
    assert 'because' not in capsys.readouterr().out and changes(was, state(learn)) == []
    with learn.no_logging(): learn.set_bs(32, fits=8).set_bs(sug)
    assert learn.dls.bs == 8
    learn.set_bs(sug)
    assert 'stays at 32' in capsys.readouterr().out


def having(learn, *rows, **facts):
    "A learner for which `bs_find` found that"
    found = result(*rows, **dict(bs=16, n=1500, lr=.1, lr_given=.1) | facts)
    keep_result(learn.recorder, 'bs_result', found)
    return found


class Epochs(Callback):
    order = 70
    def before_fit(self): self.fits = getattr(self, 'fits', [])
    def after_fit(self): self.fits.append((self.n_epoch, self.learn.opt.hypers[-1]['lr']))


def test_a_plan():
    "Worked out by hand: with a noise scale of 48, 48 examples at once take half of the steps of 16, so 1.5 times the epochs, and bear twice the lr"
    learn = digits_learner(bs=16)
    having(learn, *[(48, 48, 48)]*3, n=15_000)
    assert learn.bs_plan(3) == (3, .1) and learn.bs_plan(1) == (1, .1)
    with learn.no_logging():
        learn.set_bs(48)
        assert learn.bs_plan(4) == (6, pytest.approx(.2)) and learn.bs_plan(1)[0] == 2
        learn.set_bs(48, fits=24)  # accumulated
        assert learn.dls.bs == 24 and learn.bs_plan(4) == (6, pytest.approx(.2))
        learn.set_bs(4)  # 3.25 times the steps: 0.8125 times the epochs
        assert learn.bs_plan(16) == (13, pytest.approx(.1/3.25))
        for given,scaled in ((slice(.01, .1), slice(.02, .2)), (slice(.1), slice(.2)), ([.01, .1], [.02, .2])):
            having(learn.set_bs(48), *[(48, 48, 48)]*3, n=15_000, lr_given=given)
            n,lr = learn.bs_plan(4)
            if isinstance(lr, slice): lr,scaled = ([v for v in (s.start, s.stop) if v] for s in (lr, scaled))
            assert n == 6 and lr == pytest.approx(scaled) and type(learn.bs_plan(4)) is tuple


def test_a_plan_has_a_hundred_steps_unless_the_training_had_fewer():
    learn = digits_learner(bs=16)
    having(learn, *[(1e6, 1e6, 1e6)]*3, step_time=timed)
    with learn.no_logging(): learn.set_bs(512)
    assert [learn.bs_plan(n)[0] for n in (1, 2, 40)] == [32, 35, 40]  # 94 steps, 100, 117


def test_a_plan_of_an_unknown_noise_scale():
    learn = digits_learner(bs=16)
    for rows,facts in (((), {}), ([(-5, 0, inf)], {}), (known, dict(alike=True)), (known, dict(biased=True))):
        having(learn, *rows, **facts, lr_given=slice(.01, .1))
        assert learn.bs_plan(3) == (3, slice(.01, .1))
        with learn.no_logging(): learn.set_bs(32)
        with pytest.raises(ValueError, match='n_epoch=3 at bs=16 cannot be converted to bs=32: .*, or go back with learn.set_bs' if not facts.get('biased') else 'without finder'):
            learn.bs_plan(3)
        with learn.no_logging(): learn.set_bs(16)
    for facts,words in ((dict(lr=0, lr_given=0), 'nothing was trained in the last bs_find: do what it said, and call it again'),
                        (dict(stopped='loss'), 'the loss was not finite in the last bs_find: do what it said')):
        having(learn, *known, **facts)
        with pytest.raises(ValueError, match=words): learn.bs_plan(3)


@pytest.mark.parametrize('n_epoch', (0, -1, 2.5, True, None, '3'))
def test_no_plan_for_bad_input(n_epoch):
    learn = digits_learner(bs=16)
    with pytest.raises(ValueError, match='epochs at the batch size of the last bs_find, and bs_find has not run yet: call learn.bs_find'): learn.bs_plan(3)
    having(learn, *known)
    with pytest.raises(ValueError, match=f'n_epoch={n_epoch!r} is not a whole number of 1 or more'): learn.bs_plan(n_epoch)


def test_batches_that_come_ready_made_keep_size_and_plan(capsys):
    X,y = digits()
    learn = Learner(DataLoaders(*[[(X[:4], y[:4])]]*2), mlp(), loss_func=nn.functional.cross_entropy)
    having(learn, *known)
    bs = learn.recorder.bs_result.run.bs
    assert learn.bs_plan(3) == (3, learn.recorder.bs_result.run.lr)
    assert f'The batches of this list come ready-made, so the plan is for bs={bs}, as measured.' in ' '.join(capsys.readouterr().out.split())
    assert learn.set_bs(Sug(None, None)) is learn and 'The batch size stays what it is: ' in capsys.readouterr().out


@pytest.mark.parametrize('fit', ('fit', 'fit_one_cycle', 'fine_tune'))
def test_a_training_takes_its_plan(fit):
    learn = digits_learner(bs=16, cbs=Epochs())
    having(learn, *[(48, 48, 48)]*3, n=15_000)
    with learn.no_bar(), learn.no_logging():
        learn.set_bs(48)
        getattr(learn, fit)(*learn.bs_plan(4))
    assert learn.epochs.fits[-1][0] == 6
    if fit == 'fit': assert learn.epochs.fits[-1][1] == pytest.approx(.2)


def test_memory_is_respected_if_it_is_known(monkeypatch):
    learn = digits_learner()
    learn.recorder.bs_fits = 40
    assert learn.set_bs(64).dls.bs == 32 and learn.accumulate_grads.n_acc == 64
    assert learn.set_bs(64, fits=64).dls.bs == 64
    del learn.recorder.bs_fits
    most = learn.max_bs()
    assert learn.recorder.bs_fits == most


def test_the_validation_loader_follows_if_it_had_the_same_size():
    learn = digits_learner()
    assert learn.dls.valid.bs == 64
    for bs in (64, 32, 16): assert learn.set_bs(bs).dls.valid.bs == 64  # and does not begin to
    learn = digits_learner(bs=64)
    for bs in (128, 32, 64): assert learn.set_bs(bs).dls.valid.bs == bs


def test_back_again_is_no_footprint():
    learn = digits_learner()
    was = state(learn)
    with learn.no_logging(): learn.set_bs(64, fits=32).set_bs(16)
    assert changes(was, state(learn)) == []


@pytest.mark.parametrize('bs,kwargs,words', [
    (0, {}, 'bs=0 is not a whole number of 1 or more'), (2.5, {}, 'bs=2.5'), (True, {}, 'bs=True'), (None, {}, 'bs=None'), (10**6, {}, r'bs=1000000 is more than the 1,\d+ examples of the training set'),
    (64, dict(fits=0), 'fits=0 is not'), (64, dict(fits='a'), "fits='a'")])
def test_bad_input(bs, kwargs, words):
    learn = digits_learner()
    was = state(learn)
    with pytest.raises(ValueError, match=words): learn.set_bs(bs, **kwargs)
    assert changes(was, state(learn)) == []


def test_what_cannot_be_set():
    X,y = digits()
    ds = torch_data.TensorDataset(X[:64], y[:64])
    own = torch_data.DataLoader(ds, batch_sampler=[[0, 1], [2, 3]])
    for dl in (own, torch_data.DataLoader(ds, batch_size=None), [(X[:4], y[:4])]):
        learn = Learner(DataLoaders(dl, dl), mlp(), loss_func=nn.functional.cross_entropy)
        with pytest.raises(ValueError, match='has no batch size to set'): learn.set_bs(8)
    learn = digits_learner()
    learn.add_cb(GradientAccumulation(64))
    with pytest.raises(ValueError, match=r'accumulates gradients already, with GradientAccumulation.*learn.remove_cb\(GradientAccumulation\)'): learn.set_bs(32)
    assert learn.dls.bs == 16


class ForSixteen(nn.Module):
    def __init__(self, only=16):
        super().__init__()
        self.net,self.only = mlp(),only
    def forward(self, x): return self.net(x.view(self.only, 64) if self.training else x)


@pytest.mark.parametrize('find', [lambda learn: learn.max_bs(), lambda learn: learn.bs_find(.1, 300, show_plot=False)])
def test_a_model_for_one_batch_size(find, capsys):
    learn = digits_learner(cbs=Sizes())
    learn.model,learn.dls.train.drop_last = ForSixteen(),True
    found = find(learn)
    assert learn.recorder.bs_fits == 16 and 'Only batches of 16 examples work here' in capsys.readouterr().out
    if isinstance(found, tuple):
        assert found.critical == 16 and learn.recorder.bs_table.fits[32] == 'accumulate 2'
        learn.set_bs(found)
        quiet_fit(learn)
    for bs,micros in ((16, 1), (40, 3), (128, 8), (300, 19)):
        learn.set_bs(bs)
        assert f'larger ones fail (shape' in capsys.readouterr().out or micros == 1
        quiet_fit(learn)
        assert set(learn.sizes.sizes) == {16} and learn.sizes.steps == -(-93//micros)
    with pytest.raises(ValueError, match='bs=8 does not work here: a batch of fewer than 16 examples fails .* Give 16 or a multiple of it'): learn.set_bs(8)
    learn.set_bs(8, fits=8)  # whoever knows better


def test_one_example(capsys):
    learn = digits_learner()
    learn.set_bs(4, fits=1)
    assert capsys.readouterr().out.startswith('Batches of 1 example, the gradients of 4 accumulated: 4 examples per step')


def normalizing(n, bs, kind='PyTorch', width=64, norm=nn.BatchNorm1d(32)):
    "Digits, `n` of them, and a network with batch-norm"
    X,y = digits()
    make = DataLoader if kind == 'fastai' else torch_data.DataLoader
    dl = make(torch_data.TensorDataset(X[:n], y[:n]), bs, shuffle=True)
    return Learner(DataLoaders(dl, make(torch_data.TensorDataset(X[-64:], y[-64:]), 64)), nn.Sequential(nn.Linear(64, 32), norm, nn.ReLU(), nn.Linear(32, 10)),
                   loss_func=nn.functional.cross_entropy)


@pytest.mark.parametrize('kind', ('fastai', 'PyTorch'))
@pytest.mark.parametrize('n,bs,fits', [(1281, 64, None), (1281, 256, 64), (65, 64, None), (1000, 27, None), (97, 96, 32)])  # fastai #970, nncf #379
def test_a_last_batch_of_one_that_batch_norm_cannot_take_is_left_out(kind, n, bs, fits, capsys):
    learn = normalizing(n, 50, kind)
    was,sizes = state(learn),Sizes()
    learn.set_bs(bs, fits=fits)
    assert 'the last example of an epoch is left out: batch-norm cannot take a batch of one' in capsys.readouterr().out
    quiet_fit(learn, 2, [sizes])
    assert 1 not in sizes.sizes and sum(sizes.sizes) == 2*(n - 1)
    learn = normalizing(n, 50, kind)
    was = state(learn)
    with learn.no_logging(): learn.set_bs(bs, fits=fits).set_bs(50)
    assert changes(was, state(learn)) == []


def test_every_example_is_seen_where_a_batch_of_one_does_no_harm(capsys):
    for learn in (normalizing(1281, 50, norm=nn.LayerNorm(32)), normalizing(1282, 50)):
        sizes = Sizes()
        learn.set_bs(64)
        quiet_fit(learn, 1, [sizes])
        assert 'left out' not in capsys.readouterr().out and sum(sizes.sizes) == len(learn.dls.train.dataset)


@pytest.mark.parametrize('bs', (50, 64))  # with 64, the learner's own fit would fail
def test_what_is_suggested_for_a_batch_norm_can_be_trained_with(bs):
    learn = normalizing(1281, bs)
    with learn.no_bar(), learn.no_logging():
        was = state(learn)
        sug = learn.bs_find(.1, num_it=100, show_plot=False, profile=1.)
        result = learn.recorder.bs_result
        assert not result.profile.trouble and result.run.stopped == ''
        forget(learn)
        assert changes(was, state(learn)) == []
        assert not any(result.leaves_one(b) for b in sug if b and b != bs)  # `set_bs` leaves out the last example
        learn.set_bs(sug)
    quiet_fit(learn)


def test_a_step_of_time_first_batches():
    "600 sequences, T × batch: 5 steps of 128, accumulated or not"
    seqs = [(torch.ones(12, 3),)*2 for _ in range(600)]
    dl = torch_data.DataLoader(seqs, 32, shuffle=True, drop_last=True, collate_fn=lambda b: tuple(torch.stack(o, 1) for o in zip(*b)))
    learn = Learner(DataLoaders(dl, dl), nn.Linear(3, 3), loss_func=nn.functional.mse_loss)
    assert learn.max_bs() == 600
    for fits in (32, None):
        sizes = Sizes()
        with learn.no_logging(): learn.set_bs(128, fits=fits)
        quiet_fit(learn, 1, [sizes])
        assert set(sizes.sizes) == {fits or 128} and sizes.steps == (5 if fits else 4)
