"After bs_find, however it ended, nobody can tell that it ran"
import argparse, dataclasses, multiprocessing, random, signal, sys, threading
from copy import deepcopy
from functools import partial
from multiprocessing.process import BaseProcess
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, Pipeline, SGD, Transform, accuracy, set_seed
from fastai.callback.all import MixUp, ParamScheduler, ProgressCallback, SchedCos, rnn_cbs
from fastai.imports import noop

from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from footprint import assert_no_footprint, changes, forget, same, state
from learners import digits, mlp, torch_loaders
from tiers import each_pair, each_value, in_tiers


@pytest.fixture(autouse=True)
def end_workers():
    "Persistent workers take seconds to end by themselves"
    yield
    for p in multiprocessing.active_children(): p.terminate()


def rich_learner(opt_func=Adam, **kwargs):
    "Batch-norm, dropout, a buffer, metrics, and callbacks with state"
    learn = digits_learner(opt_func=opt_func, metrics=[accuracy], **kwargs)
    learn.model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.3), nn.Linear(32, 10))
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


class Remember(Callback):
    "A user's callback that keeps all sorts of state"
    def __init__(self): self.seen,self.by_epoch,self.best,self.avg,self.rng,self.counts = [],{},None,nn.Linear(2, 2),np.random.default_rng(3),np.zeros(3)
    def before_fit(self): self.started = True
    def after_step(self):
        self.seen.append(self.rng.random() + np.random.rand() + random.random())
        self.counts += 1
        self.by_epoch.setdefault(self.epoch, []).append(self.learn.loss.item())
        self.best = min(self.best or 9, self.learn.loss.item())
        with torch.no_grad(): self.avg.weight += 1


trained = {'new': lambda learn: None, 'trained': lambda learn: learn.fit(1, 1e-3), 'validated': lambda learn: learn.validate(),
           'with gradients': lambda learn: (learn.fit(1, 1e-3), learn.model(torch.rand(8, 64)).sum().backward()),
           'in eval mode, partly frozen': lambda learn: (learn.model.eval(), learn.model[0].requires_grad_(False), learn.model[1].train())}

optimizers = dict(SGD=SGD, Adam=Adam, OptimWrapper=partial(OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('before,opt', in_tiers(each_value, list(trained), list(optimizers)))
def test_nothing_changes(before, opt):
    learn = rich_learner(optimizers[opt], cbs=[Remember(), MixUp(.4), ParamScheduler({'lr': SchedCos(1e-2, 1e-4)})])
    trained[before](learn)
    was = state(learn)
    find(learn)
    forget(learn)
    assert changes(was, state(learn)) == []


def train(learn, epochs=2):
    learn.fit_one_cycle(epochs, 1e-2)
    return [p.detach().clone() for p in (*learn.model.parameters(), *learn.model.buffers())] + [torch.tensor(learn.recorder.losses), torch.tensor(learn.recorder.values)]


def find(learn): return learn.bs_find(1e-2, 130, show_plot=False)


@pytest.mark.parametrize('opt,epochs_before', in_tiers(each_value, list(optimizers), [0, 1]))
def test_training_after_is_bit_identical(opt, epochs_before):
    opt_func,res = optimizers[opt],[]
    for finds in (0, 1, 2):
        learn = rich_learner(opt_func)
        if epochs_before: train(learn, epochs_before)
        for _ in range(finds): find(learn)
        res.append(train(learn))
    assert same(res[0], res[1]) and same(res[0], res[2])
    learn = rich_learner(opt_func)
    train(learn, epochs_before + 1)
    assert not same(res[0], train(learn))                      # the comparison can fail


class Break(Callback):
    "Raise `error` at batch `at` of a mock training, in `event`; with the budget here the last one is 129"
    def __init__(self, error, at, event):
        def f():
            if hasattr(self.learn, 'lr_finder') and self.train_iter >= at: raise error
        setattr(self, event, f)


@pytest.mark.parametrize('error,at,event', in_tiers(each_pair, [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError], [0, 15], ['before_batch', 'after_pred', 'after_batch']))
def test_an_exception_leaves_no_trace(error, at, event):
    res = []
    for broken in (False, True):
        learn = rich_learner(cbs=Break(error('broken'), at, event))
        train(learn, 1)
        was = state(learn)
        if broken:
            with pytest.raises(error): find(learn)
            assert changes(was, state(learn)) == []
        res.append(train(learn, 1))
    assert same(*res)


def test_an_exception_in_the_loader_leaves_no_trace():
    learn = rich_learner()
    good = learn.dls.train.dataset
    class Bad(list):
        def __getitem__(self, i):
            if i % 100 == 7: raise OSError('unreadable')
            return good[i]
    learn.dls.train.dataset = Bad(range(1500))
    was = state(learn)
    with pytest.raises(OSError): find(learn)
    assert changes(was, state(learn)) == []


def test_objects_stay_the_same_objects():
    learn = rich_learner()
    train(learn, 1)
    held = [*learn.model.parameters(), learn.opt, learn.recorder.losses, learn.recorder.values, learn.dls.train.rng]
    find(learn)
    now = [*learn.model.parameters(), learn.opt, learn.recorder.losses, learn.recorder.values, learn.dls.train.rng]
    assert all(a is b for a,b in zip(held, now, strict=True))
    assert all(p is q for p,(q,*_) in zip(learn.model.parameters(), learn.opt.all_params()))


def test_nothing_is_written(tmp_path, monkeypatch):
    learn = rich_learner(path=tmp_path)
    monkeypatch.setattr(torch, 'save', lambda *a, **k: pytest.fail('torch.save'))
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    find(learn)
    assert list(tmp_path.iterdir()) == []


def test_the_data_are_not_copied():
    "Large tensors, arrays and containers in the data, unless they belong to a module, or something else of the learner holds them too"
    class Data(torch.utils.data.Dataset):
        def __init__(self): self.x,self.y,self.shared,self.rows,self.net = torch.zeros(1000, 101),np.zeros(100_001),torch.zeros(100_001),[torch.zeros(1)]*1001,nn.Linear(400, 400)
        def __len__(self): return 1000
        def __getitem__(self, i): return self.x[i],int(self.y[i])
    class Own(Callback):
        def __init__(self, data): self.shared,self.data = data.shared,data
    data = Data()
    learn = rich_learner(cbs=Own(data))
    learn.dls.loaders[0] = DataLoader(data, bs=10)
    weight = data.net.weight.detach().clone()
    with no_footprint(learn):
        for t in (data.x, data.y, data.shared, data.rows[0], data.net.weight.data): t += 1
        data.rows[1:] = []
    assert dict(x=data.x.max(), y=data.y.max(), shared=data.shared.max(), rows=data.rows[0].max()) == dict(x=1, y=1, shared=0, rows=1) and len(data.rows) == 1001 and torch.equal(data.net.weight, weight)


def test_of_many_middling_things_in_the_data_some_are_copied():
    class Data(torch.utils.data.Dataset):
        def __init__(self): self.x,self.boxes = [torch.zeros(30_000) for _ in range(900)],[[[0]*4]*100 for _ in range(900)]
        def __len__(self): return 900
        def __getitem__(self, i): return self.x[i],0
    learn = rich_learner()
    learn.dls.loaders[0] = DataLoader(Data(), bs=10)
    snapshot = Snapshot(learn)
    assert sum(t.numel() for t,*_ in snapshot._tensors) < 10_100_000 and len(snapshot._seen) < 25_000


def test_the_data_of_loaders_of_any_class_are_not_copied():
    class FromMemory:
        def __init__(self): self.x,self.y = torch.zeros(2000, 64),torch.zeros(2000).long()
        def __len__(self): return 100
        def __iter__(self): return zip(self.x.split(20), self.y.split(20))
    class Both:
        def __init__(self): self.train,self.valid = FromMemory(),FromMemory()
        def __getitem__(self, i): return (self.train, self.valid)[i]
    learn = rich_learner()
    learn.dls = Both()
    with no_footprint(learn): learn.dls.train.x += 1
    assert learn.dls.train.x.max() == 1
    learn.bs_find(1e-2, 130, 10, show_plot=False, regret=0)
    assert len(learn.recorder.bs_stats) == 6


def test_the_optimizer_goes_on_from_where_it_is():
    seen = []
    class See(Callback):
        def before_step(self, note=partial(list.append, seen)): note((self.opt, self.opt.state[next(self.model.parameters())].get('step', 0)))
    learn = rich_learner(Adam, cbs=See())
    learn.fit(1, 1e-2)
    n = len(seen)
    find(learn)
    assert seen[n][0] is learn.opt and [step for _,step in seen[n:n + 3]] == [n, n + 1, n + 2]


def test_plain_pytorch_loaders():
    X,y = torch.rand(200, 64),torch.randint(10, (200,))
    def learner():
        torch.manual_seed(0)
        dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), 10, shuffle=True, generator=torch.Generator().manual_seed(5))
        learn = Learner(DataLoaders(dl, dl), nn.Sequential(nn.Linear(64, 10)), loss_func=CrossEntropyLossFlat())
        learn.logger = noop
        return learn.remove_cb(ProgressCallback)
    res = []
    for finds in (False, True):
        learn = learner()
        if finds: find(learn)
        res.append(train(learn, 1))
    assert same(*res)


def test_restore_changes_of_every_kind():
    "What a callback might do to tensors and flags, apart from training"
    learn = rich_learner()
    tied = learn.model[4].weight
    learn.model.expanded = torch.zeros(1).expand(4)
    learn.model.held = deepcopy(learn.model[0].bias)
    was = state(learn)
    with no_footprint(learn):
        learn.model[0].weight.data = torch.zeros(3)             # another storage, shape
        learn.model[1].half()                                   # dtype
        del learn.model.held
        learn.model.new = 1
        learn.model[4].weight = nn.Parameter(torch.zeros(10, 32))
        learn.model[0].bias.requires_grad_(False)
        learn.cbs.clear()
        learn.recorder = None
    assert changes(was, state(learn)) == [] and learn.model[4].weight is tied


class Grumpy(dict):
    "A dictionary that takes no `update`, as some libraries have it"
    def update(self, *args): raise TypeError('no')
    clear = update


class Mean(Callback):
    "Adds up the loss in a tensor, which so becomes a part of the graph"
    def __init__(self): self.total,self.kept,self.sizes = torch.zeros(()),Grumpy(a=1),np.zeros(2)
    def after_loss(self):
        self.total += self.learn.loss
        self.kept['a'] += 1
        self.sizes.resize(len(self.sizes) + 1, refcheck=False)


def test_odd_state_of_callbacks():
    learn = rich_learner(cbs=Mean())
    was = state(learn)
    find(learn)
    forget(learn)
    assert changes(was, state(learn)) == [] and learn.mean.total.is_leaf and learn.mean.kept == dict(a=1) and len(learn.mean.sizes) == 2


def test_what_cannot_be_put_back_holds_up_nothing_else():
    class Stuck:
        def __setattr__(self, k, v): raise RuntimeError('stuck')
    learn = rich_learner()
    was = state(learn)
    snapshot = Snapshot(learn)
    snapshot._undo[1:1] = [lambda: setattr(Stuck(), 'x', 1)]*2
    learn.fit(1)
    with pytest.raises(RuntimeError, match='stuck'): snapshot.restore()
    assert changes(was, state(learn)) == []


def lines_after_the_block(learn, at):
    "Press Ctrl-C at line number `at` of what follows a block without footprint; returns whether there was such a line"
    n,pressed,ended = 0,False,False
    def local(frame, event, arg):
        nonlocal n,pressed
        if event == 'line' and ended:
            n += 1
            if n == at:
                pressed = True
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return local
    def trace(frame, event, arg): return local if frame.f_code.co_filename == Snapshot.restore.__code__.co_filename else None
    block = no_footprint(learn)
    try:
        sys.settrace(trace)
        with block:
            with torch.no_grad(): next(learn.model.parameters()).add_(1)
            learn.lr_finder = ended = True
    except KeyboardInterrupt: assert pressed
    else: assert not pressed
    finally: sys.settrace(None)
    return pressed


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_the_end_leaves_no_trace():
    learn = own()
    was,at = state(learn),1
    while lines_after_the_block(learn, at):
        assert not hasattr(learn, 'lr_finder') and torch.is_grad_enabled() and signal.getsignal(signal.SIGINT) is signal.default_int_handler, at
        at += 1 if at < 60 else 97
    assert at > 500 and changes(was, state(learn)) == []


def test_a_second_interrupt_waits_until_everything_is_back(monkeypatch):
    restore = Snapshot.restore
    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        restore(self)
    monkeypatch.setattr(Snapshot, 'restore', interrupted)
    learn = rich_learner()
    was = state(learn)
    with pytest.raises(KeyboardInterrupt):
        with no_footprint(learn):
            learn.fit(1)
            signal.raise_signal(signal.SIGINT)
    assert changes(was, state(learn)) == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_workers_start(monkeypatch):
    start,started = BaseProcess.start,[]
    def interrupted(self):
        started.append(self)
        if len(started) == 2: raise KeyboardInterrupt
        return start(self)
    learn = own(num_workers=2)
    was = state(learn)
    monkeypatch.setattr(BaseProcess, 'start', interrupted)
    with pytest.raises(KeyboardInterrupt): find(learn)
    assert multiprocessing.active_children() == [] and changes(was, state(learn)) == []


@pytest.mark.parametrize('compiled', [False, True], ids=['new', 'trained'])
def test_torchscript(compiled):
    learn = rich_learner()
    learn.model = torch.jit.script(learn.model)
    if compiled: learn.fit(1)
    was,flags = {k: v.clone() for k,v in learn.model.state_dict().items()},[m.training for m in learn.model.modules()]
    find(learn)
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items()) and [m.training for m in learn.model.modules()] == flags


def test_autocast_is_switched_off_again():
    class HalfPrecision(Callback):
        "Enters autocast as `MixedPrecision` does, and is interrupted before it can leave it"
        def before_batch(self):
            torch.autocast('cpu', dtype=torch.float16).__enter__()
            raise KeyboardInterrupt
    learn = rich_learner(cbs=HalfPrecision())
    dtype = torch.get_autocast_dtype('cpu')
    with pytest.raises(KeyboardInterrupt): find(learn)
    assert not torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == dtype and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert torch.autocast_increment_nesting() == 1 and torch.autocast_decrement_nesting() == 0


def test_gradients_are_switched_on_again():
    class NoGrad(Callback):
        "Is interrupted where it has switched gradients off"
        def after_batch(self):
            torch.set_grad_enabled(False)
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): find(rich_learner(cbs=NoGrad()))
    assert torch.is_grad_enabled()


def test_a_language_model_keeps_its_order():
    from fastai.text.all import AWD_LSTM, LMDataLoader, get_language_model
    texts = [torch.randint(20, (n,), generator=torch.Generator().manual_seed(n)) for n in range(60, 400, 7)]
    res = []
    for finds in (False, True):
        random.seed(1), torch.manual_seed(1)
        ds = [(t,) for t in texts]
        dl = LMDataLoader(ds, lens=[len(t) for t in texts], bs=8, seq_len=12, shuffle=True)
        learn = Learner(DataLoaders(dl, dl), get_language_model(AWD_LSTM, 20, config=dict(emb_sz=8, n_hid=16, n_layers=2, pad_token=1, bidir=False, output_p=.1, hidden_p=.1,
                        input_p=.1, embed_p=.1, weight_p=.1, tie_weights=True, out_bias=True)), loss_func=CrossEntropyLossFlat(), cbs=rnn_cbs())
        learn.logger = noop
        learn.remove_cb(ProgressCallback)
        if finds: learn.bs_find(1e-2, 30, 5, show_plot=False)
        res.append(train(learn, 1))
    assert same(*res)


# State in objects of any class

class Shaky(Transform):
    "Adds noise from a generator of its own, and counts"
    def __init__(self, seed=1): self.rng,self.n = np.random.default_rng(seed),0
    def encodes(self, x:torch.Tensor):
        self.n += 1
        return x + .1*self.rng.random() if x.is_floating_point() else x


class Noisy:
    "A data set of the user's own class, with a generator, a cache and an order that it shuffles"
    def __init__(self):
        self.X,self.y = digits()
        self.rng,self.cache,self.order,self.hits = random.Random(3),{},list(range(320)),np.zeros(320)
    def __len__(self): return 320
    def __getitem__(self, i):
        if i == 0: self.rng.shuffle(self.order)
        self.cache[i] = self.hits[i] = 1
        return self.X[self.order[i]] + self.rng.random(),self.y[self.order[i]]


class Tabled(Noisy):
    "A data set that counts in a table, and in a list that reads itself from elsewhere"
    def __init__(self):
        super().__init__()
        self.table,self.names = pd.DataFrame(dict(hits=np.zeros(320))),FromElsewhere(map(str, range(320)))
    def __getitem__(self, i):
        self.table.loc[i, 'hits'] += 1
        return super().__getitem__(i)


class FromElsewhere(list):
    def __iter__(self): return (f'what stands in {name}' for name in super().__iter__())


class OddOnesLess(torch.utils.data.Sampler):
    "A sampler with a generator of its own"
    def __init__(self, n): self.n,self.rng = n,np.random.RandomState(7)
    def __len__(self): return self.n//2
    def __iter__(self): return iter(self.rng.choice(self.n, self.n//2, replace=False).tolist())


@dataclasses.dataclass(slots=True, eq=False)
class Slots:
    n:int = 0
    seen:list = dataclasses.field(default_factory=list)


class Focal:
    "A loss of the user's own class, with state: a running mean in a tensor, a slot, and a table"
    def __init__(self): self.mean,self.slots,self.table,self.last = torch.zeros(2),Slots(),pd.DataFrame(dict(loss=[0.]), index=['first']),SimpleNamespace(pred=None, n=0)
    def __call__(self, pred, y):
        loss = nn.functional.cross_entropy(pred, y)
        self.mean += loss.detach()
        self.slots.n += 1
        self.slots.seen.append(loss.item())
        self.table.loc['first', 'loss'] = loss.item()
        self.table.loc[len(self.table)] = [loss.item()]
        self.last.pred,self.last.n = pred.detach(),self.last.n + 1
        return loss*(1 + self.mean[0]/1e4)
    def as_method(self, pred, y): return self(pred, y)


class Late:
    "A slot that is empty at first, and objects that are keys, or that argparse made"
    __slots__ = 'last','weights','args'
    def __init__(self): self.weights,self.args = {Slots(): .5},argparse.Namespace(n=0)
    def __call__(self, pred, y):
        self.last = pred.detach()
        for part in self.weights: part.n += 1
        self.args.n += 1
        return nn.functional.cross_entropy(pred, y)


def counting(pred, y):
    counting.n += 1
    return nn.functional.cross_entropy(pred, y)

counting.n = 0


def distilled(pred, y, norm, shaky):
    "A loss with a module and an object of its own, which a partial keeps"
    return nn.functional.cross_entropy(norm(pred) + shaky.rng.random(), y)


def of_what_cannot_be_looked_at():
    "Objects that refuse, and whatever has no state to copy"
    class Refuses:
        def __getattr__(self, name): raise RuntimeError(f'no {name}')
        @property
        def __dict__(self): raise RuntimeError('no')
    class Holder(Callback):
        def __init__(self): self.refuses,self.meta,self.system,self.lazy = Refuses(),torch.zeros(3, device='meta'),random.SystemRandom(),nn.LazyLinear(3)
    def loss(pred, y): return nn.functional.cross_entropy(pred, y) if pred is not None else never
    if loss is None: never = 0
    return own(loss=loss, cbs=Holder())


def test_what_cannot_be_looked_at_is_named():
    with pytest.warns(UserWarning, match='cannot look into an object of .*Refuses .RuntimeError: no.: what training changes in it is not put back') as said:
        Snapshot(of_what_cannot_be_looked_at())
    assert len([w for w in said if 'cannot look into' in str(w.message)]) == 1


def own(dataset=None, loss=None, cbs=None, **kwargs):
    set_seed(1)
    X,y = digits()
    dl = DataLoader(dataset or list(zip(X[:320], y[:320])), bs=16, shuffle=True, drop_last=True, **kwargs)
    return Learner(DataLoaders(dl, torch_loaders().valid), mlp(), loss_func=loss or CrossEntropyLossFlat(), cbs=cbs, metrics=accuracy)


def in_closure():
    rng = np.random.default_rng(5)
    def collate(samples): return torch.stack([x for x,_ in samples]) + rng.random(),torch.stack([y for _,y in samples])
    return own(create_batch=collate)


global_rng,class_rng = np.random.default_rng(6),random.Random(8)

def from_global(samples): return torch.stack([x for x,_ in samples]) + global_rng.random(),torch.stack([y for _,y in samples])

def with_global():
    global_rng.bit_generator.state = np.random.default_rng(6).bit_generator.state
    return own(create_batch=from_global)


class Global(Transform):
    def encodes(self, x:torch.Tensor): return x + class_rng.random() if x.is_floating_point() else x


def with_global_in_a_class():
    class_rng.seed(8)
    return own(after_batch=Pipeline([Global()]))


def with_worker(**kwargs):
    set_seed(1)
    dl = torch.utils.data.DataLoader(Noisy(), 16, num_workers=1, **kwargs)
    return Learner(DataLoaders(dl, torch_loaders().valid), mlp(), loss_func=CrossEntropyLossFlat())


def with_sampler():
    set_seed(1)
    X,y = digits()
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:640], y[:640]), 16, sampler=OddOnesLess(640))
    return Learner(DataLoaders(dl, torch_loaders().valid), mlp(), loss_func=CrossEntropyLossFlat())


def after_a_fit(make):
    def f():
        learn = make()
        learn.fit(1, 1e-2)
        return learn
    return f


def shaken(samples, rng): return torch.stack([x for x,_ in samples]) + rng.random(),torch.stack([y for _,y in samples])


class Hooks(Callback):
    "Registers hooks on parameters, and a sparse buffer, and never takes them off; changes sparse and overlapping tensors in place"
    def __init__(self): self.csr,self.overlapping = torch.eye(3).to_sparse_csr(),torch.zeros(10).as_strided((3, 3), (1, 1))
    def before_batch(self): self.csr.values().add_(1)
    def before_fit(self):
        p = next(self.model.parameters())
        p.register_hook(lambda g: g*1.01)
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', p.grad*1.01))
        self.learn.model.register_buffer('csr', torch.eye(3).to_sparse_csr())
    def after_step(self):
        self.model.csr.values().add_(1)
        self.overlapping.add_(1)


def with_sparse_buffers():
    learn = own(cbs=Hooks())
    learn.model.register_buffer('csr', torch.eye(3).to_sparse_csr())
    return learn


odd = {
    'transform of batches': lambda: own(after_batch=Pipeline([Shaky()])),
    'transform of items': lambda: own(after_item=Pipeline([Shaky()])),
    'data set of a class': lambda: own(Noisy()),
    'data set of a class, workers': lambda: own(Noisy(), num_workers=1),
    'sampler': with_sampler,
    'data set of a class, persistent workers': lambda: with_worker(persistent_workers=True),
    'loss with state': lambda: own(loss=Focal()),
    'data set with a table and a list of its own kind': lambda: own(Tabled()),
    'loss with keys and late slots': lambda: own(loss=Late()),
    'loss with attributes of a function': lambda: own(loss=counting),
    'loss with a module in a partial': lambda: own(loss=partial(distilled, norm=nn.BatchNorm1d(10), shaky=Shaky())),
    'what cannot be looked at': of_what_cannot_be_looked_at,
    'loss that is a method': lambda: own(loss=Focal().as_method),
    'generator in a closure': in_closure,
    'generator of the module': with_global,
    'generator of the module, in a class': with_global_in_a_class,
    'generator in a partial': lambda: own(create_batch=partial(shaken, rng=random.Random(2))),
    'method of a generator': lambda: own(after_batch=lambda b, draw=np.random.default_rng(9).random: (b[0] + draw(), b[1])),
    'built-in method of a generator': lambda: own(after_batch=lambda b, draw=random.Random(9).random: (b[0] + draw(), b[1])),
    'hooks and sparse buffers': with_sparse_buffers,
}

@pytest.mark.filterwarnings('ignore:Sparse CSR')
@pytest.mark.parametrize('kind,before', in_tiers(each_value, list(odd), ['new', 'trained']))
def test_state_of_any_class(kind, before):
    make = odd[kind]
    assert_no_footprint(make if before == 'new' else after_a_fit(make), lambda learn: learn.bs_find(1e-2, 20, 4, show_plot=False), lambda learn: learn.fit(1, 1e-2))


def test_persistent_workers_are_kept():
    learn = after_a_fit(lambda: with_worker(persistent_workers=True))()
    before = multiprocessing.active_children()
    learn.bs_find(1e-2, 20, 4, show_plot=False)
    assert multiprocessing.active_children() == before and len(before) == 1


def test_what_lives_on_its_own_is_left_alone():
    "A writer with a thread of its own, as loggers have it, goes on while the learner is restored"
    class Writer:
        def __init__(self): self.queue,self.lock,self.written = [],threading.Lock(),0
        def write(self): self.written += 1
    class Log(Callback):
        def __init__(self): self.writer = Writer()
        def after_step(self): self.writer.write()
    learn = own(cbs=Log())
    learn.bs_find(1e-2, 20, 4, show_plot=False)
    assert learn.log.writer.written > 0
