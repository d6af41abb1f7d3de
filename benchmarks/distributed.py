"NoiseScale in two processes against plain DistributedDataParallel, the time of a step: writes distributed.md"
import contextlib, io, os, subprocess, sys, time
from statistics import median

import pandas as pd, torch

from fastai_bs_finder.processes import broadcast_on_any_device
from fastai_bs_finder.track import NoiseScale
from common import write_page

rounds,per_round = 7,100
compared = 'MNIST, MLP, SGD', 'CIFAR-10 subset, ConvNet, Adam'


def worker():
    import fastai.distributed
    from fastai.basics import Callback, CancelFitException
    from tasks import tasks
    torch.set_num_threads(1)

    class Steps(Callback):
        order = 200
        def before_fit(self): self.n,self.start = 0,None
        def after_batch(self):
            self.n += 1
            if self.n == 10: self.start = time.perf_counter()  # warm
            if self.n == per_round + 10:
                self.seconds = (time.perf_counter() - self.start)/per_round
                raise CancelFitException

    rows = []
    for name in compared:
        ways = {'plain': lambda: [], 'NoiseScale()': lambda: [NoiseScale()], 'NoiseScale(share=None)': lambda: [NoiseScale(share=None)]}
        seconds = {way: [] for way in ways}
        for i in range(rounds):
            for way,cbs in [*ways.items()][::1 if i % 2 else -1]:
                learn,steps = tasks[name].make(64, 0),Steps()
                # on CPUs: fastai's own way to agree on the order of the data moves it to a GPU
                with learn.distrib_ctx(sync_bn=False), broadcast_on_any_device(), contextlib.redirect_stdout(io.StringIO()):
                    learn.fit(100, 1e-3, cbs=[steps, *cbs()])
                seconds[way].append(steps.seconds)
        ratios = {way: [a/b for a,b in zip(s, seconds['plain'])] for way,s in seconds.items() if way != 'plain'}
        rows.append({'task': name, 'plain, ms per step': median(seconds['plain'])*1e3} | {way: median(r) for way,r in ratios.items()} | {f'{way}, quartiles': '{:.2f} to {:.2f}'.format(*pd.Series(r).quantile([.25, .75])) for way,r in ratios.items()})
        if os.environ['RANK'] == '0': print(rows[-1], flush=True)
    if os.environ['RANK'] != '0': return
    df = pd.DataFrame(rows)
    default,all_ = df['NoiseScale()'],df['NoiseScale(share=None)']
    write_page('distributed', 'The noise scale along a training in several processes', f"""Made by `benchmarks/distributed.py`: two processes on one machine, batches of 64 in each, steps of {per_round} batches in {rounds} rounds in turn, relative to plain `DistributedDataParallel`. Wanted is at most 1.05.""",
        [f"A step with `NoiseScale()` takes {' and '.join(f'{r:.2f}' for r in default)} of the time of one without. `share` bounds the time of measuring to 4 % of the training; that fastai asks a callback at all comes on top. Rounds differ by more than that: see the quartiles."],
        [f"`NoiseScale(share=None)`, which measures all the time, takes {' and '.join(f'{r:.2f}' for r in all_)}.",
         *(f"{r.task}: {r['NoiseScale()']:.2f} is more than 1.05." for _,r in df.iterrows() if r['NoiseScale()'] > 1.05)],
        df.to_markdown(index=False, floatfmt='.3g'))


if __name__ == '__main__':
    if 'RANK' in os.environ: worker()
    else: subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node', '2', __file__], check=True, env=os.environ | ({} if torch.cuda.is_available() else {'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1'}))
