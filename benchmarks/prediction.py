"What bs_find at batch size 64 predicts for other batch sizes, against real training (training.csv): writes prediction.csv and prediction.md"
import argparse, math, time

import numpy as np, pandas as pd
from matplotlib.figure import Figure

import fastai_bs_finder.finder
from fastai_bs_finder.predict import noiseless_mean, rel_steps
from fastai_bs_finder.suggest import fastest
from common import at_once, here, write_page
from hessian import HessianFinder
from tasks import tasks
from training import best_runs, bs0, geomean, lowest_point, seeds, step_seconds, train


def found(task, lr, steps, seed, **kwargs):
    "What `bs_find` finds in a mock training as long as the real one, with time enough for the profile: these trainings take seconds"
    learn = task.make(bs0, seed)
    learn.bs_find(lr, max(math.ceil(steps*20/11), 100), 10, show_plot=False, regret=0, race=False, **{'profile': 1., **kwargs})
    result = learn.recorder.bs_result.changed(n_epoch=steps*bs0/learn.recorder.bs_result.run.n)
    return result,fastest(result) or bs0


def cost(name, lr, seconds):
    "What `bs_find` costs by default, as shares of an epoch of training at `seconds` a step, and what it says is the fastest, three times"
    learn = tasks[name].make(bs0, 0)
    epoch = seconds*learn.dls.train.n/bs0
    def took(**kwargs):
        start = time.perf_counter()
        sug = learn.bs_find(lr, show_plot=False, **kwargs)
        return time.perf_counter() - start,sug.fastest,learn.recorder.bs_result
    answers = [took() for _ in range(3)]
    first = answers[0][0]
    run = answers[0][2].run
    without = took(num_it=run.spent, n_batch=run.n_batch, n_train=run.n_train, profile=False)[0]
    named = [f for _,f,_ in answers]
    agree = len(set(named)) == 1 or all(f and o.band[0] <= f <= o.band[1] for f in named for *_,o in answers)
    return dict(task=name, epoch_seconds=epoch, finder=first/epoch, measuring=without/epoch, batches=run.spent, fastest=', '.join(map(str, named)), bands=', '.join(f'{a} to {b}' for a,b in (o.band for *_,o in answers)), agree=agree)


def seconds_per_step(task, lrs, rounds=3):
    "Seconds of a step of real training at each batch size, with its learning rate: the least of several rounds in turn, for what else a machine does only adds to it"
    found = [{bs: step_seconds(task, bs, lr, 20 if bs < 1024 else 8) for bs,lr in lrs.items()} for _ in range(rounds)]
    return {bs: min(f[bs] for f in found) for bs in lrs}


def noise_scales(name, lr, steps, n_seeds):
    "The average of each of the three noise scales, over noiseless steps"
    kwargs = dict(finder=HessianFinder) if tasks[name].hessian else {}
    tables = [found(tasks[name], lr, steps, seed, profile=False, **kwargs)[0].stats for seed in range(n_seeds)]
    def mean(B): return noiseless_mean(B[B > 0], bs0)
    columns = {'simple': 'noise_scale', 'optimizer': 'opt_noise_scale', 'Hessian': 'full_noise_scale'}
    return {label: geomean([mean(stats[c]) for stats in tables]) for label,c in columns.items() if c in tables[0]}


def off(predicted, measured):
    "Errors as factors: their geometric mean, and the largest"
    e = [abs(math.log(p/m)) for p,m in zip(predicted, measured)]
    return math.exp(np.mean(e)),math.exp(max(e))


def steps_to_target(name, target, bs, lr, max_steps, seed):
    "Steps of real training to the target, inf where `max_steps` are not enough"
    return train(tasks[name]._replace(targets=(target,)), bs, lr, seed, max_steps)[0]['steps']


def picture(rows):
    "Predicted over measured, against measured: steps and times, a point per task, target and batch size"
    fig = Figure(figsize=(9, 3.6), layout='constrained')
    for ax,q in zip(fig.subplots(1, 2), ('steps', 'time')):
        for i,(task,d) in enumerate(rows[rows.bs != bs0].groupby('task', sort=False)): ax.plot(d[f'{q}_ratio'], d[f'predicted_{q}'], '.', ms=7, c=f'C{i}', label=task)
        ends = [f(rows[[f'{q}_ratio', f'predicted_{q}']].stack()) for f in (min, max)]
        ax.plot(ends, ends, c='k', lw=1)
        ax.fill_between(ends, [e/2 for e in ends], [e*2 for e in ends], color='k', alpha=.07)
        ax.set(xscale='log', yscale='log', xlabel=f'measured {q}, of those at bs={bs0}', ylabel='predicted')
    ax.legend(fontsize='x-small')
    fig.savefig(here/'prediction.png', dpi=90)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--tasks', nargs='*', default=list(tasks), help='their names')
    p.add_argument('--seeds', type=int, default=1, help='mock trainings per target')
    args = p.parse_args()
    runs = pd.read_csv(here/'training.csv')
    best = best_runs(runs)
    starts = {(name, target): (float(best.lr[name, target, bs0]), best.steps[name, target, bs0]) for name in args.tasks for target in tasks[name].targets}
    noise = dict(zip(starts, at_once(noise_scales, [(name, *start, args.seeds) for (name,_),start in starts.items()])))
    tables,suggested,seconds,costs = {},{},{},[]
    for name in args.tasks:
        task = tasks[name]
        lrs = best.lr[name, task.targets[-1]].astype(float).to_dict()
        for target in task.targets:
            answers = [found(task, *starts[name, target], seed) for seed in range(args.seeds)]
            tables[name, target],suggested[name, target] = [result.table for result,_ in answers],sorted({bs for _,bs in answers})
            lrs |= {f: tables[name, target][0].lr[f] for f in suggested[name, target] if f not in lrs}
        seconds[name] = seconds_per_step(task, lrs)
        costs.append(cost(name, starts[name, task.targets[0]][0], seconds[name][bs0]))
        print(costs[-1], flush=True)
    steps = best.steps[np.isfinite(best.steps)].to_dict()
    untried = [(*key, f, tables[key][0].lr[f], 5*starts[key][1]) for key,found_ in suggested.items() for f in found_ if (*key, f) not in steps]
    trained = np.reshape(at_once(steps_to_target, [(*at, seed) for at in untried for seed in seeds]), (-1, len(seeds)))
    steps |= {at[:3]: geomean(n) for at,n in zip(untried, trained)}
    rows,errors,choices = [],[],[]
    for (name,target),ratios in tables.items():
        m,sec = best.loc[name].loc[target],seconds[name]
        reached = [b for b in m.index if math.isfinite(m.steps[b])]
        others = [b for b in reached if b != bs0]
        def predicted(q, b): return geomean([t.loc[b, q] for t in ratios])
        lr_best = {b: lowest_point(runs, name, target, b)[0] for b in reached}
        for b in m.index:
            ok = b in reached
            rows.append(dict(task=name, target=target, bs=b, lr=m.lr[b] if ok else math.nan, steps=m.steps[b], steps_ratio=m.steps[b]/m.steps[bs0], predicted_steps=predicted('steps', b),
                             time_ratio=m.steps[b]*sec[b]/(m.steps[bs0]*sec[bs0]), predicted_time=predicted('time', b),
                             lr_ratio=lr_best[b]/lr_best[bs0] if ok else math.nan, predicted_lr=predicted('lr', b)/float(m.lr[bs0])))
        r = pd.DataFrame(rows[-len(m):]).set_index('bs').loc[others]
        e = dict(task=name, target=target)
        e['steps, mean'],e['steps, largest'] = off(r.predicted_steps, r.steps_ratio)
        e['time, mean'],e['time, largest'] = off(r.predicted_time, r.time_ratio)
        e['lr, largest'] = off(r.predicted_lr, r.lr_ratio)[1]
        e['covered'] = np.mean([t.steps_lo[b] <= r.steps_ratio[b] <= t.steps_hi[b] for t in ratios for b in others])
        e |= {label: off([rel_steps(b, bs0, B) for b in others], r.steps_ratio)[0] for label,B in noise[name, target].items()}
        errors.append(e)
        for f in suggested[name, target]:
            took,all_ = steps[name, target, f]*sec[f],{b: m.steps[b]*sec[b] for b in reached}
            b = min(all_, key=all_.get)
            choices.append(dict(task=name, target=target, fastest=f, seconds=took, best_measured=b, best_seconds=all_[b], ratio=took/all_[b], in_use=all_[bs0]/all_[b]))
        print(e, choices[-1], flush=True)
    rows,errors,costs,choices = map(pd.DataFrame, (rows, errors, costs, choices))
    rows.to_csv(here/'prediction.csv', index=False, float_format='%.4g')
    picture(rows)
    def md(df): return df.astype(object).where(df.notna(), None).to_markdown(index=False, floatfmt='.3g', missingval='')
    n_covered = rows[rows.bs != bs0].groupby(['task', 'target'], sort=False).size().to_numpy()
    worst,slowest = errors.loc[errors['steps, mean'].idxmax()],choices.loc[choices.ratio.idxmax()]
    over = errors[errors['steps, mean'] > 1.5]
    write_page('prediction', 'Predicted and measured', f"""Made by `benchmarks/prediction.py` from the real trainings in `training.csv` (`benchmarks/training.py`): at each batch size the best of a grid of learning rates by factors of 2, {len(seeds)} seeds,
steps until the training loss on 2,000 fixed training examples is at the target. Times are those steps times the seconds of a step in real training, the least of three rounds of medians. Predictions are what `bs_find` says at bs={bs0}, with the best learning rate there and a mock
training as long as the real one, {args.seeds} seed{'s' if args.seeds > 1 else ''}.""",
        [f"Steps to the same loss, predicted for batch sizes from {rows.bs.min()} to {rows.bs.max():,}, are off by factors of {errors['steps, mean'].min():.2f} to {errors['steps, mean'].max():.2f} (geometric means of a task), times by {errors['time, mean'].min():.2f} to {errors['time, mean'].max():.2f}. The largest single errors are {errors['steps, largest'].max():.1f} and {errors['time, largest'].max():.1f}.",
         f"The predicted 95% interval of steps has the measured ratio in {np.average(errors.covered, weights=n_covered):.0%} of sizes and tasks. Learning rates are off by {errors['lr, largest'].max():.1f} at most, by {geomean(errors['lr, largest']):.2f} in the geometric mean of the tasks' largest errors.",
         f"The batch size called `fastest` takes {choices.ratio.min():.2f} to {choices.ratio.max():.2f} times as long as the best that was measured, geometric mean {geomean(choices.ratio):.2f}; bs={bs0} takes {geomean(choices.in_use):.2f} times as long.",
         f"By default `bs_find` takes {costs.finder.min():.2f} to {costs.finder.max():.2f} of the time of an epoch. Asked three times, it names the same size, or each in the bands of the other two, in {costs.agree.sum()} of {len(costs)} tasks."],
        [f"It is the least certain with {worst.task} ({worst.target:g}): steps are off by {worst['steps, mean']:.2f}." + (f" More than 1.5: {', '.join(f'{r.task} ({r.target:g})' for r in over.itertuples())}." if len(over) else ''),
         slowest.ratio > 1.1 and f"{slowest.fastest} is called fastest for {slowest.task} ({slowest.target:g}), which takes {slowest.ratio:.2f} of the time of {slowest.best_measured}.",
         "Whoever has the time to train at every batch size knows more: `bs_sweep` does that."],
        f"""![Predicted against measured](prediction.png)

Left steps, right times, relative to bs={bs0}. On the line the prediction is right, in the band within a factor of two.

## Errors, as factors

Over the batch sizes other than {bs0}. `lr` is compared with the lowest point of a parabola through the best of the grid and its neighbours, `covered` is the share of sizes whose measured steps are in the predicted interval. The last three columns: the mean error in steps with each of the three
noise scales, that of the Hessian where it can be had in reasonable time.

{md(errors)}

## The fastest batch size

`ratio` is the time at `fastest` over the best that was measured, `in_use` that of bs={bs0}. Where `fastest` is none of the batch sizes of the grid, it is trained with the learning rate that `bs_find` says for it. No size is called faster where a schedule would get fewer than a hundred steps with it: these trainings have none.

{md(choices)}

## What finding it costs

`bs_find(lr)` as it is: the time of the finder in all and of its measurements alone as shares of one epoch of training at bs={bs0}. `fastest` is what it said when asked three times, `bands` which sizes it called about as fast, `agree` whether all three are the same, or each lies in all of the bands.

{md(costs)}

## Relative to bs={bs0}

{md(rows)}
""")


if __name__ == '__main__': main()
