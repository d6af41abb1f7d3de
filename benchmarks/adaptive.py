"Rules for the steps and learning rates of Adam at other batch sizes, against the real trainings in training.csv; LOG.md says what came out"
import argparse, math
from functools import cache, partial

import numpy as np, pandas as pd, torch
from scipy.optimize import brentq, minimize_scalar
from fastai.basics import CancelBatchException, CancelFitException, Callback

from fastai_bs_finder.adaptive import Elements, fewest, model_error, ratios, steps_and_lr, steps_interval
from prediction import off
from common import here
from tasks import sizes, tasks
from training import best_runs, bs0, geomean, lowest_point, seeds

kept = here.parent/'build'/'adaptive'
at_sizes,at = np.array(sizes),sizes.index(bs0)
most,sqr_mom,eps = 2**17,.99,1e-5 # elements to keep of a model, at random; fastai's defaults


class Record(Callback):
    "Keeps, per measurement and element, the mean of `k` gradients at fixed weights, the mean of their squares, and Adam's own second moment; `n_train` ordinary steps between"
    order,run_valid = -1,False
    def __init__(self, k, n_train, steps): self.k,self.n_train,self.num_steps = k,n_train,steps

    def before_fit(self):
        self.ps,self.n,self.left,self.steps = [p for p,*_ in self.opt.all_params()],0,self.n_train,0
        total = sum(p.numel() for p in self.ps)
        self.idx = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:most].sort().values
        self.rows = {q: [] for q in ('m', 'q', 'v', 'step')}

    def flat(self, ts): return torch.cat([t.flatten() for t in ts])[self.idx].numpy()

    def before_batch(self):
        self.measuring = self.left <= 0
        if not self.measuring: return
        for p in self.ps: p.grad = None
        if not self.n: self.m,self.q = ([torch.zeros_like(p) for p in self.ps] for _ in range(2))

    def after_backward(self):
        if not self.measuring: return
        g = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.ps]
        torch._foreach_add_(self.m, g)
        torch._foreach_addcmul_(self.q, g, g)
        self.n += 1
        if self.n < self.k: raise CancelBatchException
        for ts in (self.m, self.q): torch._foreach_div_(ts, self.k)
        def second(p):
            s = self.opt.state[p]
            return s['sqr_avg']/(1 - sqr_mom**s['step']) if 'sqr_avg' in s else torch.zeros_like(p)
        for q,ts in dict(m=self.m, q=self.q, v=map(second, self.ps)).items(): self.rows[q].append(self.flat(ts))
        self.rows['step'].append(self.steps)
        for p,m in zip(self.ps, self.m): p.grad = m
        self.n,self.left = 0,self.n_train

    def after_step(self): self.steps += 1
    def after_batch(self):
        self.left -= not self.measuring
        if self.steps >= self.num_steps: raise CancelFitException


@cache
def trained():
    "The real trainings: all of them, and the best of each size"
    runs = pd.read_csv(here/'training.csv')
    return runs,best_runs(runs)


@cache
def recorded(name, target, k, n_train, seed):
    "Statistics along a training at `bs0` that is as long as the real one; kept on disk"
    file,best = kept/f'{name}-{target}-{k}-{n_train}-{seed}.npz',trained()[1]
    if not file.exists():
        kept.mkdir(parents=True, exist_ok=True)
        cb = Record(k, n_train, max(math.ceil(best.steps[name, target, bs0]), 55))
        tasks[name].make(bs0, seed).fit(10**6, float(best.lr[name, target, bs0]), cbs=cb)
        np.savez(file, **{q: np.stack(o) for q,o in cb.rows.items()})
    with np.load(file) as f: return {q: torch.from_numpy(f[q]) for q in ('m', 'q', 'v')} | dict(k=k)


def moments(d):
    "Per measurement and element: squared mean gradient, noise, and unbiased squared gradient"
    k,square = d['k'],d['m']**2
    noise = (d['q'] - square)*(k/(k - 1)*bs0)
    return square,noise,square - noise/(k*bs0)


def in_metric(weights, d):
    "φ and ν where the metric does not depend on the batch size: it gives 1 + B/b"
    _,noise,signal = moments(d)
    S,G2 = ((x*weights(d)).sum(1).double().numpy()[1:, None] for x in (noise, signal))
    return G2 + 0*at_sizes,G2 + S/at_sizes


def fixed(d): return torch.where(d['v'] > 0, 1/(d['v'].sqrt() + eps), 0.)


def plug_in(d, keep=.8, h=0.):
    "v from earlier measurements, negative parts clamped; `h`: the power of v at this batch size that the curvature is proportional to"
    square,noise,signal = moments(d)
    s = n = None
    phi,nu = [],[]
    for t in range(len(square)):
        if t:
            S,G2 = n.clamp_min(0),(s - n/(d['k']*bs0)).clamp_min(0)
            v = [G2 + S/b for b in at_sizes]
            w = [torch.where(x > 0, 1/(x.sqrt() + eps), 0.) for x in v]
            phi.append([float((signal[t]*o).sum()) for o in w])
            nu.append([float((x**(1 + h)*o*o).sum()) for x,o in zip(v, w)])
        s,n = (new[t] if old is None else keep*old + (1 - keep)*new[t] for old,new in ((s, square), (n, noise)))
    return np.array(phi),np.array(nu)


class Standing(Elements):
    "Weights that are right where each element's gradient stays what it was"
    def weights(self, posterior, samples): return super().weights(posterior*ratios, samples)/(posterior @ ratios + 1e-300)[:, None]


def by_element(d, keep=.5, sample=None, cls=Elements):
    "The package's: v from earlier measurements, averaged over what an element's signal-to-noise ratio may be"
    elements = cls(at_sizes, eps, keep)
    idx = torch.randperm(d['m'].shape[1], generator=torch.Generator().manual_seed(1))[:sample]
    N = d['k']*bs0
    found = [elements.add(N*m[idx], N*q[idx], d['k'], N) for m,q in zip(d['m'], d['q'])]
    return tuple(map(np.array, zip(*found[1:])))


def pooled(phi, nu, at):
    "Sums over the training instead of the mean of ratios"
    gain,lr = phi.sum(0)**2/nu.sum(0),phi.sum(0)/nu.sum(0)
    return gain[at]/gain,lr/lr[at]


def one_lr(phi, nu, at, beta=.9):
    "One learning rate for all of a training, best at `at`, where the curvature stays the same"
    def ema(x): return pd.DataFrame(x).ewm(alpha=1 - beta).mean().to_numpy()
    phi,nu = ema(phi), ema(nu)
    phi,nu = (x[(phi > 0).all(1)] for x in (phi, nu))
    p,n = phi[:, at],nu[:, at]
    lo,hi = (p/n).min()/2,2*(p/n).min()*(1 - 1e-9)
    c = brentq(lambda c: ((p - c*n)/(p - c*n/2)).sum(), lo, hi)
    falls,res = p - c*n/2,[]
    for a,b in zip(phi.T, nu.T):
        top = math.log((2*a/(c*b)).min()) - 1e-6
        found = minimize_scalar(lambda x: (falls/(math.exp(x)*a - math.exp(2*x)*c*b/2)).sum(), bounds=(top - 6, top), method='bounded')
        res.append((found.fun, math.exp(found.x)))
    steps,lr = np.array(res).T
    return steps/steps[at],lr/lr[at]


def measured(name, target):
    "Steps and learning rates relative to `bs0`, `nan` where there was no such training: of the grid's best, and interpolated"
    grid = trained()[1].loc[name, target].reindex(sizes)[['lr', 'steps']].astype(float).to_numpy()
    between = np.array([lowest_point(trained()[0], name, target, b) for b in sizes])
    return [o for x in (grid, between) for o in (x/x[at]).T[::-1]]


def judge(cases, curves, average=steps_and_lr, k=10, n_train=10, of=seeds):
    "Mean and largest error of steps and learning rates, a row per case; geometric means over seeds"
    rows = []
    for name,target in cases:
        found = [average(*curves(recorded(name, target, k, n_train, seed)), at) for seed in of]
        steps,lr = (np.exp(np.mean([np.log(f[i]) for f in found], 0)) for i in (0, 1))
        steps = np.maximum(steps, fewest/trained()[1].steps[name, target, bs0])
        true = measured(name, target)
        others = [i for i,m in enumerate(true[0]) if i != at and math.isfinite(m)]
        errors = [off(x[others], m[others]) for x,m in zip((steps, lr)*2, true)]
        rows.append(dict(case=f'{name} {target}') | {q: e for q,e in zip(('steps', 'lr', 'steps, interpolated', 'lr, interpolated'), errors)} |
                    dict(ratio=' '.join(f'{x:.2f}' for x in steps/true[0])))
    return pd.DataFrame(rows).set_index('case')


def coverage(cases, curves, error=model_error):
    "Share of sizes and seeds whose measured ratio is in the interval, by case"
    res,(runs,best) = {},trained()
    for name,target in cases:
        m,hits = measured(name, target)[0],[]
        for seed in seeds:
            phi,nu = curves(recorded(name, target, 10, 10, seed))
            steps,lo,hi = steps_interval(phi, nu, at_sizes, at, best.steps[name, target, bs0], error=error)
            hits += [lo[i] <= m[i] <= hi[i] for i in range(len(sizes)) if i != at and math.isfinite(m[i])]
        res[f'{name} {target}'] = float(np.mean(hits))
    return res


rules = {
    'simple': partial(in_metric, lambda d: 1.), 'fixed metric': partial(in_metric, fixed),
    'plug-in, keep .8': plug_in, 'plug-in, keep .5': partial(plug_in, keep=.5), 'plug-in, h = √v(b)': partial(plug_in, h=.5), 'plug-in, h = v(b)': partial(plug_in, h=1.),
    **{f'by element, keep {keep:g}': partial(by_element, keep=keep) for keep in (0., .2, .35, .5, .65, .8)},
    'by element, gradient stays': partial(by_element, cls=Standing), 'by element, 8,192 of them': partial(by_element, sample=8192),
}


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--truth', action='store_true', help='also from measurements of 180 batches, some 14 in a training')
    args = p.parse_args()
    adam,sgd = ([(name, target) for name,task in tasks.items() if task.opt == opt and name in trained()[0].task.unique() for target in task.targets] for opt in ('adam', 'sgd'))
    def show(label, df):
        def cells(q, i): return ' | '.join(f'{e[i]:.2f}' if isinstance(i, int) else '/'.join(f'{x:.2f}' for x in e) for e in df[q])
        print(f"| {label} | {cells('steps', None)} | {cells('lr', 1)} | {cells('lr, interpolated', 1)} |", flush=True)
    print('Steps, mean/largest; largest error of the lr; of the lr against interpolated ones:', *(f'{n} {t}' for n,t in adam), sep='\n- ')
    for label,curves in rules.items(): show(label, judge(adam, curves))
    for label,average in {'sums over the training': pooled, 'one lr': one_lr, **{f'beta {b:g}': partial(steps_and_lr, beta=b) for b in (0., .5, .95)}}.items():
        show(f'by element, {label}', judge(adam, by_element, average))
    long = [(n, t) for n,t in adam if trained()[1].steps[n, t, bs0] >= 200]
    for k in (4, 20, 40): show(f'by element, k = {k}, long ones', judge(long, by_element, k=k, n_train=k, of=seeds[:1]))
    if args.truth:
        for label in ('fixed metric', 'plug-in, keep .5', 'plug-in, keep .8', 'by element, keep 0.5'):
            rows = [judge([(n, t)], rules[label], partial(steps_and_lr, beta=0.), 180, max(int(trained()[1].steps[n, t, bs0]/15), 4), seeds[:1]) for n,t in adam]
            show(f'{label}, 180 batches', pd.concat(rows))
    for name,target in adam:
        d = recorded(name, target, 10, 10, 0)
        _,noise,signal = moments(d)
        scale = torch.where(noise.mean(0) > 0, noise.mean(0), math.inf)**-.5
        square,product = (signal*scale).sum(1),(d['m'][1:]*d['m'][:-1]*scale).sum(1)
        print(f'{name} {target}: cosine of the gradients of measurements that follow each other', f'{float((product/(square[1:]*square[:-1]).clamp_min(1e-30).sqrt()).median()):.2f}')
    print(judge(adam, by_element).ratio.to_string())
    for error in (1., 1.2, 1.3, model_error, 1.5):
        for label in ('fixed metric', 'by element, keep 0.5'):
            hits = coverage(adam, rules[label], error)
            print(f'| {label}, model error {error} | {np.mean([*hits.values()]):.2f} | ' + ' | '.join(f'{x:.2f}' for x in hits.values()) + ' |', flush=True)
    print('SGD, 1 + B/b:')
    show('simple', judge(sgd, rules['simple'], of=seeds[:1]))
    show('simple, one lr', judge(sgd, rules['simple'], one_lr, of=seeds[:1]))


if __name__ == '__main__': main()
