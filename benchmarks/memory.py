"Peak memory of bs_find beyond weights, gradients, optimizer and snapshot, in units of the gradients' size, counted byte by byte"
import torch

from common import machine, mlp_learner, n_bytes, peak
import fastai_bs_finder.finder

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
