"Does the interval keep what it promises where its own result ends the measuring? Writes stopping.md"
import argparse, math
from functools import cache

import numpy as np, pandas as pd, torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import avg_pool2d, cross_entropy
from sklearn.datasets import load_digits
from fastai.basics import URLs

import fastai_bs_finder.finder
from fastai_bs_finder.finder import default_n_batch, least_measurements, why_enough
from fastai_bs_finder.noise import NoiseAverage, noise_and_scale
from fastai_bs_finder.result import BSResult, Profile, Run
from common import at_once, write_page
from images import images

bs,most = 64,60
places = {'start': .02, 'halfway': .5, 'end': 1.}  # part of a training after which the weights stand still
machines = {'1,000': 1000, '256': 256, '32': 32}  # batch size of half throughput


@cache
def data(name):
    "Examples, classes, widths of a network, and steps of a training"
    if name == 'digits':
        x,y = map(torch.tensor, load_digits(return_X_y=True))
        return (x/16).float(),y,(64, 64, 10),300
    ds = images(URLs.MNIST, 'training')
    return avg_pool2d(ds.x, 2).flatten(1),ds.y,(196, 16, 10),1800


def gradients(name, part):
    "The gradients of all examples, at the weights after that part of a training"
    torch.manual_seed(0)
    x,y,(a,b,c),steps = data(name)
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))
    opt = torch.optim.SGD(model.parameters(), .1)
    for _ in range(int(part*steps)):
        idx = torch.randint(len(x), (bs,))
        cross_entropy(model(x[idx]), y[idx]).backward()
        opt.step()
        opt.zero_grad()
    params = {n: p.detach() for n,p in model.named_parameters()}
    def loss(params, x, t): return cross_entropy(functional_call(model, params, (x[None],)), t[None])
    g = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=1000)(params, x, y)
    return torch.cat([v.flatten(1) for v in g.values()], 1)


def one_run(G, profile, rng, anew):
    "Measure until it is enough, with each example once in an epoch, or drawn `anew`: the result, and why it ended"
    n,k = len(G),default_n_batch(len(G)//bs, 3, 2)
    average,rows,order,at = NoiseAverage(),[],[],math.inf
    for m in range(most):
        if at + k*bs > n: order,at = rng.integers(n, size=n) if anew else rng.permutation(n),0  # an epoch
        g = torch.stack([G[order[at + i*bs:at + (i + 1)*bs]].mean(0) for i in range(k)])
        at += k*bs
        average.append(noise_and_scale(float(bs*g.square().sum()), float(bs*k*g.mean(0).square().sum()), bs*k, k))
        rows.append(dict(batch=m, step=m, samples=m, loss=1.) | average.columns())
        if m + 1 < least_measurements: continue
        result = BSResult(pd.DataFrame(rows), Run(bs=bs, n=n, lr=.1, spent=round(1.5*k)*(m + 1)), profile)
        if why := why_enough(result, n//bs): break
    return result,why


def runs(name, place, n_run, anew=False):
    "Measurements at a place of a training, on each machine, against the truth from all examples"
    torch.set_num_threads(1)
    G,rows = gradients(name, places[place]),[]
    n,g2 = len(G),G.double().mean(0).square().sum().item()
    noise = G.square().sum(1).double().sum().item()/n - g2
    if not anew: noise,g2 = noise*n/(n - 1),g2 - noise/(n - 1)  # of what the examples are drawn from
    truth = noise/g2
    for machine,half in machines.items():
        profile = Profile({b: 1e-3*(1 + b/half) for b in (16, 64, 256, 1024)})
        for seed in range(n_run):
            result,why = one_run(G, profile, np.random.default_rng(seed), anew)
            lo,hi = result.mean_noise_scale[1:] if result.mean_noise_scale else (math.nan, math.nan)
            last = result.in_use.iloc[-1]
            rows.append(dict(data=f"{name}, drawn anew" if anew else name, place=place, machine=machine, truth=truth, measurements=len(result), clear=why == 'clear', shown=last.lo <= truth <= last.hi, used=lo <= truth <= hi))
    print(name, place, flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--runs', type=int, default=200, help='how many at each place')
    n_run = p.parse_args().runs
    df = pd.DataFrame(sum(at_once(runs, [(name, place, n_run, anew) for name,anew in (('digits', False), ('MNIST', False), ('digits', True)) for place in places]), []))
    by = df.groupby(['data', 'place', 'machine'], sort=False).agg(truth=('truth', 'first'), measurements=('measurements', 'mean'), clear=('clear', 'mean'), shown=('shown', 'mean'), used=('used', 'mean')).reset_index()
    at = df.groupby(['data', 'place'], sort=False)[['shown', 'used']].mean()
    below,above = at[at.min(axis=1) < .93],at[at.max(axis=1) > .97]
    anew = at.index.get_level_values(0).str.endswith('anew')
    def named(at): return ', '.join(f'{d}, {place}' for d,place in at.index)
    write_page('stopping', 'The interval at the stopping time', f"Made by `benchmarks/stopping.py`, {n_run} runs for each row. The weights stand still at three places of a training, so that there is one truth, from the gradients of all examples; "
        "measurements are taken as by default, and end by the same rule; an epoch has each example once, or, where they are 'drawn anew', any of them at any time. Step times are those of three machines, with half throughput at a batch size of 1,000, 256 and 32.",
        [f"The interval that is shown covers the truth in {df.shown.mean():.1%} of the runs, {at.shown.min():.1%} to {at.shown.max():.1%} by place in the training; the interval that decides the choice, in {df.used.mean():.1%} ({at.used.min():.1%} to {at.used.max():.1%}). Both promise 95 %.",
         f"Six measurements were enough in {(df.measurements == least_measurements).mean():.0%} of the runs; {df.clear.mean():.0%} ended with a clear choice, the others because more would have cost more than it could save."],
        [len(below) and f"Less than 93 %: {named(below)}.",
         len(above) and f"The interval covers the truth in more than 97 % of the runs, so it is wider than it need be, in {len(above)} of {len(at)} places: {named(above)}. Six measurements of a small data set use nearly all of its examples, each once, so their mean scatters less than independent ones would. Drawn anew, the same examples give {at.shown[anew].min():.1%} to {at.shown[anew].max():.1%}.",
         "Weights that move: an interval is one for the average over the measurements, and the noise scale grows along a training."],
        by.to_markdown(index=False, floatfmt=('', '', '', '.0f', '.1f', '.2f', '.3f', '.3f')))


if __name__ == '__main__': main()
