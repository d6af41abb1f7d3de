"Four ways to measure the noise scale against the truth, from the same number of batches: writes accuracy.md and accuracy.png"
import argparse, math, warnings
from itertools import product

import numpy as np, pandas as pd, torch
from matplotlib.figure import Figure
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from fastai.basics import Adam, Callback, SGD
from fastai.imports import noop

import fastai_bs_finder.finder
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.noise import ema_weights
from common import at_once, here, write_page
from stepping import SteppingFinder

num_it,bs,beta = 400,16,.9
settings = {'SGD .01': (SGD, .01), 'SGD .05': (SGD, .05), 'SGD .1': (SGD, .1), 'SGD .3': (SGD, .3), 'Adam 1e-3': (Adam, 1e-3), 'Adam 3e-3': (Adam, 3e-3), 'Adam 1e-2': (Adam, 1e-2)}
pairs = dict(n_batch=2, n_train=0, beta=beta**(2/20))  # ten times as many measurements, averaged over the same batches
runs = {'bs_find()': dict(n_batch=10, n_train=5), 'pairs': pairs, 'stepping': dict(n_batch=20, n_train=0, finder=SteppingFinder),
        'stepping pairs': pairs | dict(finder=SteppingFinder)}


def per_example(model, X, y):
    "The truth at these weights from the gradient of every example: `(noise, scale)` of the distribution that the examples come from"
    params,n,squares,total = {k: p.detach() for k,p in model.named_parameters()},len(X),0.,0.
    def loss(params, x, t): return cross_entropy(functional_call(model, params, (x[None],)), t[None])
    for x,t in zip(X.split(250), y.split(250)):
        g = [g.flatten(1) for g in vmap(grad(loss), in_dims=(None, 0, 0))(params, x, t).values()]
        squares += sum(torch.linalg.vector_norm(v, dim=1).double().square().sum().item() for v in g)
        total = total + torch.cat([v.sum(0) for v in g]).double()
    G2 = (total/n).square().sum().item()
    noise = (squares/n - G2)*n/(n - 1)
    return noise,G2 - noise/n


def paper(grads):
    "McCandlish et al. 2018, appendix A.1, as printed: `(noise, scale)` from the stored gradients of batches, each small, and all together the big one"
    G,big = torch.stack(grads).double(),bs*len(grads)
    small2,big2 = G.square().sum(1).mean(),G.mean(0).square().sum()
    return ((small2 - big2)/(1/bs - 1/big)).item(),((big*big2 - bs*small2)/(big - bs)).item()


def flat(tensors): return torch.cat([t.detach().flatten() for t in tensors])


class Watch(Callback):
    "Notes the truth, and what gradients stored whole say, of each `n_batch` batches at the same weights; or the truth alone, `every` so many batches"
    order,run_valid = -20,False
    def __init__(self, note, data, n_batch, every=None): self.note,self.data,self.n_batch,self.every = note,data,n_batch,every
    def before_fit(self): self.n,self.weights,self.stored = 0,torch.tensor([]),[]
    def after_backward(self):
        params = list(self.model.parameters())
        self.n += 1
        if not self.every:
            w = flat(params)
            if not torch.equal(w, self.weights): self.stored = []
            self.weights = w
            self.stored.append(flat(p.grad for p in params))
        if self.n % self.every == self.every//2 if self.every else len(self.stored) == self.n_batch:
            noise,scale = per_example(self.model, *self.data)
            stored = paper(self.stored) if self.stored else (math.nan, math.nan)
            self.note(dict(batch=self.n, noise=noise, scale=scale, stored_noise=stored[0], stored_scale=stored[1]))


def found(way, opt_func, lr, seed, truths=None):
    "A run's answers, a row each; the truths of its trajectory, to be used again by a run that takes the same one; the largest relative difference to stored gradients"
    kwargs = dict(beta=beta) | runs[way]
    learn,notes = digits_learner(bs, seed, opt_func=opt_func),[]
    learn.logger = noop
    learn.dls.train.drop_last = True  # the paper's equations are for equal batches
    if truths is None: learn.add_cb(Watch(notes.append, [*map(torch.stack, zip(*learn.dls.train_ds))], kwargs['n_batch'], None if way == 'bs_find()' else 20))
    with learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # stepping warns
        learn.bs_find(lr, num_it, show_plot=False, profile=False, **kwargs)
    stats,truths = learn.recorder.bs_stats,pd.DataFrame(notes) if truths is None else truths
    at,w = stats.batch - (way != 'bs_find()')*kwargs['n_batch']/2,ema_weights(len(stats), kwargs['beta'])
    def mean(q): return w @ np.interp(at, truths.batch, truths[q])
    end = truths.iloc[-1]
    row = dict(seed=seed, loss=stats.loss.iloc[-1], truth=mean('noise')/mean('scale'), end=end.noise/end.scale)
    rows = [row | dict(way=way) | stats[['noise_scale', 'lo', 'hi']].iloc[-1].to_dict()]
    if way != 'bs_find()': return rows,truths,0.
    differ = max((truths[f'stored_{q}']/stats[f'raw_{q}'] - 1).abs().max() for q in ('noise', 'scale'))
    return rows + [row | dict(way='stored gradients', noise_scale=mean('stored_noise')/mean('stored_scale'), lo=math.nan, hi=math.nan)],truths,differ


def answers(setting, seed):
    "Every way's answers at a learning rate, and the largest relative difference to stored gradients"
    rows,truths,differ = [],{},0.
    for way in runs:
        kind = 'stepping' if 'stepping' in way else way  # both go the same way
        more,truths[kind],d = found(way, *settings[setting], seed, truths.get(kind))
        rows += [dict(setting=setting) | r for r in more]
        differ = max(differ, d)
    print(setting, seed, flush=True)
    return rows,differ


def errors(d):
    "What a way's runs miss the truth by, as factors, and how often its interval is right"
    log = np.log((d.noise_scale/d.truth).where(d.noise_scale > 0))
    there = d.lo.notna()
    return pd.Series(dict(error=math.exp(math.sqrt((log**2).mean())), bias=math.exp(log.mean()), negative=(d.noise_scale <= 0).mean(),
                          covered=((d.lo <= d.truth) & (d.truth <= d.hi))[there].mean(), no_interval=1 - there.mean(), no_upper_end=(d.hi == math.inf).mean(),
                          end=math.exp(math.sqrt((np.log((d.noise_scale/d.end).where(d.noise_scale > 0))**2).mean()))))


def picture(df, ways):
    "Each run's answer, as a multiple of the truth; what is negative at the bottom"
    fig,low,high = Figure(figsize=(9, 3.6), layout='constrained'),.2,30
    ax = fig.subplots()
    for i,(way,c) in enumerate(zip(ways, ('C0', 'C2', 'C3', 'C1'))):
        d = df[df.way == way]
        x = d.setting.map(list(settings).index) + .19*(i - 1.5) + .012*(d.seed - d.seed.mean())
        r = d.noise_scale/d.truth
        ax.plot(x, r.clip(upper=high).where(r > 0), '.', ms=5, c=c, label=way)
        ax.plot(x[r <= 0], np.full((r <= 0).sum(), low*1.1), 'v', ms=4, c=c)
    ax.axhline(1, c='k', lw=1)
    ax.set(yscale='log', ylim=(low, high*1.2), ylabel='Answer, of the truth', xticks=range(len(settings)), xticklabels=settings)
    ax.yaxis.set_major_formatter('{x:g}×')
    ax.legend(fontsize='small', loc='upper left')
    fig.savefig(here/'accuracy.png', dpi=90)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, default=4, help='runs per setting and way')
    args = p.parse_args()
    res = at_once(answers, product(settings, range(args.seeds)))
    df,differ = pd.DataFrame([r for rows,_ in res for r in rows]),max(d for _,d in res)
    picture(df, list(runs))
    def by(*keys): return df.groupby([*keys], sort=False)[['noise_scale', 'truth', 'end', 'lo', 'hi']].apply(errors)
    ways,per,all_ = ['bs_find()', 'stored gradients', *list(runs)[1:]],by('setting', 'way'),by('way')
    def grid(q, text): return per[q].unstack().reindex(index=list(settings), columns=ways).map(lambda v: '' if math.isnan(v) else text(v)).to_markdown(disable_numparse=True)
    def factor(v): return f'{v:.2f}' if v < 10 else f'{v:.0f}'
    medians = df.groupby(['setting', 'way'], sort=False)[['truth', 'noise_scale', 'loss']].median().unstack()
    first = pd.DataFrame({'loss, bs_find()': medians.loss['bs_find()'].map('{:.2f}'.format), 'loss, stepping': medians.loss['stepping'].map('{:.2f}'.format)} |
                         {f'{w}: truth, answer': [f'{medians.truth[w][s]:.0f}, {medians.noise_scale[w][s]:.0f}' for s in medians.index] for w in runs})
    e = per.unstack()
    worse = [s for s in settings if e.error['stepping'][s] < e.error['bs_find()'][s] and not e.negative['stepping'][s]]
    stepping = all_.loc['stepping']
    summary = all_.loc[ways].assign(worst=per.error.unstack().max()).rename(columns=dict(no_interval='no interval', no_upper_end='no upper end', end='error, truth at the end'))
    for q in ('negative', 'covered', 'no interval', 'no upper end'): summary[q] = summary[q].map('{:.0%}'.format).where(summary[q].notna(), '')
    summary.loc['stored gradients', ['covered', 'no interval', 'no upper end']] = ''
    summary = summary[['error', 'worst', 'bias', 'negative', 'covered', 'no interval', 'no upper end', 'error, truth at the end']]
    by_way = '; '.join('off by {:.2f}, `bs_find()` by {:.2f}'.format(e.error['stepping'][s], e.error['bs_find()'][s]) for s in worse)
    loses = f"{', '.join(worse)} ({by_way})" if worse else ''
    bf,of_bf = per.error.unstack()['bs_find()'],df[df.way == 'bs_find()']
    worst_run = np.exp(np.abs(np.log(of_bf.noise_scale/of_bf.truth)).max())
    write_page('accuracy', 'How near to the truth', f"""Made by `benchmarks/accuracy.py` from scikit-learn's digits: a 64-64-10 network, batches of {bs}, {num_it} batch gradients for every way, {args.seeds} seeds for each of {len(settings)} learning rates.

The noise scale is the variance of the gradient over its squared norm, *at given weights*. For a network this small the truth can be computed from the gradient of every single example. Compared with it are

- **`bs_find()`** as it is: 10 batches at the same weights, one step, 5 ordinary steps, and again;
- **stored gradients**, the equations of the [paper](https://arxiv.org/abs/1812.06162) (appendix A.1) as printed: the same batches, but each gradient is stored;
- **pairs**: 2 batches at the same weights, one step, and again: `bs_find(n_batch=2, n_train=0)`;
- **stepping**: 20 consecutive batches, each of which steps the optimizer. The article's finder does this, \
and `benchmarks/stepping.py` does it for comparison. It is kinder than that one, which takes the last of the gradients for the small batch; \
this takes the mean over all of them;
- **stepping pairs**: the same with 2 consecutive batches, `n_batch=2`.

Each answer is the average at the end of a run. Measurements of pairs are ten times as many, and their averages run over as many batches of the training (`beta`). The truth is taken along each way's own training where it measures, and averaged with the same weights. For `bs_find()` that is at the very weights of each measurement, for the others every 20 batches.""",
        [f"`bs_find()` is off by a factor of {all_.error['bs_find()']:.2f} (root mean square over {len(of_bf)} runs), {bf.max():.2f} at its worst learning rate ({bf.idxmax()}), {worst_run:.2f} in its worst run. Its 95 % interval covers the truth in {all_.covered['bs_find()']:.0%} of the runs.",
         f"Stored gradients are the same thing, written down differently: the largest relative difference in the noise or the scale of any single measurement was {differ:.0e}, which is rounding. What differs is [the memory](scaling.md).",
         f"Stepping, as in the article, is off by a factor of {stepping.error:.1f} where its answer is positive, and its answer is negative in {stepping.negative:.0%} of the runs. Its interval does not show this error: it covers the truth in {stepping.covered:.0%} of the runs that have an interval.",
         f"Pairs at the same weights: {all_.error['pairs']:.2f} against {all_.error['bs_find()']:.2f} for `bs_find()`. From k batches come k(k − 1)/2 products of two gradients: 1 from a pair, 45 from 10 batches."],
        [loses and f"Stepping is nearer to the truth at {loses}. There the weights hardly move, and it spends every batch on measuring.",
         f"Measuring takes steps away. In {num_it} batches `bs_find()` takes two fifths of the steps of a training, and gets less far. Its answer holds for its own mock training.",
         f"An average lags. The noise scale grows while it is measured. Against the truth at the very end, `bs_find()` is off by {all_.end['bs_find()']:.2f} rather than {all_.error['bs_find()']:.2f}."],
        f"""## All learning rates together

 `error` is a factor: 1.2 means off by 20 %, up or down, as a root mean square of the logarithm; `worst` is that of the worst learning rate. `bias` is the geometric mean of answer over truth. Both leave out the answers that are negative, which are counted apart. `covered` is how often the 95 % interval contains the truth, among
the runs that have one.

{summary.to_markdown(floatfmt='.2f')}

![Answers as multiples of the truth](accuracy.png)

A point is a run, a triangle at the bottom a negative answer. What is above {30} is drawn there.
## Truth and answer

Medians over the seeds, in examples; the loss is that of the last measurement.

{first.to_markdown(disable_numparse=True)}

## Error, as a factor

{grid('error', factor)}

## Bias, as a factor

{grid('bias', factor)}

## Negative answers

{grid('negative', '{:.0%}'.format)}

## Coverage of the 95 % interval

Among the runs that have an interval.

{grid('covered', '{:.0%}'.format)}
""")


if __name__ == '__main__': main()
