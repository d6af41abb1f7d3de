"`learn.max_bs()` beside the batch-size finders of Lightning and Accelerate, against the truth by bisection: writes finders.md. Lightning is not installed with this package: pip install lightning"
import argparse, gc, importlib.util, logging, tempfile, time, warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import pandas as pd, torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils import data as torch_data
from torch.utils._python_dispatch import _disable_current_modes
from accelerate.utils import find_executable_batch_size
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.imports import noop

import fastai_bs_finder.memory
from fastai_bs_finder.snapshot import Snapshot
from common import NoValid, PeakBytes, panels, write_page

cuda,n,start = torch.cuda.is_available(),2048,1024
gpu_bytes,device = (2*2**30,'cuda') if cuda else (64*2**20,'cpu')
if importlib.util.find_spec('lightning'):
    import lightning.pytorch as pl
    from lightning.pytorch.tuner import Tuner
else: pl = None


def on_host(f):
    "`f`, of which the simulated GPU takes no notice"
    def g(*args, **kwargs):
        with _disable_current_modes(): return f(*args, **kwargs)
    return g


class SimulatedGPU(PeakBytes):
    "A GPU of `total` bytes on the CPU: all tensors made while it is active count, and beyond `total` it runs out of memory as CUDA does"
    def __init__(self, total=gpu_bytes):
        super().__init__()
        self.total,self.n_ooms = total,0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = super().__torch_dispatch__(func, types, args, kwargs)
        if self.now <= self.total: return res
        needed,res = self.now,None  # what did not fit was not allocated
        self.n_ooms += 1
        raise torch.OutOfMemoryError(f'CUDA out of memory. Simulated: {needed} of {self.total} bytes.')

    @contextmanager
    def as_cuda(self):
        "`torch.cuda`'s figures are those of this GPU, for `max_bs` reads them; the copies that finders make on the host, or read from a file, do not count"
        with (patch.multiple(torch.cuda, reset_peak_memory_stats=lambda d: setattr(self, 'peak', self.now), max_memory_allocated=lambda d: self.peak,
                             mem_get_info=lambda d: (self.total - self.now, self.total), memory_reserved=lambda d: self.now, get_per_process_memory_fraction=lambda d: 1., empty_cache=noop),
              patch.object(fastai_bs_finder.memory, '_device', lambda learn: torch.device('cuda', 0)),
              patch.object(Snapshot, '_visit_tensor', on_host(Snapshot._visit_tensor)), patch.object(torch, 'load', on_host(torch.load))): yield


class RealGPU:
    "The GPU that is there, with `total` bytes left of it: a tensor takes the rest"
    def __init__(self, total=gpu_bytes): self.total = total
    def __enter__(self):
        free()
        torch.cuda.set_per_process_memory_fraction(self.total/torch.cuda.mem_get_info()[1])
        self.before = self._ooms()
        return self
    def __exit__(self, *args): torch.cuda.set_per_process_memory_fraction(1.)
    def _ooms(self): return torch.cuda.memory_stats()['num_ooms']
    @property
    def n_ooms(self): return self._ooms() - self.before
    def as_cuda(self): return nullcontext()


GPU = RealGPU if cuda else SimulatedGPU


def free():
    gc.collect()
    if cuda: torch.cuda.empty_cache()


class Examples:
    "A data set in memory, read a batch at a time"
    def __init__(self, *shape): self.x,self.y = torch.rand(n, *shape),torch.randint(10, (n,))
    def __len__(self): return n
    @on_host
    def __getitem__(self, i): return self.x[i],self.y[i]
    __getitems__ = __getitem__


def to_gpu(batch): return tuple(t.to(device) if cuda else t.clone() for t in batch)


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm,self.out = nn.LSTM(64, 128, batch_first=True),nn.Linear(128, 10)
    def forward(self, x): return self.out(self.lstm(x)[0][:, -1])


def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(12288, 128), nn.ReLU(), nn.Linear(128, 10))
def convnet():
    def block(a, b): return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
    return nn.Sequential(block(3, 16), block(16, 32), block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


tasks = {'MLP, 3×64×64 inputs': (mlp, (3, 64, 64)), 'ConvNet, 3×64×64 images': (convnet, (3, 64, 64)), 'LSTM, 32 steps of 64': (LSTM, (32, 64))}


def make(model, tried):
    "A fresh model that notes the size of each training batch"
    set_seed(0)
    res = model()
    res.register_forward_pre_hook(lambda m, args: tried.append(len(args[0])) if m.training else None)
    return res


def fastai_learner(ds, model, tried, bs=64):
    dl = DataLoader(range(n), bs=bs, shuffle=True, drop_last=True, create_item=noop, create_batch=lambda idxs: ds[idxs], after_batch=noop if cuda else to_gpu)
    learn = Learner(DataLoaders(dl, dl, device=device), make(model, tried), loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.Adam), cbs=NoValid())
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)


def fastai_fits(bs, ds, model):
    learn = fastai_learner(ds, model, [], bs)
    learn.dls.train.n = min(3*bs, n//bs*bs)  # three steps
    learn.fit(1, 1e-3)


def max_bs(ds, model, tried, margin=.9): return fastai_learner(ds, model, tried).max_bs(margin)


def loader(ds, bs): return torch_data.DataLoader(ds, bs, shuffle=True, drop_last=True, collate_fn=noop)


def train(bs, ds, model, tried):
    "Three steps in a plain loop"
    m = make(model, tried).to(device)
    opt = torch.optim.Adam(m.parameters())
    for _,batch in zip(range(3), loader(ds, bs)):
        x,y = to_gpu(batch)
        opt.zero_grad()
        cross_entropy(m(x), y).backward()
        opt.step()


def plain_fits(bs, ds, model): train(bs, ds, model, [])


def accelerate(ds, model, tried):
    res = []
    def attempt(bs):
        train(bs, ds, model, tried)
        res.append(bs)
    find_executable_batch_size(attempt, starting_batch_size=start)()
    return res[0]


def lightning_parts(ds, model, tried, bs=64):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net,self.batch_size = make(model, tried),bs
        def transfer_batch_to_device(self, batch, device, dataloader_idx): return to_gpu(batch)
        def training_step(self, batch, i): return cross_entropy(self.net(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.Adam(self.parameters())
        def train_dataloader(self): return loader(ds, self.batch_size)
    trainer = pl.Trainer(max_steps=3, accelerator='gpu' if cuda else 'cpu', devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         default_root_dir=tempfile.gettempdir())
    return trainer,Module()


def lightning_fits(bs, ds, model):
    trainer,module = lightning_parts(ds, model, [], bs)
    trainer.fit(module)


def lightning(ds, model, tried, mode):
    trainer,module = lightning_parts(ds, model, tried)
    return Tuner(trainer).scale_batch_size(module, mode=mode)


finders = {'max_bs()': (max_bs, fastai_fits), 'max_bs(margin=1)': (partial(max_bs, margin=1.), fastai_fits),
           'Lightning, power': (partial(lightning, mode='power'), lightning_fits), 'Lightning, binsearch': (partial(lightning, mode='binsearch'), lightning_fits),
           f'Accelerate, from {start}': (accelerate, plain_fits)}
if not pl: finders = {name: f for name,f in finders.items() if 'Lightning' not in name}


def largest(fits, ds, model):
    "The largest batch size with which training fits, by bisection"
    def ok(bs):
        free()
        with GPU():
            try: fits(bs, ds=ds, model=model)
            except torch.OutOfMemoryError: return False
        return True
    lo,hi = 1,n//3 + 1  # three whole batches
    while hi - lo > max(1, .005*lo*cuda):
        mid = (lo + hi)//2
        if ok(mid): lo = mid
        else: hi = mid
    return lo


def measure(find, ds, model):
    "A run of a finder"
    free()
    tried,began = [],time.perf_counter()
    with GPU() as gpu, gpu.as_cuda(): bs = find(ds, model, tried)
    return dict(seconds=time.perf_counter() - began, found=bs, steps=len(tried), examples=sum(tried), ooms=gpu.n_ooms)


def picture(df):
    "What each finder gives, of the largest that trains, and how often it ran out of memory"
    for ax,d in panels(df, 'finders'):
        bars = ax.barh(d.finder, d.of_largest, color=['C0' if f.startswith('max_bs') else '.7' for f in d.finder], alpha=.8)
        ax.bar_label(bars, [f'{ooms:.0f} errors' if ooms != 1 else '1 error' for ooms in d.ooms], label_type='center')
        ax.axvline(1, c='k', lw=1)
        ax.set_xlim(0, 1.05)
        ax.xaxis.set_major_formatter('{x:.0%}')


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=1, help='rounds in which every finder runs once')
    args = p.parse_args()
    warnings.simplefilter('ignore')
    for name in ('lightning.pytorch', 'lightning.fabric'): logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    for task,(model,shape) in tasks.items():
        ds = Examples(*shape)
        truth = {fits: largest(fits, ds, model) for fits in dict.fromkeys(fits for _,fits in finders.values())}
        runs = [{name: measure(find, ds, model) for name,(find,_) in finders.items()} for _ in range(args.rounds)]  # warm by now
        for name,(_,fits) in finders.items():
            r = pd.DataFrame([run[name] for run in runs]).median()
            rows.append(dict(task=task, finder=name) | r.to_dict() | dict(largest=truth[fits], of_largest=r.found/truth[fits], fits='yes' if r.found <= truth[fits] else 'no'))
            print(rows[-1], flush=True)
    df = pd.DataFrame(rows)
    picture(df)
    at = df.set_index(['finder', 'task'])
    def span(name, q, text): return ' to '.join(dict.fromkeys(text(at.loc[name][q].agg(f)) for f in ('min', 'max')))
    def share(name): return span(name, 'of_largest', '{:.0%}'.format)
    def number(name, q): return span(name, q, '{:.0f}'.format)
    def times(name): return 'once' if (n := number(name, 'ooms')) == '1' else f'{n} times'
    ours,theirs = df[df.finder.str.startswith('max_bs')],df[~df.finder.str.startswith('max_bs')]
    nearest = df[df.fits == 'yes'].pipe(lambda d: d.loc[d.groupby('task', sort=False).of_largest.idxmax()])
    def winners(d): return '; '.join(f'{r.task}: {r.finder}' for r in d.itertuples())
    lightning_said = (f"Lightning's power mode gives a power of two, {share('Lightning, power')} of the largest, and runs out of memory {times('Lightning, power')} on the way; binsearch takes 5 % off what it finds and gives {share('Lightning, binsearch')}, and runs out {times('Lightning, binsearch')}. "
                      "Both save the model to a file and load it again.") if pl else "Lightning is not installed here, so its finder was left out: `pip install lightning`."
    ran_out = ours[ours.ooms > 0].task.unique()
    off_line = f" It ran out at: {', '.join(ran_out)}. There memory does not grow linearly with the batch size, or small batches do not show all the memory that a step needs." if len(ran_out) else ''
    loops = '; '.join(f"{task}: " + ', '.join(f'{b:.0f}' for b in dict.fromkeys(d.largest)) for task,d in df.groupby('task', sort=False))
    where = (f"a GPU ({torch.cuda.get_device_name()}) of which {gpu_bytes/2**30:g} GiB were left" if cuda else
             f"**no GPU: one of {gpu_bytes/2**20:g} MiB is simulated** on the CPU. All tensors that a finder makes are counted, those on the host excepted, and an operation that goes beyond the limit raises CUDA's error. So the steps and the errors are those that a GPU would give, but for what "
             "its allocator loses to fragments; the seconds are not: a step takes longer here, and what comes of an error is cheaper")
    write_page('finders', 'Finding what fits in memory', f"""Made by `benchmarks/finders.py` on {where}.

`learn.max_bs()` measures the memory of a few small steps, takes them for points on a line, and goes up it with real steps, each at most {fastai_bs_finder.memory._growth} times as large as the one before, until it is within 5 % of where the line ends. The others try, run out of memory, and try again. All train with `torch.optim.Adam`, with {n:,} examples in memory; the seconds are
{f'medians of {args.rounds} rounds in turn' if args.rounds > 1 else 'of a single run'}. The true largest batch size is found by bisection with three real training steps, in the training loop that the finder belongs to: fastai, Lightning, and a plain loop for Accelerate do not take the same memory.""",
        [f"`max_bs()` ran out of memory {number('max_bs()', 'ooms')} times, the others {theirs.ooms.min():.0f} to {theirs.ooms.max():.0f} times.{off_line}",
         f"It leaves a tenth of the memory free (`margin=.9`) and gives {share('max_bs()')} of the largest; `margin=1` gives {share('max_bs(margin=1)')}, with {number('max_bs(margin=1)', 'ooms')} errors.",
         lightning_said,
         f"Accelerate's `find_executable_batch_size` goes down from where it is told to start, by a tenth each time: {share(f'Accelerate, from {start}')} of the largest, after {number(f'Accelerate, from {start}', 'ooms')} errors. Started below the limit it keeps what it was given."],
        [f"`max_bs()` as it is does not give the very largest. The nearest to it of those that fit: {winners(nearest)}.",
         f"Less fits in fastai's own training loop than in the others: {loops} ({', '.join(dict.fromkeys('fastai' if 'max_bs' in f else f.split(',')[0].replace('Accelerate', 'a plain loop') for f in finders))}; where there are two figures, the last two agree). A share says how good a finder is, not how much a loop can hold.",
         "Accelerate's is the simplest of all: it needs no loader that can be re-batched, and works for any function."],
        f"""![Found, of the largest batch size that trains](finders.png)

Bars: the batch size found, of the largest that trains. Errors: the times that memory ran out on the way.

`steps` are training steps that were begun, `examples` what went into them, `ooms` the times that memory ran out, `of_largest` the batch size found as a share of the largest that trains.

{df.to_markdown(index=False, floatfmt='.3g')}
""")


if __name__ == '__main__': main()
