"The check that nobody can tell that `bs_find` ran: everything that can be reached from a learner, compared bit for bit"
import copyreg, hashlib, inspect, random
from collections import deque
from functools import partial
from pathlib import PurePath
from types import ModuleType

import numpy as np, pandas as pd, torch
from torch.nn.parameter import is_lazy
from torch.utils.data.dataloader import _BaseDataLoaderIter


def digest(data): return hashlib.blake2b(data, digest_size=8).hexdigest()


def frozen(o, seen):
    "The state of `o` in plain values that can be compared; what was seen before is a number, so sharing is compared too"
    if o is None or isinstance(o, (bool, int, float, complex, str, bytes, type, ModuleType)): return o if o == o else 'nan'
    if id(o) in seen: return f'no. {seen[id(o)][0]}'
    seen[id(o)] = len(seen),o
    sub = lambda v: frozen(v, seen)
    if isinstance(o, torch.Tensor) and (o.is_meta or is_lazy(o)): return id(o)
    if isinstance(o, torch.Tensor):
        t = o.detach().to_dense() if o.layout != torch.strided else o.detach()
        kind = o.dtype, str(o.device), o.layout, tuple(o.shape), o.stride() if o.layout == torch.strided else None, o.requires_grad, o.is_leaf
        return dict(id=id(o), kind=kind, data=digest(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()),
                    grad=sub(o.grad) if o.is_leaf else None, hooks=[len(h or ()) for h in (o._backward_hooks, o._post_accumulate_grad_hooks)] if o.is_leaf else None)
    if isinstance(o, np.ndarray): return [id(o), o.dtype, o.shape, digest(o.tobytes()) if o.dtype != object else sub(o.tolist())]
    if isinstance(o, (pd.DataFrame, pd.Series)): return [id(o), o.shape, o.to_csv() if o.size < 10_000 else None]
    if isinstance(o, (random.SystemRandom, PurePath)): return id(o)
    if isinstance(o, random.Random): return digest(repr(o.getstate()).encode())
    if isinstance(o, torch.Generator): return digest(o.get_state().numpy().tobytes())
    if isinstance(o, np.random.Generator): return repr(o.bit_generator.state)
    if isinstance(o, np.random.RandomState): return digest(repr(o.get_state()).encode())
    if isinstance(o, dict): res = {k if isinstance(k, (str, int)) else id(k): [sub(k), sub(v)] for k,v in dict.items(o)}
    elif isinstance(o, list): res = dict(enumerate(map(sub, list.__iter__(o))))
    elif isinstance(o, (tuple, deque)): res = dict(enumerate(map(sub, o)))
    elif isinstance(o, (set, frozenset)): res = sorted(map(repr, map(sub, o)))
    elif inspect.isfunction(o): return [id(o), {k: sub(v) for k,v in vars(o).items()}, sub(o.__defaults__)]
    elif isinstance(o, partial): return [id(o), sub(o.func), sub(o.args), sub(o.keywords)]
    elif inspect.ismethod(o): return sub(o.__self__)
    else: res = None
    try: vars(o)
    except RuntimeError: return id(o)                         # it does not let itself be looked at
    except TypeError: pass
    if isinstance(o, _BaseDataLoaderIter): return [type(o), res]
    slots = {k: getattr(o, k) for k in copyreg._slotnames(type(o)) if hasattr(o, k)}
    return [type(o), id(o) if hasattr(o, '__dict__') else None, res, {k: sub(v) for k,v in {**getattr(o, '__dict__', {}), **slots}.items()}]


def random_states(): return random.getstate(),str(np.random.get_state()),torch.get_rng_state().tolist()


def state(learn):
    "All that a training could change: what can be reached from the learner, and the global random generators and autocast"
    return dict(learn=frozen(learn, {}), flags=[m.training for m in learn.model.modules()], autocast=(torch.is_autocast_enabled('cpu'), torch.is_autocast_enabled('cuda')),
                rng=[digest(repr(s).encode()) for s in (random.getstate(), np.random.get_state(), torch.get_rng_state().tolist(), [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [])])


def changes(was, now, path='learn'):
    "Where two states differ, as a list of paths"
    if was == now: return []
    if isinstance(was, dict) and isinstance(now, dict):
        return sum([changes(was.get(k, 'missing'), now.get(k, 'missing'), f'{path}.{k}') for k in {**was, **now}], [])
    if isinstance(was, (list, tuple)) and isinstance(now, (list, tuple)) and len(was) == len(now):
        return sum([changes(a, b, f'{path}[{i}]') for i,(a,b) in enumerate(zip(was, now))], [])
    return [path]


def forget(learn):
    "Take the results of `bs_find`, `max_bs` and `bs_sweep` off the recorder"
    for name in ('bs_stats', 'bs_table', 'bs_layers', 'bs_fits', 'bs_sweep'): vars(learn.recorder).pop(name, None)


def trained(learn):
    "What a training leaves behind, without object identities, so that two learners can be compared"
    opt = learn.opt.state_dict() if learn.opt else None
    return dict(weights=frozen_values([*learn.model.parameters(), *learn.model.buffers()]), opt=frozen_values(opt), losses=[float(l) for l in learn.recorder.losses], values=[list(map(float, v)) for v in learn.recorder.values],
                rng=[random.random(), np.random.rand(), torch.rand(1).item()])


def frozen_values(o):
    "A copy of the tensors and numbers in `o`"
    if isinstance(o, torch.Tensor): return o.detach().to_dense().clone()
    if isinstance(o, dict): return [frozen_values(v) for v in o.values()]
    if isinstance(o, (list, tuple)): return [frozen_values(v) for v in o]
    return o


def same(a, b):
    "Whether two trainings left the same behind, bit for bit"
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def assert_no_footprint(make, find, fit):
    "After `find` the learner is as it was, `find` gives the same again, and `fit` goes as on a learner that never saw `find`; `make` gives equal learners"
    learn = make()
    was = state(learn)
    find(learn)
    first = learn.recorder.bs_stats
    forget(learn)
    assert changes(was, state(learn)) == []
    find(learn)
    pd.testing.assert_frame_equal(first, learn.recorder.bs_stats)
    fit(learn)
    after,other = trained(learn),make()
    fit(other)
    assert same(after, trained(other))
    assert len(after['losses'])
