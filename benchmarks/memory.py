"Peak memory of bs_find beyond weights, gradients, optimizer and snapshot, in units of the gradients' size, counted byte by byte"
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import machine, mlp_learner, n_bytes
import fastai_bs_finder.finder


class PeakBytes(TorchDispatchMode):
    "Counts the bytes of all tensors made while it is active, and remembers the most that lived at once"
    def __init__(self):
        super().__init__()
        self.live,self.now,self.peak = {},0,0

    def _free(self, key): self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        res = func(*args, **(kwargs or {}))
        for t in tree_leaves(res):
            if not isinstance(t, torch.Tensor): continue
            storage = t.untyped_storage()
            if storage._cdata in before or storage._cdata in self.live: continue
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return res


def peak(f):
    with PeakBytes() as p: f()
    return p.peak


learn = mlp_learner(410)
learn.fit(1, 1e-3)  # so that the optimizer's state and the gradients exist
params = list(learn.model.parameters())
grads = n_bytes(params)
state = n_bytes(v for p in params for v in learn.opt.state[p].values() if isinstance(v, torch.Tensor))
snapshot = grads + state

print(machine())
print(f'{sum(p.numel() for p in params)/1e6:.1f} million parameters, gradients of {grads/2**20:.0f} MiB; beyond weights, gradients, optimizer and snapshot:')
print(f'{"fit":24} {peak(lambda: learn.fit(1, 1e-3))/grads:.2f} times the gradients')
for n_batch in (2, 5, 20, 200):
    extra = peak(lambda: learn.bs_find(1e-3, 2*n_batch, n_batch, n_train=0, show_plot=False)) - snapshot - grads
    print(f'bs_find(n_batch={n_batch}){"":{5 - len(str(n_batch))}} {extra/grads:.2f} times the gradients (wanted: at most 1.5)')
