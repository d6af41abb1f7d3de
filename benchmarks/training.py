"Real training to a target: steps at each batch size, with the best learning rate of a grid; results in training.csv"
import argparse, math, time
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, torch
from fastai.basics import Callback, CancelFitException, first

from common import here
from tasks import tasks, with_horizon_in_examples

bs0,seeds = 64,(0, 1)


class ToTargets(Callback):
    "Trains until the training loss, on a fixed part of the training set, is at the last of `targets`, or for `max_steps`; notes the seconds of each step, evaluation left out. Without targets nothing is evaluated"
    order,run_valid = 100,False
    def __init__(self, targets, max_steps): self.targets,self.max_steps,self.reached = targets,max_steps,[]

    def before_fit(self):
        idxs = np.random.default_rng(0).permutation(self.dls.train.n)[:2000].tolist()
        *self.x,self.y_ = first(self.dls.train.new(get_idxs=lambda: idxs, bs=len(idxs), shuffle=False, drop_last=False))
        self.steps,self.next,self.seconds = 0,10 if self.targets else math.inf,[]
        self.most = max(20, 2*self.training_loss()) if self.targets else math.inf
        self.start = time.perf_counter()

    def training_loss(self):
        self.model.eval()
        with torch.no_grad(): loss = self.learn.loss_func(self.model(*self.x), self.y_).item()
        self.model.train()
        return loss

    def after_batch(self):
        self.steps += 1
        self.seconds.append(time.perf_counter() - self.start)
        self.start = time.perf_counter()
        if self.steps < self.next and self.steps < self.max_steps: return
        loss = self.training_loss() if self.targets else math.nan
        while len(self.reached) < len(self.targets) and loss <= self.targets[len(self.reached)]: self.reached.append(self.steps)
        if len(self.reached) == len(self.targets) or self.steps >= self.max_steps or not loss < self.most: raise CancelFitException
        self.next = self.steps + math.ceil(self.steps*.04)
        self.start = time.perf_counter()


def train(task, bs, lr, seed, max_steps):
    "A row per target: its steps, inf where it was not reached in `max_steps`"
    cb = ToTargets(task.targets, max_steps)
    task.make(bs, seed).fit(10**6, lr, cbs=cb)
    reached = cb.reached + [math.inf]*(len(task.targets) - len(cb.reached))
    return [dict(bs=bs, lr=lr, seed=seed, target=t, steps=s) for t,s in zip(task.targets, reached)]


def runs(task, bs, lr, best, max_steps):
    "A training per seed, for `max_steps`, or 1.5 times the `best` number of steps so far: what takes longer is hopeless"
    return [train(task, bs, lr, seed, math.ceil(min(1.5*best, max_steps))) for seed in seeds]


def geomean(x): return math.exp(np.mean(np.log(x)))


def search(task, bs, lr, max_steps):
    "Runs at learning rates around `lr`, by factors of 2, until for every target the best is inside of the grid"
    rows,done = [],{}
    def score(lr, i):
        if lr not in done:
            best = [min((v[j] for v in done.values()), default=math.inf) for j in range(len(task.targets))]
            new = runs(task, bs, lr, best[-1], max_steps)
            rows.extend(r for run in new for r in run)
            done[lr] = [geomean([run[j]['steps'] for run in new]) for j in range(len(task.targets))]
            print(f'  bs={bs} lr={lr:.4g}: steps {[round(s, 1) for s in done[lr]]}', flush=True)
        return done[lr][i]
    for i in range(len(task.targets)):
        while not math.isfinite(score(lr, i)) and lr > 1e-6 and len(done) < 12: lr /= 2
        for factor in (2, .5):
            while score(lr*factor, i) < score(lr, i): lr *= factor
        score(lr*2, i), score(lr/2, i)
    best = min(done, key=lambda k: done[k][-1])
    return rows,best,done[best][-1]


def best_runs(runs):
    "Steps with the best learning rate of each size, as geometric means over the seeds; indexed by task, target and batch size, inf where none reached the target"
    by = ['task', 'target', 'bs', 'lr']
    means = runs.groupby(by, sort=False).steps.agg(geomean).reset_index()
    return means.loc[means.groupby(by[:-1], sort=False).steps.idxmin()].set_index(by[:-1])


def lowest_point(runs, name, target, bs):
    "Learning rate and steps at the lowest point of a parabola through the best of the grid and its neighbours; `nan` where there is no such training"
    runs = runs[(runs.task == name) & (runs.target == target) & (runs.bs == bs)].groupby('lr').steps.agg(geomean)
    runs = runs[np.isfinite(runs)]
    if not len(runs): return math.nan,math.nan
    x,y = np.log(runs.index.to_numpy(float)),np.log(runs.to_numpy())
    i = y.argmin()
    if not 0 < i < len(x) - 1: return math.exp(x[i]),math.exp(y[i])
    p = np.polyfit(x[i-1:i+2] - x[i], y[i-1:i+2], 2)
    least = np.clip(-p[1]/(2*p[0]), -.35, .35)
    return math.exp(x[i] + least),math.exp(np.polyval(p, least))


def step_seconds(task, bs, lr, n=60):
    "Median seconds of a step of real training"
    cb = ToTargets((), n)
    task.make(bs, 0).fit(10**6, lr, cbs=cb)
    return float(np.median(cb.seconds))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--tasks', nargs='*', default=list(tasks), help='their names')
    p.add_argument('--out', type=Path, default=here/'training.csv')
    p.add_argument('--in-examples', action='store_true', help="keep the horizon of Adam's second moments fixed in examples, not in steps")
    args = p.parse_args()
    for name in args.tasks:
        task,lr,max_steps,rows = tasks[name],tasks[name].lr/2,20_000,[]
        if args.in_examples: task = task._replace(learner=partial(with_horizon_in_examples, task.learner))
        print(name, flush=True)
        for bs in task.sizes:
            new,lr,steps = search(task, bs, lr, max_steps)
            rows += new
            max_steps = math.ceil(3*steps)
            lr *= 2 if task.opt == 'sgd' else 1.41
        df = pd.DataFrame(rows)
        df.insert(0, 'task', name)
        df.to_csv(args.out, mode='a', header=not args.out.exists(), index=False, float_format='%.6g')


if __name__ == '__main__': main()
