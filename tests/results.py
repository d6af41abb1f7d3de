"Results of mock trainings that never were, for the tests of what is made of them"
import pandas as pd

from fastai_bs_finder.result import BSResult
from fastai_bs_finder.suggest import critical, fastest


def result(*rows, opt_rows=None, suggest=(critical, fastest), raw=None, **facts):
    """A `BSResult` with rows of `(noise_scale, lo, hi)`, in which a negative noise scale means a negative scale; `opt_rows` are those of the optimizer's metric,
    `raw` the scales of single measurements; `facts` are fields of its `Run` or `Profile`. The run is as long as any training,
    so that the noise scale of the training to come is the one that was measured"""
    def columns(rows, prefix=''):
        names = [prefix + c for c in 'noise scale noise_scale lo hi raw_noise raw_scale'.split()]
        scales = [float('nan')]*len(rows) if raw is None else raw  # then intervals are those of the rows
        return pd.DataFrame([(10., 10/x, x, lo, hi, 10., s) for (x,lo,hi),s in zip(rows, scales)], columns=names)
    stats = pd.concat([columns(rows), *([columns(opt_rows, 'opt_')] if opt_rows else [])], axis=1)
    for i,(name,step) in enumerate((('batch', 10), ('step', 1), ('samples', 160))): stats.insert(i, name, [step*k for k in range(1, len(rows) + 1)])
    stats.insert(3, 'loss', 1.)
    res = BSResult(stats).changed(**dict(bs=64, n=50_000, lr=.1, num_it=100, spent=10**6) | facts)
    return res.changed(suggested=facts['suggested'] if 'suggested' in facts else {f.__name__: f(res) for f in suggest})
