"Does it pay to find the batch size in the training itself? GrowBatch against bs_find and against constant sizes, wall-clock to a target loss: writes growing.md"
import argparse, math, time

import pandas as pd

import fastai_bs_finder.all
from fastai_bs_finder.grow import GrowBatch
from common import here, panels, write_page
from tasks import tasks
from training import best_runs, geomean, ToTargets

start,constant,seeds,most = 64,(64, 256, 1024),(0, 1, 2),4000
compared = {'MNIST, ConvNet with batch-norm, Adam': .04, 'MNIST, MLP, Adam': .1, 'MNIST, MLP, SGD': .1, 'Surnames, LSTM, Adam': .25, 'Rossmann, tabular_learner, Adam': .045}
finds,grows = 'bs_find and set_bs','GrowBatch()'


def told(n_epoch):
    "A `GrowBatch` that knows how long the training is with the size in use, since the fit goes on until the target is reached"
    return type('GrowBatch', (GrowBatch,), dict(n_epoch=n_epoch))()


def run(task, way, target, bs, lr, seed, n_epoch):
    "Seconds, steps and last batch size of a training to the target; evaluation is left out, measuring is not"
    learn,finder,cbs = task.make(bs, seed),0.,[]
    if way == finds:
        begin = time.perf_counter()
        learn.set_bs(learn.bs_find(lr, show_plot=False, n_epoch=n_epoch))
        lr,finder = learn.bs_plan(n_epoch)[1],time.perf_counter() - begin
    if way == grows: cbs = [told(n_epoch)]
    cb,bs = ToTargets((target,), most),learn.dls.train.bs
    learn.fit(10**6, lr, cbs=[cb, *cbs])
    changes = learn.recorder.bs_changes if cbs else None
    ok = bool(cb.reached)
    return dict(seconds=finder + sum(cb.seconds) if ok else math.inf, finder=finder, steps=cb.steps if ok else math.inf,
                last_bs=bs if changes is None else int(changes.bs.iloc[-1]), jump=math.nan if changes is None or len(changes) == 1 else changes.batch.iloc[-1])


def picture(df):
    "Seconds to the target, and those of the fastest and the slowest seed"
    for ax,d in panels(df, 'growing'):
        ax.barh(d.way, d.seconds, color=['.7' if w.startswith('constant') else 'C0' for w in d.way], xerr=(d.seconds - d.fastest_seed, d.slowest_seed - d.seconds))
        ax.set_xlabel(f'seconds to\na loss of {d.target.iloc[0]:g}')


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--tasks', nargs='*', default=list(compared), help='their names')
    args = p.parse_args()
    best,rows = best_runs(pd.read_csv(here/'training.csv')),[]
    for name in args.tasks:
        task,target = tasks[name],compared[name]
        at = best.loc[name].loc[target]
        n_epoch = max(round(at.steps[start]*start/task.make(start, 0).dls.train.n), 1)
        ways = {f'constant {bs}': (bs, float(at.lr[bs])) for bs in constant} | {way: (start, float(at.lr[start])) for way in (finds, grows)}
        runs = []
        for seed in seeds:  # one after the other, so that a machine that slows down slows all of them
            for way,(bs,lr) in ways.items():
                runs.append(dict(way=way, lr=lr, seed=seed) | run(task, way, target, bs, lr, seed, n_epoch))
                print(name, runs[-1], flush=True)
        df = pd.DataFrame(runs)
        seconds = df.groupby('way').seconds.agg(geomean)
        of_best = seconds[[w for w in ways if w.startswith('constant')]].min()
        for way,sec in seconds[list(ways)].items():
            d = df[df.way == way]
            rows.append(dict(task=name, target=target, way=way, lr=d.lr.iloc[0], steps=geomean(d.steps), last_bs=', '.join(map(str, d.last_bs)), seconds=sec, fastest_seed=d.seconds.min(),
                             slowest_seed=d.seconds.max(), of_64=sec/seconds[f'constant {start}'], of_best_constant=sec/of_best, of_bs_find=sec/seconds[finds]))
    df = pd.DataFrame(rows)
    picture(df)
    grown = df[df.way == grows]
    def mean(q): return f'{geomean(grown[q]):.2f} ({grown[q].min():.2f} to {grown[q].max():.2f})'
    slow = grown[grown.of_bs_find > 1].task.tolist()
    write_page('growing', 'The batch size, found in the training itself', f"""Made by `benchmarks/growing.py`: training until the training loss on 2,000 fixed training examples is at the target, {len(seeds)} seeds, geometric means. Constant batch sizes train with the best learning rate of the grid in `training.csv`, which nobody knows beforehand; `bs_find` and `GrowBatch` begin with bs={start} and its
learning rate, and use the one that they advise for another size. Seconds are with finding and measuring and without evaluation; `of_` are ratios of seconds.""",
        [f"`GrowBatch()` takes {mean('of_64')} of the time of a training with bs={start}; wanted was 0.7.", f"It takes {mean('of_bs_find')} of the time of `bs_find`, `set_bs` and the training after them; wanted was 0.85."],
        [f"It takes {mean('of_best_constant')} times as long as the best constant batch size at its best learning rate; wanted was 1.05. So `GrowBatch` is an experiment, and not part of `fastai_bs_finder.all`."]
        + [f"It takes longer than `bs_find` on {', '.join(slow)}."]*bool(slow),
        f"""![Seconds to the target](growing.png)

Bars are geometric means, lines go from the fastest to the slowest of {len(seeds)} seeds. Where there is no bar, one of the trainings did not reach the target in {most:,} steps.

{df.to_markdown(index=False, floatfmt='.3g')}""")


if __name__ == '__main__': main()
