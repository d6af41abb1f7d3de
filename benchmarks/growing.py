"GrowBatch from a small batch size against constant batch sizes, wall-clock to a target loss: writes growing.md"
import argparse, math

import pandas as pd

from fastai_bs_finder.grow import GrowBatch
from common import here, panels, write_page
from tasks import tasks
from training import best_runs, geomean, ToTargets

start,constant,seeds = 16,(16, 64, 256, 1024),(0, 1)
compared = {'MNIST, MLP, SGD': .1, 'ADULT, tabular_learner, Adam': .338}


def run(task, target, bs, lr, seed, max_steps, cbs=()):
    "Seconds, steps and last batch size of a training to the target; evaluation is left out, measuring is not"
    cb,learn = ToTargets((target,), max_steps),task.make(bs, seed)
    learn.fit(10**6, lr, cbs=[cb, *cbs])
    changes = getattr(learn.recorder, 'bs_changes', None)
    ok = bool(cb.reached)
    return dict(seconds=sum(cb.seconds) if ok else math.inf, steps=cb.steps if ok else math.inf, last_bs=bs if changes is None else int(changes.bs.iloc[-1]))


def picture(df):
    "Seconds to the target, and those of the fastest and the slowest seed"
    for ax,d in panels(df, 'growing'):
        ax.barh(d.way, d.seconds, color=['C0' if w.startswith('GrowBatch') else '.7' for w in d.way], xerr=(d.seconds - d.fastest_seed, d.slowest_seed - d.seconds))
        ax.set_xlabel(f'seconds to a loss of {d.target.iloc[0]:g}')


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--tasks', nargs='*', default=list(compared), help='their names')
    args = p.parse_args()
    best,rows = best_runs(pd.read_csv(here/'training.csv')),[]
    for name in args.tasks:
        task,target = tasks[name],compared[name]
        at = best.loc[name].loc[target]
        ways = {f'constant {bs}': (bs, float(at.lr[bs]), None) for bs in constant}
        ways |= {f'GrowBatch from {start}, lr_rule={rule!r}': (start, float(at.lr[start]), rule) for rule in ('noise', 'sqrt', None)}
        runs = []
        for seed in seeds:  # one after the other, so that a machine that slows down slows all of them
            for way,(bs,lr,rule) in ways.items():
                cbs = [GrowBatch(lr_rule=rule)] if way.startswith('GrowBatch') else []
                runs.append(dict(way=way, lr=lr, seed=seed) | run(task, target, bs, lr, seed, 20_000, cbs))
                print(name, runs[-1], flush=True)
        df = pd.DataFrame(runs)
        of_best = df[df.way.str.startswith('constant')].groupby('way').seconds.agg(geomean).min()
        of_start = geomean(df[df.way == f'constant {start}'].seconds)
        for way in ways:
            d = df[df.way == way]
            sec = geomean(d.seconds)
            rows.append(dict(task=name, target=target, way=way, lr=d.lr.iloc[0], steps=geomean(d.steps), last_bs=geomean(d.last_bs), seconds=sec, fastest_seed=d.seconds.min(), slowest_seed=d.seconds.max(), of_best_constant=sec/of_best, of_start=sec/of_start))
    df = pd.DataFrame(rows)
    picture(df)
    noise = df[df.way.str.contains("'noise'")]
    def each(q): return ', '.join(f'{r[q]:.2g} ({r.task})' for _,r in noise.iterrows())
    write_page('growing', 'A batch size that grows', f"""Made by `benchmarks/growing.py`: training until the training loss on 2,000 fixed training examples is at the target, {len(seeds)} seeds, geometric means. Constant batch sizes train with the best learning rate of the grid in `training.csv`, `GrowBatch` with that of the
batch size it starts from. Seconds are of training with measuring and without evaluation; `of_best_constant` and `of_start` are ratios of seconds.""",
        [f"Of the time of the constant batch size that it starts from, {start}, `GrowBatch()` takes {each('of_start')}."],
        [f"Of the time of the best constant batch size it takes {each('of_best_constant')}. These trainings take seconds: it starts small, and needs some measurements first. `bs_find` asks before the training instead."],
        f"""![Seconds to the target](growing.png)

Bars are geometric means, lines go from the fastest to the slowest of {len(seeds)} seeds.

{df.to_markdown(index=False, floatfmt='.3g')}""")


if __name__ == '__main__': main()
