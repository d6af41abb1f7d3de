"Time of bs_find relative to a plain fit of as many batches: an MLP of 7.9 million parameters, batch size 64, Adam"
import argparse, time
from statistics import median

from common import machine, mlp_learner
import fastai_bs_finder.finder

p = argparse.ArgumentParser(description=__doc__)
p.add_argument('--num-it', type=int, default=60, help='batches per run')
p.add_argument('--repeats', type=int, default=9, help='rounds in which every variant runs once')
args = p.parse_args()

learn = mlp_learner(args.num_it)
variants = {'fit': lambda: learn.fit(1, 1e-3),
            'bs_find(n_train=0)': lambda: learn.bs_find(1e-3, n_train=0, show_plot=False),
            'bs_find()': lambda: learn.bs_find(1e-3, show_plot=False)}
bounds = {'bs_find(n_train=0)': .75, 'bs_find()': 1.05}


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


for f in variants.values(): f()
rounds = [{k: seconds(f) for k,f in variants.items()} for _ in range(args.repeats)]
print(machine())
print(f'{args.num_it} batches, {args.repeats} rounds; a plain fit takes {median(r["fit"] for r in rounds):.2f} s')
for k,bound in bounds.items():
    ratios = sorted(r[k]/r['fit'] for r in rounds)
    print(f'{k:20} {median(ratios):.2f} of the time of fit (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f}; wanted: at most {bound})')
