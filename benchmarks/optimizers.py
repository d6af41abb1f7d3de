"Which optimizers normalize the gradient, by experiment, and the learning rates that follow, against the best of a grid: writes optimizers.md"
import argparse, math
from functools import partial

import pandas as pd, torch
from torch import nn, optim
from fastai.basics import Adam, Callback, CancelFitException, Lamb, OptimWrapper, QHAdam, RAdam, RMSProp, SGD
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import Larc, Lookahead, ranger

import fastai_bs_finder.finder
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.metric import normalizes
from fastai_bs_finder.predict import scale_lr
from common import NoValid, at_once, write_page

bs0,bs1,target,factor,points = 16,128,.2,2**.5,11


class Lion(optim.Optimizer):
    "Chen et al. 2023, without weight decay"
    def __init__(self, params, lr, betas=(.9, .99)): super().__init__(params, dict(lr=lr, betas=betas))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            a,b = group['betas']
            for p in (p for p in group['params'] if p.grad is not None):
                m = self.state[p].setdefault('exp_avg', torch.zeros_like(p))
                p.add_((a*m + (1 - a)*p.grad).sign(), alpha=-group['lr'])
                m.lerp_(p.grad, 1 - b)


def wrapped(cls): return partial(OptimWrapper, opt=cls)


in_torch = sorted(k for k,o in vars(optim).items() if isinstance(o, type) and issubclass(o, optim.Optimizer) and k not in ('Optimizer', 'LBFGS'))
every = dict(SGD=SGD, RMSProp=RMSProp, Adam=Adam, RAdam=RAdam, QHAdam=QHAdam, Larc=Larc, Lamb=Lamb, ranger=ranger) | {
    'SGD, mom=0.9': partial(SGD, mom=.9), 'Lookahead(SGD)': lambda ps, lr: Lookahead(SGD(ps, lr=lr)), 'Lion, in this script': wrapped(Lion)} | {
    f'torch.optim.{k}': wrapped(getattr(optim, k)) for k in in_torch}
trained = {  # with a learning rate in the middle of the grid at `bs0`
    'SGD, mom=0.9': (partial(SGD, mom=.9), .03), 'Adam': (Adam, .008), 'torch.optim.Adamax': (wrapped(optim.Adamax), .016), 'torch.optim.RMSprop': (wrapped(optim.RMSprop), .004),
    'Lion, in this script': (wrapped(Lion), .001), 'Lamb': (Lamb, .03)}


class ToTarget(Callback):
    "Trains until the loss on the whole training set is at the target, or for `most` steps"
    run_valid = False
    def __init__(self, most): self.most,self.steps = most,0
    def before_fit(self):
        items = self.dls.train.dataset
        self.x,self.y_ = torch.stack([x for x,_ in items]),torch.stack([y for _,y in items])

    def after_batch(self):
        self.steps += 1
        with torch.no_grad(): loss = float(nn.functional.cross_entropy(self.model(self.x), self.y_))
        if loss <= target or not loss < 50 or self.steps == self.most:
            if not loss <= target: self.steps = math.inf
            raise CancelFitException


def learner(name, bs, seed): return digits_learner(bs, seed, opt_func=trained[name][0], cbs=NoValid()).remove_cb(ProgressCallback)


def steps(name, bs, lr, seed):
    "Steps to the target; infinite where ten epochs do not reach it"
    torch.set_num_threads(1)
    learn,cb = learner(name, bs, seed),ToTarget(15_000//bs)
    with learn.no_logging(): learn.fit(100, lr, cbs=cb)
    return cb.steps


def found(name, lr):
    "Noise scale and rule by `bs_find` at `bs0`"
    torch.set_num_threads(1)
    learn = learner(name, bs0, 0)
    learn.bs_find(lr, 400, show_plot=False, profile=False)
    result = learn.recorder.bs_result
    return result.mean_noise_scale[0],result.opt


def mean(x): return math.exp(sum(map(math.log, x))/len(x))


def runs(calls, seeds):
    "Geometric mean of the steps over the seeds, for each `(name, bs, lr)`"
    took = at_once(steps, [(*c, s) for c in calls for s in range(seeds)])
    return {c: mean(took[i*seeds:(i + 1)*seeds]) for i,c in enumerate(calls)}


def normalizing():
    "What the experiment says of each optimizer"
    res = []
    for name,f in every.items():
        torch.manual_seed(0)
        shapes = [(8, 16)] if 'Muon' in name else [(8, 16), (8,)]
        res.append(dict(optimizer=name, normalizes='yes' if (yes := normalizes(f([nn.Parameter(.1*torch.randn(s)) for s in shapes], lr=.01))) else 'no', rule='square root' if yes else 'linear'))
    return pd.DataFrame(res)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, default=3)
    args = p.parse_args()
    table,grid = normalizing(),[factor**i for i in range(-(points//2), points//2 + 1)]
    took = runs([(name, bs, lr*k*(1 if bs == bs0 else 2)) for name,(_,lr) in trained.items() for bs in (bs0, bs1) for k in grid], args.seeds)
    def best(name, bs): return min(((lr, s) for (n,b,lr),s in took.items() if (n, b) == (name, bs)), key=lambda o: o[1])
    at = {name: best(name, bs0) for name in trained}
    noise = dict(zip(trained, at_once(found, [(name, lr) for name,(lr,_) in at.items()])))
    lrs = {(name, rule): scale_lr(at[name][0], bs0, bs1, noise[name][0], rule) for name in trained for rule in ('sgd', 'adam')}
    scaled = runs([(name, bs1, lr) for (name,_),lr in lrs.items()], args.seeds)
    rows = []
    for name,(lr,_) in at.items():
        noise_scale,opt = noise[name]
        other = dict(sgd='adam', adam='sgd')[opt]
        top,least = best(name, bs1)
        ours,theirs = (scaled[name, bs1, lrs[name, rule]] for rule in (opt, other))
        rows.append({'optimizer': name, 'noise scale': noise_scale, 'best lr at 16': lr, 'steps at 16': at[name][1], 'best lr at 128': top, 'steps': least, 'our lr': lrs[name, opt], 'our steps': ours,
                     'lr by the other rule': lrs[name, other], 'its steps': theirs})
        print(rows[-1], flush=True)
    df = pd.DataFrame(rows)
    ours,theirs = df['our steps']/df.steps,df['its steps']/df.steps
    def factors(x): return f'{x.min():.2f} to {x.max():.2f}'
    worse = df[df['its steps'] < df['our steps']]
    off = df['our lr']/df['best lr at 128']
    write_page('optimizers', 'Which optimizers normalize the gradient', f"""Made by `benchmarks/optimizers.py`: the experiment of `normalizes` on each optimizer of fastai and of PyTorch that `fit` can use; and for six of them, a 64-64-10 network for scikit-learn's digits, steps until the loss on all 1,500 training examples is at {target},
geometric means over {args.seeds} seeds, with the best of {points} learning rates by factors of √2, at {bs0} and at {bs1} examples per step. "Our lr" is the best at {bs0}, scaled to {bs1} by the noise scale that `bs_find` measures there and the rule of the experiment; inf where a seed did not reach the target in ten epochs.""",
        [f"{(table.normalizes == 'yes').sum()} of {len(table)} optimizers normalize the gradient, and get the square-root rule: those that do not are {'; '.join(table.optimizer[table.normalizes == 'no'])}.",
         f"At {bs1} examples per step, the scaled learning rate takes {factors(ours)} of the steps of the best that was tried there; the other rule's takes {factors(theirs)}."],
        [f"The scaled learning rate is {factors(off)} of the best at {bs1}.",
         f"The other rule's learning rate takes fewer steps with {'; '.join(worse.optimizer)}." if len(worse) else ''],
        f"""{df.to_markdown(index=False, floatfmt='.3g')}

## What the experiment says

{table.to_markdown(index=False)}""")


if __name__ == '__main__': main()
