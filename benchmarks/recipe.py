"Does it pay? The recipe as a newcomer types it, lr_find and one cycle, with and without bs_find: writes recipe.csv as it goes, and recipe.md"
import argparse, math, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np, pandas as pd, torch
from filelock import FileLock
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from fastai.basics import Callback

import fastai_bs_finder.all
from fastai_bs_finder.accumulate import examples_per_step
from fastai_bs_finder.measure import BSFinder
from common import here, write_page
from recipe_tasks import tasks

starts,from_,article,long = (16, 64, 512),64,512,20
ways = {'baseline': starts, 'bs_find': starts, f'bs {article}': [from_], 'half the epochs': [from_], 'one noise scale': starts}
lower_is_better = 'exp_rmspe', 'rmse'
out,key = here/'recipe.csv',['task', 'way', 'bs0', 'seed']


class OneNoiseScale(BSFinder):
    "Goes by one noise scale for all batch sizes, whatever the optimizer is"
    def _sampled_squares(self): return None


finders = {'bs_find': BSFinder, 'one noise scale': OneNoiseScale}


class Clock(Callback):
    "Seconds of validation"
    seconds = 0.
    def before_validate(self): self.start = time.perf_counter()
    def after_validate(self): self.seconds += time.perf_counter() - self.start


def run(task, way, bs0, seed):
    "One training: what it took and where it ended; `lr_find` is in each and its time is not counted"
    learn = task.make(article if way == f'bs {article}' else bs0, seed)
    n_epoch,lr = task.epochs//2 if way == 'half the epochs' else task.epochs,learn.lr_find(show_plot=False).valley
    found,finder,finder_cpu = {},0.,0.
    if way in finders:
        cpu,start = time.process_time(),time.perf_counter()
        try:
            sug = learn.bs_find(lr, show_plot=False, finder=finders[way])
            learn.set_bs(sug)
            n_epoch,lr = learn.bs_plan(n_epoch)
            result = learn.recorder.bs_result
            found = dict(critical=sug.critical, fastest=sug.fastest, spent=result.run.spent, said=' '.join(str(result).split()))
        except ValueError as e: found = dict(said=f'ValueError: {e}')  # nothing was touched: the training goes on as without it
        finder,finder_cpu = time.perf_counter() - start,time.process_time() - cpu
    clock,cpu,start = Clock(),time.process_time(),time.perf_counter()
    learn.fit_one_cycle(n_epoch, lr, cbs=clock)
    seconds,cpu = time.perf_counter() - start,time.process_time() - cpu + finder_cpu
    _,valid_loss,metric = learn.recorder.values[-1]
    return dict(bs=examples_per_step(learn), lr=float(lr), epochs=n_epoch, valid_loss=valid_loss, metric=learn.metrics[0].name.strip('_'), value=metric,
                training=seconds, validation=clock.seconds, finder=finder, total=finder + seconds, cpu=cpu, **found)


columns = [*key, *'bs lr epochs valid_loss metric value training validation finder total cpu critical fastest spent said'.split()]


def run_task(name, seeds, done):
    "All trainings of a task that are not done, one after the other: a machine that slows down slows all of them. Each adds a row to the csv"
    tasks[name].make(from_, 0)  # loads the data
    for seed in seeds:
        for bs0 in starts:
            for way in [w for w,sizes in ways.items() if bs0 in sizes and (name, w, bs0, seed) not in done]:
                row = dict(task=name, way=way, bs0=bs0, seed=seed) | run(tasks[name], way, bs0, seed)
                with FileLock(f'{here.parent}/build/recipe.lock'):
                    pd.DataFrame([row], columns=columns).to_csv(out, mode='a', header=not out.exists(), index=False, float_format='%.5g')
                print({k: v for k,v in row.items() if k != 'said'}, flush=True)


def run_all(names, seeds):
    "Two tasks at a time, with a core and a thread each"
    (here.parent/'build').mkdir(exist_ok=True)
    done = set(pd.read_csv(out)[key].itertuples(index=False, name=None)) if out.exists() else set()
    with ProcessPoolExecutor(2, get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        for f in [pool.submit(run_task, name, seeds, done) for name in names]: f.result()


def settled(df):
    "Where the training with the finder is bit for bit the baseline's, both get the mean of their times"
    df = df.copy()
    same = ['task', 'bs0', 'seed', 'bs', 'lr', 'epochs', 'valid_loss', 'value']
    both = df[df.way.isin(['baseline', *finders])]
    df.loc[both.index, 'training'] = both.groupby(same).training.transform('mean')
    df['total'] = df.training + df.finder
    return df


def geomean(x): return math.exp(np.log(x).mean()) if len(x) else math.nan


def compare(df, way='bs_find', to='baseline'):
    "A row per task and batch size to start from: one way beside another, means over the seeds; times as geometric means of ratios"
    rows = []
    for (task,bs0),d in df.groupby(['task', 'bs0'], sort=False):
        a,b = (d[d.way == w].set_index('seed') for w in (to, way))
        both = a.index.intersection(b.index)
        if not len(both): continue
        a,b = a.loc[both],b.loc[both]
        sign = -1 if a.metric.iloc[0] in lower_is_better else 1
        rows.append(dict(task=task, bs0=bs0, metric=a.metric.iloc[0], a=a, b=b, seconds=a.total.mean(), sd=a.value.std(),
                         worse=sign*(a.value.mean() - b.value.mean()), late=(b.finder > np.maximum(60, a.total/2)).sum())
                    | {q: geomean(b[q]/a.total) for q in ('training', 'finder', 'total')})
    return pd.DataFrame(rows)


def pm(x, digits=3): return f'{x.mean():.{digits}f}' + (f' ± {x.std():.{digits}f}' if len(x) > 1 else '')
def listed(x): return ', '.join(dict.fromkeys('none' if pd.isna(o) else f'{o:,.0f}' for o in x))


def start_table(c):
    "A row per batch size to start from: times where the baseline takes long, metrics everywhere"
    rows = []
    for bs0,d in [*c.groupby('bs0'), ('all', c)]:
        slow = d[d.seconds >= long]
        rows.append({'from bs': bs0, f'{long} s or more': len(slow)} | {q: geomean(slow[q]) for q in ('training', 'finder', 'total')}
                    | {'longest': slow.total.max(), 'cases': len(d)}
                    | ({'metric worse': (d.worse > d.sd).sum(), 'metric better': (-d.worse > d.sd).sum()} if d.sd.notna().any() else {}))  # of a single seed, nothing is known
    return pd.DataFrame(rows)


def main_table(c):
    return pd.DataFrame([{
        'task': r.task, 'bs0': r.bs0, 'bs': listed(r.b.bs), 'epochs': f'{listed(r.a.epochs)} → {listed(r.b.epochs)}', 'metric': r.metric,
        'baseline': pm(r.a.value), 'with bs_find': pm(r.b.value), 'loss, baseline': pm(r.a.valid_loss), 'loss, with bs_find': pm(r.b.valid_loss),
        'baseline, s': r.seconds, 'training': r.training, 'finder': r.finder, 'total': r.total} for r in c.itertuples()])


def elements_table(df):
    "What it is worth to predict Adam element by element: a row per batch size to start from, relative to what one noise scale advises"
    c,rows = compare(df, to='one noise scale'),[]
    for bs0,d in [*c.groupby('bs0'), ('all', c)] if len(c) else []:
        differ = d[[list(r.a.valid_loss) != list(r.b.valid_loss) for r in d.itertuples()]]
        rows.append({'from bs': bs0, 'cases': len(d), 'other trainings': len(differ), 'total, of these': geomean(differ.total), 'longest': differ.total.max()}
                    | ({'metric worse': (differ.worse > differ.sd).sum(), 'metric better': (-differ.worse > differ.sd).sum()} if d.sd.notna().any() else {}))
    return pd.DataFrame(rows)


def control_table(df):
    "All ways from one batch size, times relative to the baseline's"
    d,rows = df[df.bs0 == from_],[]
    for task,t in d.groupby('task', sort=False):
        base = t[t.way == 'baseline'].set_index('seed').total
        for way in ways:
            w = t[t.way == way].set_index('seed')
            if len(w): rows.append(dict(task=task, way=way, bs=listed(w.bs), metric=w.metric.iloc[0], value=pm(w.value), valid_loss=pm(w.valid_loss),
                                        total=geomean((w.total/base).dropna())))
    return pd.DataFrame(rows)


def picture(df):
    "Total time against validation metric: a panel per task, a line per batch size from the baseline to the training with the finder"
    names = [*df.task.unique()]
    fig = Figure(figsize=(11, 2.6*math.ceil(len(names)/4)), layout='constrained')
    axs = fig.subplots(math.ceil(len(names)/4), 4, squeeze=False).flat
    for ax,name in zip(axs[:len(names)], names):
        d = df[df.task == name].groupby(['way', 'bs0'])[['total', 'value']].mean()
        for i,bs0 in enumerate(starts):
            line = d.reindex([('baseline', bs0), ('bs_find', bs0)])
            ax.plot(line.total, line.value, c=f'C{i}', label=f'from bs={bs0}')
            ax.plot(*line.iloc[0], 'o', mfc='w', c=f'C{i}')
            ax.plot(*line.iloc[1], 'o', c=f'C{i}')
        for way,marker in zip([*ways][2:], 'x+'): ax.plot(*d.reindex([(way, from_)]).iloc[0], marker, c='k', label=way)
        metric = df[df.task == name].metric.iloc[0]
        ax.set(xscale='log', ylabel=metric)
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter='{x:g}', minor_locator=NullLocator())
        ax.set_title(name, size='medium')
        if metric in lower_is_better: ax.invert_yaxis()
    for ax in axs[len(names):]: ax.axis('off')
    axs[-1].legend(*axs[0].get_legend_handles_labels(), loc='center', fontsize='small')
    fig.supxlabel('total seconds', size='medium')
    fig.savefig(here/'recipe.png', dpi=90)


def page():
    df = pd.read_csv(out).sort_values(['seed', 'bs0'], kind='stable')
    df['task'] = pd.Categorical(df.task, [n for n in tasks if n in {*df.task}])
    df = settled(df.sort_values('task', kind='stable').astype(dict(task=str)))
    c = compare(df)
    slow,found = c[c.seconds >= long],df[df.way == 'bs_find']
    worse,worst,late = c[c.worse > c.sd],c.loc[c.total.idxmax()],c.late.sum()
    refused = found.said.str.startswith('ValueError').sum()
    same = df[(df.bs0 == from_) & df.task.isin(slow.task[slow.bs0 == from_])].pivot(index=['task', 'seed'], columns='way', values='total')
    epochs = (same[f'bs {article}']/same.baseline).dropna() if len(same) else []
    def named(d): return ', '.join(f'{r.task} from {r.bs0}' for r in d.itertuples())
    picture(df)
    one = compare(df, 'one noise scale')
    def md(d):
        d = d.map(lambda o: '' if pd.isna(o) else f'{o:.2f}' if isinstance(o, float) else o)
        return d.to_markdown(index=False, disable_numparse=True, colalign=['left'] + ['right']*(d.shape[1] - 1))
    n_seeds = df.seed.nunique()
    write_page('recipe', 'Does it pay?', f"""Made by `benchmarks/recipe.py` from the trainings in `recipe.csv`, which it runs first (`make recipe`; tasks in `recipe_tasks.py`), {n_seeds} seed{'s'*(n_seeds > 1)}. The baseline is what a newcomer types: `lr_find().valley`, then `fit_one_cycle`. With the finder, between the two:
`sug = learn.bs_find(lr)`, `learn.set_bs(sug)`, and `fit_one_cycle(*learn.bs_plan(n_epoch))`, from the same seed. Each is validated after every epoch. Times are of training with validation, and of the finder (`bs_find`, `set_bs`, `bs_plan`), relative to the baseline's; `lr_find` is in all of them and not counted, nor is loading the data.
A task's trainings run one after the other in a process with one thread, two tasks at a time on two cores; they had {df.cpu.sum()/df.total.sum():.0%} of a core each.""",
        [f"In the {len(slow)} cases in which the baseline, the training without `bs_find`, takes {long} s or more, training with the finder takes {geomean(slow.total):.2f} of its time, the finder included: {geomean(slow.training):.2f} for the training and {geomean(slow.finder):.2f} for the finder (geometric means, which do not add up)." if len(slow) else '',
         f"The validation metric is worse by more than a standard deviation of the baseline's over seeds in {len(worse)} of {len(c)} cases, better by more than one in {(-c.worse > c.sd).sum()}."
         if n_seeds > 1 else "Whether the validation metric is worse by more than chance, a single seed cannot tell.",
         f"`bs_find` names a fastest batch size in {found.fastest.notna().sum()} of {len(found)} calls" + (f", and refuses in {refused}, after which the training goes on as without it" if refused else '') + ". " + (f"In {late} it takes more than 60 s and more than half of the baseline's time." if late else "No call takes more than 60 s, or more than half of the baseline's time where that is longer.")],
        [f"The longest total is {worst.total:.2f} of the baseline's {worst.seconds:.3g} s: {worst.task} from bs={worst.bs0}." + (f" Of {long} s or more, the longest is {slow.total.max():.2f}: {named(slow.nlargest(1, 'total'))}." if len(slow) and worst.seconds < long else ''),
         len(worse) and f"The metric is worse by more than a standard deviation: {named(worse)}.",
         len(epochs) and f"An epoch with bs={article} takes {geomean(epochs):.2f} of the time of one with bs={from_} on this machine, in the tasks of {long} s or more: so no size up to {article} can bring the time below that share of the time of bs={from_}, even if it needed no more examples and finding it took no time.",
         "Small data train in seconds: whatever a finder takes is more than it can save there."],
        f"""![Total time against the validation metric](recipe.png)

Each line goes from the baseline (hollow) to the training with `bs_find` (filled), which includes the time of `bs_find`. Farther left is faster, higher is better. × is bs={article} with an `lr_find` of its own, + half the epochs at bs={from_}. Means over the seeds.

{md(start_table(c))}

Times relative to the baseline's, of the cases whose baseline takes {long} s or more: geometric means, and the longest total. In how many of all cases the validation metric is worse or better by more than a standard deviation of the baseline's over seeds.

## By task and batch size to start from

`bs` is what was trained with. Validation metric and loss are means ± standard deviations over the seeds; the last three columns are times relative to the baseline's.

{md(main_table(c))}

## With Adam: element by element, or one noise scale

All of these tasks have Adam, which `bs_find` predicts [element by element](../nbs/15_adaptive.ipynb). Its advice against what it says with one noise scale for all sizes: times with the finder relative to that, of the cases in which size, learning rate or epochs differ; in the others, they are the same training. Where the baseline takes {long} s or more, the total is {geomean(slow.total):.2f} of its time element by element, and {geomean(one[one.seconds >= long].total):.2f} with one noise scale; the metric is worse than the baseline's by more than a standard deviation in {len(worse)} and in {(one.worse > one.sd).sum()} of {len(c)} cases.

{md(elements_table(df))}

## Controls, from bs={from_}

`bs {article}` is the way of the article that `bs_find` goes back to: a larger batch, an `lr_find` of its own, the same number of epochs. Half the epochs: what could be had for half of the time without any finder.

{md(control_table(df))}
""")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--task', nargs='*', default=list(tasks), help='their names')
    p.add_argument('--seeds', type=int, default=3, help='how many')
    p.add_argument('--fresh', action='store_true', help='run again what is in recipe.csv of these tasks')
    p.add_argument('--page', action='store_true', help='only write the page from recipe.csv')
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.fresh and out.exists(): pd.read_csv(out).query('task not in @args.task').to_csv(out, index=False)
    if not args.page: run_all(args.task, range(args.seeds))
    page()


if __name__ == '__main__': main()
