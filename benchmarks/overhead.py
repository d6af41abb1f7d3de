"Time and peak memory of bs_find relative to a plain fit of as many batches, as a user would call it: writes overhead.md"
import argparse, time

import pandas as pd, torch
from fastai.callback.training import ShortEpochCallback

import fastai_bs_finder.finder
from common import mlp_learner, n_bytes, peak, write_page

bounds,most = {'bs_find(n_train=0, profile=False)': .85, 'bs_find()': 1.05},2.2


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--num-it', type=int, default=60, help='batches per run')
    p.add_argument('--rounds', type=int, default=5, help='rounds in which every way runs once')
    args = p.parse_args()
    learn = mlp_learner(args.num_it)
    def find(n_train=None, profile=True): return lambda: learn.bs_find(1e-3, args.num_it, 10, n_train=n_train, show_plot=False, profile=profile and .2, regret=0, race=False)
    ways = {'fit': lambda: learn.fit(1, 1e-3), 'bs_find(n_train=0)': find(0), 'bs_find()': find(), 'bs_find(n_train=0, profile=False)': find(0, False), 'bs_find(profile=False)': find(None, False)}
    for way in ('fit', 'bs_find()'): ways[way]()  # what comes first takes longer
    took = pd.DataFrame([{way: seconds(f) for way,f in ways.items()} for _ in range(args.rounds)])
    times = took.div(took.fit, axis=0).drop(columns='fit').agg(['median', 'min', 'max']).T
    print(times, flush=True)
    del learn
    n_batches = 2, 5, 20, 200
    learn = mlp_learner(max(n_batches))
    learn.fit(1, 1e-3, cbs=ShortEpochCallback())  # so that the optimizer's state and the gradients exist
    params = list(learn.model.parameters())
    grads = n_bytes(params)
    snapshot = grads + n_bytes(v for p in params for v in learn.opt.state[p].values() if isinstance(v, torch.Tensor))
    def needs(k, **kwargs): return (peak(lambda: learn.bs_find(1e-3, k, k, n_train=0, show_plot=False, race=False, **kwargs)) - snapshot - grads)/grads
    memory,profiled = {k: needs(k, profile=False) for k in n_batches},needs(20)
    print(memory, profiled)
    over = [f'`{way}` takes {times["median"][way]:.2f} of the time of `fit`, {bound} was wanted.' for way,bound in bounds.items() if times['median'][way] > bound]
    over += [f'With n_batch={k} it takes {m:.2f} gradients of memory, {most} were wanted.' for k,m in memory.items() if m > most]
    write_page('overhead', 'What it costs', f"""Made by `benchmarks/overhead.py`: an MLP of {sum(p.numel() for p in params)/1e6:.1f} million parameters with Adam at batch size 64, {args.num_it} batches, {args.rounds} rounds in turn; a plain `fit` takes {took.fit.median():.2f} s. Both finders include the snapshot and putting everything back.""",
        [f"`bs_find()` takes {times['median']['bs_find()']:.2f} of the time of a `fit` of as many batches, its profile included, and {times['median']['bs_find(profile=False)']:.2f} without it, by medians of {args.rounds} rounds; differences of a tenth are within the noise, see the table. A measurement takes one optimizer step for `n_batch` batches, and costs two passes over the gradients per batch: one adds them up, one their squares.",
         f"Beyond weights, gradients, optimizer and snapshot it needs the memory of {max(memory.values()):.2f} gradients at most, whatever `n_batch` is. While other batch sizes are timed, {profiled:.2f}: the mock training goes on afterwards from a second snapshot, which lies in the host's memory, as the first one does."],
        over or ['Nowhere, measured against what was wanted.'],
        f"""| time, relative to `fit` | wanted | median | least | most |
|---|---|---|---|---|
""" + '\n'.join(f"| `{way}` | {f'at most {bounds[way]}' if way in bounds else ''} | {r['median']:.2f} | {r['min']:.2f} | {r['max']:.2f} |" for way,r in times.iterrows()) + f"""

| memory, `n_batch` | wanted | gradients |
|---|---|---|
""" + '\n'.join(f'| {k} | at most {most} | {m:.2f} |' for k,m in memory.items()))


if __name__ == '__main__': main()
