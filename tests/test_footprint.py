"After bs_find, however it ended, nobody can tell that it ran"
import random, signal
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch
from torch import nn
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoaders, Learner, Metric, OptimWrapper, SGD, accuracy
from fastai.callback.all import MixUp, ParamScheduler, ProgressCallback, SchedCos, rnn_cbs
from fastai.imports import noop

from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner


def frozen(o, seen=None):
    "A copy of the state of `o`, of plain values only, that can be compared"
    seen = seen or set()
    if id(o) in seen: return 'seen'
    sub = lambda v: frozen(v, seen | {id(o)})
    if isinstance(o, torch.Tensor):
        grad = o.grad if o.is_leaf else None
        return ('tensor', o.dtype, o.device, o.requires_grad, o.detach().cpu().numpy().tobytes(), None if grad is None else grad.cpu().numpy().tobytes())
    if isinstance(o, np.ndarray): return o.tobytes()
    if isinstance(o, random.Random): return o.getstate()
    if isinstance(o, (list, tuple)): return [type(o)] + [sub(v) for v in o]
    if isinstance(o, dict): return {k if isinstance(k, (str, int)) else id(k): sub(v) for k,v in o.items()}
    if isinstance(o, (Callback, Metric, nn.Module)) or type(o).__name__ in ('L', 'SGD', 'Optimizer', 'OptimWrapper', 'Adam', 'AdamW'): return (id(o), {k: sub(v) for k,v in vars(o).items() if k != 'learn'})
    return id(o) if not isinstance(o, (int, float, str, type(None))) else o


def state(learn):
    "Everything of a learner that a training could change"
    return dict(learner={k: frozen(v) for k,v in vars(learn).items() if k != 'dls'}, cbs=[(id(c), frozen(c)) for c in learn.cbs], flags=[m.training for m in learn.model.modules()],
                opt=None if learn.opt is None else [frozen(learn.opt.state.get(p)) for p in learn.model.parameters()] + [dict(h) for h in learn.opt.hypers],
                dl={k: frozen(v) for k,v in vars(learn.dls.train).items() if k not in ('dataset', 'fake_l')},
                rng=[random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()])


def changes(was, now, path='learn'):
    "Where two states differ, as a list of paths"
    if was == now: return []
    if isinstance(was, dict) and isinstance(now, dict):
        return sum([changes(was.get(k, 'missing'), now.get(k, 'missing'), f'{path}.{k}') for k in was.keys() | now.keys()], [])
    if isinstance(was, (list, tuple)) and isinstance(now, (list, tuple)) and len(was) == len(now):
        return sum([changes(a, b, f'{path}[{i}]') for i,(a,b) in enumerate(zip(was, now))], [])
    return [path]


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

@pytest.mark.parametrize('before', trained.values(), ids=trained.keys())
@pytest.mark.parametrize('opt_func', [SGD, Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['SGD', 'Adam', 'OptimWrapper'])
def test_nothing_changes(before, opt_func):
    learn = rich_learner(opt_func, cbs=[Remember(), MixUp(.4), ParamScheduler({'lr': SchedCos(1e-2, 1e-4)})])
    before(learn)
    was = state(learn)
    find(learn)
    del learn.recorder.bs_stats
    assert changes(was, state(learn)) == []


def train(learn, epochs=2):
    learn.fit_one_cycle(epochs, 1e-2)
    return [p.detach().clone() for p in (*learn.model.parameters(), *learn.model.buffers())] + [torch.tensor(learn.recorder.losses), torch.tensor(learn.recorder.values)]


def find(learn): return learn.bs_find(1e-2, 130, show_plot=False)


def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))


@pytest.mark.parametrize('opt_func', [SGD, Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['SGD', 'Adam', 'OptimWrapper'])
@pytest.mark.parametrize('epochs_before', [0, 1])
def test_training_after_is_bit_identical(opt_func, epochs_before):
    res = []
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


@pytest.mark.parametrize('error', [RuntimeError('broken'), KeyboardInterrupt(), torch.OutOfMemoryError('no memory')], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('at', [0, 3, 15, 128])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_batch'])
def test_an_exception_leaves_no_trace(error, at, event):
    res = []
    for broken in (False, True):
        learn = rich_learner(cbs=Break(error, at, event))
        train(learn, 1)
        was = state(learn)
        if broken:
            with pytest.raises(type(error)): find(learn)
            assert changes(was, state(learn)) == []
        res.append(train(learn, 1))
    assert same(*res)


def test_an_exception_in_the_loader_leaves_no_trace():
    learn = rich_learner()
    good = learn.dls.train.dataset
    class Bad(list):
        def __getitem__(self, i):
            if i == 700: raise OSError('unreadable')
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
    learn = rich_learner()
    x = learn.dls.train.dataset[0][0]
    snapshot = Snapshot(learn)
    assert all(t is not x for t,*_ in snapshot._tensors)


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
    del learn.recorder.bs_stats
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


def test_a_second_interrupt_waits_until_everything_is_back():
    learn = rich_learner()
    was = state(learn)
    snapshot = Snapshot(learn)
    learn.fit(1)
    snapshot._undo.insert(len(snapshot._undo)//2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt): snapshot.restore()
    assert changes(was, state(learn)) == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
