"What bs_find at batch size 64 predicts for other batch sizes, against real training (training.csv): writes prediction.csv and prediction.md"
import argparse, math, time

import numpy as np, pandas as pd
from matplotlib.figure import Figure

import fastai_bs_finder.finder
from fastai_bs_finder.predict import noiseless_mean, rel_steps
from common import write_page
from tasks import tasks
from training import best_runs, bs0, geomean, here, runs, seeds, sizes, step_seconds


def found(task, lr, steps, seed, **kwargs):
    "What `bs_find` finds in a mock training as long as the real one, with time enough for the profile: these trainings take seconds"
    learn = task.make(bs0, seed)
    sug = learn.bs_find(lr, max(math.ceil(steps*20/11), 100), show_plot=False, **{'profile': 1., **kwargs})
    return learn,sug


def cost(name, lr, seconds):
    "What `bs_find` costs by default, as shares of an epoch of training at `seconds` a step, and what it says is the fastest, three times"
    learn = tasks[name].make(bs0, 0)
    epoch = seconds*learn.dls.train.n/bs0
    def took(**kwargs):
        start = time.perf_counter()
        sug = learn.bs_find(lr, show_plot=False, **kwargs)
        return time.perf_counter() - start,sug.fastest
    took(profile=False)
    (both,*answers),(without,_),*again = took(),took(profile=False),took(),took()
    answers += [f for _,f in again]
    return dict(task=name, epoch_seconds=epoch, finder=both/epoch, profile=(both - without)/epoch, profile_of_finder=1 - without/both, fastest=', '.join(map(str, answers)), apart=max(answers)/min(answers) if all(answers) else math.nan)


def seconds_per_step(task, lrs, rounds=3):
    "Seconds of a step of real training at each batch size, with its learning rate: the least of several rounds in turn, for what else a machine does only adds to it"
    found = [{bs: step_seconds(task, bs, lr, 20 if bs < 1024 else 8) for bs,lr in lrs.items()} for _ in range(rounds)]
    return {bs: min(f[bs] for f in found) for bs in lrs}


def mean_of(stats, kind):
    "The average of one of the three noise scales, over noiseless steps"
    B = stats[f'{kind}noise_scale']
    return noiseless_mean(B[B > 0], bs0)


def off(predicted, measured):
    "Errors as factors: their geometric mean, and the largest"
    e = [abs(math.log(p/m)) for p,m in zip(predicted, measured)]
    return math.exp(np.mean(e)),math.exp(max(e))


def time_to_target(task, target, bs, lr, seconds, max_steps):
    "Steps to the target at `bs` with the best of three learning rates around the predicted one, `max_steps` at most, times the seconds of a step"
    task,best = task._replace(targets=(target,)),math.inf
    for f in (1, .5, 2): best = min(best, geomean([run[0]['steps'] for run in runs(task, bs, lr*f, best, max_steps)]))
    return best*seconds


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
    best = best_runs(pd.read_csv(here/'training.csv'))
    rows,errors,costs,choices = [],[],[],[]
    for name in args.tasks:
        task,at,results = tasks[name],best.loc[name],{}
        lrs = {b: float(lr) for b,lr in at.loc[task.targets[-1]].lr.items()}
        for target in task.targets:
            m = at.loc[target]
            lr0,ratios,noise,fast = float(m.lr[bs0]),[],{k: [] for k in ('', 'opt_', 'full_')},[]
            for seed in range(args.seeds):
                learn,sug = found(task, lr0, m.steps[bs0], seed)
                ratios.append(learn.recorder.bs_table)
                fast.append(sug.fastest)
                hessian,_ = found(task, lr0, m.steps[bs0], seed, hessian=True, profile=False)
                for kind in noise: noise[kind].append(mean_of(hessian.recorder.bs_stats, kind))
            lrs |= {f: ratios[0].loc[f, 'lr'] for f in fast if f not in lrs}
            results[target] = m,ratios,noise,fast
        seconds = seconds_per_step(task, lrs)
        costs.append(cost(name, float(at.loc[task.targets[0], bs0].lr), seconds[bs0]))
        for target,(m,ratios,noise,fast) in results.items():
            reached = [b for b in m.index if math.isfinite(m.steps[b])]
            others = [b for b in reached if b != bs0]
            def predicted(q, b): return geomean([t.loc[b, q] for t in ratios])
            for b in m.index:
                ok = b in reached
                rows.append(dict(task=name, target=target, bs=b, lr=m.lr[b] if ok else math.nan, steps=m.steps[b], steps_ratio=m.steps[b]/m.steps[bs0], predicted_steps=predicted('steps', b),
                                 time_ratio=m.steps[b]*seconds[b]/(m.steps[bs0]*seconds[bs0]), predicted_time=predicted('time', b)))
            r = pd.DataFrame(rows[-len(m):]).set_index('bs').loc[others]
            e = dict(task=name, target=target)
            e['steps, mean'],e['steps, largest'] = off(r.predicted_steps, r.steps_ratio)
            e['time, mean'],e['time, largest'] = off(r.predicted_time, r.time_ratio)
            for kind,label in ('', 'simple'), ('opt_', 'optimizer'), ('full_', 'Hessian'):
                e[label] = off([rel_steps(b, bs0, geomean(noise[kind])) for b in others], r.steps_ratio)[0]
            errors.append(e)
            for f in sorted(set(fast)):
                took = m.steps[f]*seconds[f] if f in reached else time_to_target(task, target, f, ratios[0].loc[f, 'lr'], seconds[f], 5*m.steps[bs0])
                all_ = {b: m.steps[b]*seconds[b] for b in reached}
                b = min(all_, key=all_.get)
                choices.append(dict(task=name, target=target, fastest=f, seconds=took, best_measured=b, best_seconds=all_[b], ratio=took/all_[b], in_use=all_[bs0]/all_[b]))
            print(e, choices[-1], flush=True)
    rows,errors,costs,choices = map(pd.DataFrame, (rows, errors, costs, choices))
    rows.to_csv(here/'prediction.csv', index=False, float_format='%.4g')
    picture(rows)
    def md(df): return df.to_markdown(index=False, floatfmt='.3g')
    worst,slowest = errors.loc[errors['steps, mean'].idxmax()],choices.loc[choices.ratio.idxmax()]
    over = errors[errors['steps, mean'] > 1.5]
    write_page('prediction', 'Predicted and measured', f"""Made by `benchmarks/prediction.py` from the real trainings in `training.csv` (`benchmarks/training.py`): at each batch size the best of a grid of learning rates by factors of 2, {len(seeds)} seeds,
steps until the training loss on 2,000 fixed training examples is at the target. Times are those steps times the seconds of a step in real training, the least of three rounds of medians. Predictions are what `bs_find` says at bs={bs0}, with the best learning rate there and a mock
training as long as the real one, {args.seeds} seed{'s' if args.seeds > 1 else ''}.""",
        [f"Steps to the same loss, predicted for batch sizes from {min(sizes)} to {max(sizes):,}, are off by factors of {errors['steps, mean'].min():.2f} to {errors['steps, mean'].max():.2f} (geometric means of a task), times by {errors['time, mean'].min():.2f} to {errors['time, mean'].max():.2f}. The largest single errors are {errors['steps, largest'].max():.1f} and {errors['time, largest'].max():.1f}.",
         f"The batch size called `fastest` takes {choices.ratio.min():.2f} to {choices.ratio.max():.2f} of the time of the best that was measured, geometric mean {geomean(choices.ratio):.2f}; that of bs={bs0} takes {geomean(choices.in_use):.2f}.",
         f"By default `bs_find` takes {costs.finder.min():.2f} to {costs.finder.max():.2f} of the time of an epoch. Asked three times, its `fastest` is apart by factors of {costs.apart.min():.2g} to {costs.apart.max():.2g}: its timings are short."],
        [f"It is the least certain with {worst.task} ({worst.target:g}): steps are off by {worst['steps, mean']:.2f}." + (f" More than 1.5: {', '.join(f'{r.task} ({r.target:g})' for r in over.itertuples())}." if len(over) else ''),
         slowest.ratio > 1.1 and f"{slowest.fastest} is called fastest for {slowest.task} ({slowest.target:g}), which takes {slowest.ratio:.2f} of the time of {slowest.best_measured}.",
         "Whoever has the time to train at every batch size knows more: `bs_sweep` does that."],
        f"""![Predicted against measured](prediction.png)

Left steps, right times, relative to bs={bs0}. On the line the prediction is right, in the band within a factor of two.

## Errors, as factors

Over the batch sizes other than {bs0}. The last three columns: the mean error in steps with each of the three noise scales.

{md(errors)}

## The fastest batch size

`ratio` is the time at `fastest` over the best that was measured, `in_use` that of bs={bs0}.

{md(choices)}

## What finding it costs

`bs_find(lr)` as it is, one epoch of batches: the time of the finder in all and of its profile as shares of one epoch of training at bs={bs0}, and the profile's part of the finder. Differences of two runs: their noise is in them. `fastest` is what it said when asked three times, `apart` the largest of these over the smallest.

{md(costs)}

## Relative to bs={bs0}

{md(rows)}
""")


if __name__ == '__main__': main()
