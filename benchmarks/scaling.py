"Time and peak memory of bs_find against the number of parameters and of batches in a measurement, beside storing the gradients: writes scaling.md"
import argparse, math, time
from functools import partial
from statistics import median

import pandas as pd, psutil, torch
from matplotlib.figure import Figure
from fastai.basics import Callback, CancelBatchException
from fastai.callback.training import ShortEpochCallback

import fastai_bs_finder.finder
from common import at_once, here, mlp_learner, n_bytes, peak, write_page

sizes,n_batches,bs,lr = (100_000, 1_000_000, 10_000_000, 50_000_000),(2, 20, 100, 500),16,1e-3


def few(learn): learn.fit(1, lr, cbs=ShortEpochCallback())


def learner(n, n_it, bs=bs):
    "An MLP of about `n` parameters, with three hidden layers of the same width"
    w = round((-796 + (796**2 + 8*n)**.5)/4)
    learn = mlp_learner(n_it, (784, w, w, w, 10), bs)
    few(learn)  # so that the optimizer's state exists
    return learn


class StoreGrads(Callback):
    "Flattens and stores the gradients of `n_batch` batches at the same weights, and takes the paper's appendix A.1 of them; then one step"
    run_valid = False
    def __init__(self, n_batch): self.n_batch,self.found = n_batch,[]
    def before_fit(self): self.stored = []
    def after_backward(self):
        self.stored.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        if len(self.stored) < self.n_batch:
            self.opt.zero_grad()
            raise CancelBatchException
        b,B = len(self.yb[0]),len(self.yb[0])*self.n_batch
        small,big = sum(g.square().sum() for g in self.stored)/self.n_batch,(sum(self.stored)/self.n_batch).square().sum()
        self.found.append((((small - big)/(1/b - 1/B)).item(), ((B*big - b*small)/(B - b)).item()))
        self.stored = []


def floor(learn):
    "Forward and backward alone, in a plain loop"
    for x,y in learn.dls.train:
        learn.loss_func(learn.model(x), y).backward()
        for p in learn.model.parameters(): p.grad = None


def storing(learn, n_batch): learn.fit(1, lr, cbs=StoreGrads(n_batch))
def finding(learn, n_batch, n_train=0): learn.bs_find(lr, len(learn.dls.train), n_batch, n_train=n_train, show_plot=False, profile=False)


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratios(learn, ways, rounds):
    "Seconds of a plain fit, and the time of each way relative to it: medians of rounds in which each runs once"
    ways = {'fit': partial(learn.fit, 1, lr), 'forward and backward': partial(floor, learn)} | ways
    took = pd.DataFrame([{way: seconds(f) for way,f in ways.items()} for _ in range(rounds)])
    return took.fit.median(),took.div(took.fit, axis=0).drop(columns='fit').median()


def stored_bytes(n, n_batch): return 4*n*n_batch


def beyond_fit(n, n_batch, most, room):
    "Peak bytes in units of the gradients' size, less those of a plain fit: of `bs_find`, and of storing, or what it would need"
    needs = stored_bytes(n, n_batch)
    run_ours,run_storing = n*n_batch <= most,needs <= room
    row = dict(parameters=n, n_batch=n_batch, bs_find=math.nan, storing=f'needs {needs/1e9:.0f} GB')
    if not (run_ours or run_storing): return row
    learn = learner(n, 2*n_batch, 1)
    params = list(learn.model.parameters())
    grads = n_bytes(params)
    def more(f):
        for p in params: p.grad = None
        return peak(f)/grads
    fit = more(partial(few, learn))
    if run_storing: row['storing'] = more(partial(storing, learn, n_batch)) - fit
    if run_ours: row['bs_find'] = more(partial(finding, learn, n_batch)) - fit
    print(row, flush=True)
    return row


def listed(x): return ' and '.join(filter(None, [', '.join(map(str, x[:-1])), *map(str, x[-1:])]))


def millions(n): return f'{n/1e6:g} million'


def picture(by_size, memory):
    "Time against parameters, memory against batches"
    fig = Figure(figsize=(9, 3.4), layout='constrained')
    left,right = fig.subplots(1, 2)
    for c,way in (('C0', 'bs_find()'), ('C2', 'bs_find(n_train=0)'), ('C3', 'storing'), ('.5', 'forward and backward')): left.plot(sizes, by_size[way].astype(float), '.-', c=c, label=way)
    left.axhline(1, c='k', lw=1)
    left.set(xscale='log', xlabel='parameters', ylabel='time, of fit', ylim=(0, None))
    left.legend(fontsize='small')
    for c,way in (('C0', 'bs_find'), ('C3', 'storing')):
        for n in sizes:
            d = memory[memory.parameters == n]
            right.plot(d.n_batch, pd.to_numeric(d[way], errors='coerce').where(lambda s: s.notna(), d.n_batch if way == 'storing' else math.nan), '.-', c=c, alpha=.7, label=way if n == sizes[0] else None)
    right.set(xscale='log', yscale='log', xlabel='n_batch', ylabel='memory beyond fit, gradients')
    right.legend(fontsize='small')
    fig.savefig(here/'scaling.png', dpi=90)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=2, help='rounds in which every way runs once')
    p.add_argument('--most', type=float, default=5e8, help='parameters times n_batch of a run that counts the memory of bs_find, at most')
    args = p.parse_args()
    def show(df): return df.map(lambda v: v if isinstance(v, str) else 'not run' if math.isnan(v) else f'{v:.2f}' if v < 10 else f'{v:.0f}').to_markdown(disable_numparse=True)

    by_size = {}
    for n in sizes:
        n_it = 40 if n < 1e7 else 20
        learn = learner(n, n_it)
        ways = {'bs_find()': partial(finding, learn, 10, None), 'bs_find(n_train=0)': partial(finding, learn, 10), 'storing': partial(storing, learn, 10)}
        fit,r = ratios(learn, ways, args.rounds if n < sizes[-1] else 1)
        by_size[millions(n)] = dict(fit=f'{fit/n_it*1e3:.3g} ms') | r.to_dict()
        print(n, by_size[millions(n)], flush=True)
    learn = learner(10**6, max(n_batches))
    _,r = ratios(learn, {(way, k): partial(f, learn, k) for k in n_batches for way,f in (('bs_find(n_train=0)', finding), ('storing', storing))}, args.rounds)
    by_k = pd.DataFrame({k: {way: r[way, k] for way in ('bs_find(n_train=0)', 'storing')} for k in n_batches}).T.rename_axis('n_batch')
    print(by_k, flush=True)
    del learn
    rows = at_once(beyond_fit, [(n, k, args.most, psutil.virtual_memory().available/8) for n in sizes for k in n_batches])
    by_size,memory = pd.DataFrame(by_size).T.rename_axis('parameters'),pd.DataFrame(rows)
    tables = {way: memory.pivot(index='parameters', columns='n_batch', values=way).rename(index=millions) for way in ('bs_find', 'storing')}
    ran = memory[memory.storing.map(lambda v: not isinstance(v, str))]
    less = ran[ran.storing < ran.bs_find]
    quicker = by_k.index[by_k.storing < by_k['bs_find(n_train=0)']]
    ours,theirs = by_size['bs_find(n_train=0)'].astype(float),by_size.storing.astype(float)
    picture(by_size, memory)
    floor_ = by_size['forward and backward'].astype(float)
    spread = (memory.groupby('parameters').bs_find.max() - memory.groupby('parameters').bs_find.min()).max()
    write_page('scaling', 'Time and memory, by the size of the model and of a measurement', f"""Made by `benchmarks/scaling.py`: MLPs with Adam, batches of {bs} random examples. Small batches are the hard case: what is done with a gradient costs the same at any batch size, and here forward and backward hide little of it.

Compared are a plain `fit`, forward and backward alone (no optimizer, no fastai: the floor), `bs_find`, and **storing**: each gradient is flattened and stored, and the paper's equations are taken of all that a measurement has. Finders are often written that way. Like `bs_find(n_train=0)`, storing here takes one step per measurement; the finders
step after every batch, which takes longer. `bs_find` is without its profile, which takes a fifth of its time on top by default.""",
        [f"`bs_find(n_train=0)` takes {ours.min():.2f} to {ours.max():.2f} of the time of `fit`, storing every gradient {theirs.min():.2f} to {theirs.max():.2f}, forward and backward alone {floor_.min():.2f} to {floor_.max():.2f}. The first two can be faster than training, since a measurement takes a single optimizer step.",
         f"For the memory of `bs_find` the number of batches does not matter: it takes the memory of {(memory.bs_find - 3).min():.2f} to {(memory.bs_find - 3).max():.2f} gradients beyond the copy of weights and Adam's state, and that number changes by at most {spread:.2f} from the smallest to the largest `n_batch`. Storing takes `n_batch` gradients: with `n_batch={max(n_batches)}` and {millions(sizes[-1])} parameters, {stored_bytes(sizes[-1], max(n_batches))/1e9:.0f} GB."],
        [f"Storing is faster with {listed(by_size.index[theirs < ours]) or 'none of these numbers of'} parameters, and with 1 million at n_batch={listed(quicker) or 'none of these'}. In addition, `bs_find` computes the noise scale in Adam's own metric and that of every parameter, checks for values that are not finite, and copies the learner's state and puts it back.",
         f"What does not depend on the number of batches weighs most in the runs of the smallest model, where all batches of a `fit` take {40*float(by_size.fit.iloc[0].split()[0]):.0f} ms.",
         len(less) and f"Storing takes less memory where `n_batch` is {', '.join(map(str, sorted(set(less.n_batch))))}: `bs_find` pays for its copy there."],
        f"""![Time against parameters, memory against batches](scaling.png)

What was too large to be run is drawn as computed.

## Time, relative to fit

With `n_batch=10`, and an epoch of 40 batches (20 from 10 million parameters on); `fit` is per batch, the rest is in units of it. Medians of {args.rounds} rounds in turn, of one with {millions(sizes[-1])}. `bs_find` includes the copy of weights and optimizer state that it makes, and putting everything back.

{show(by_size)}

With 1 million parameters, and {max(n_batches)} batches, medians of {args.rounds} rounds:

{show(by_k)}

## Peak memory beyond that of fit, in units of the gradients' size

Counted byte by byte, with batches of one example. Of `bs_find`, 3 are the copy of weights and Adam's state (the larger runs would take minutes):

{show(tables['bs_find'])}

Storing, which copies nothing and puts nothing back. What takes more than an eighth of the memory that is free on this machine was not run; what the stored gradients alone need is computed instead:

{show(tables['storing'])}
""")


if __name__ == '__main__': main()
