"NoiseScale in two processes against plain DistributedDataParallel: the time of a step, in turns within one run"
import os, subprocess, sys, time
from statistics import median

import pandas as pd, torch

from fastai_bs_finder.track import NoiseScale
from common import machine

rounds,per_round = 12,100
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

    for name in compared:
        ways = {'plain': lambda: [], 'NoiseScale()': lambda: [NoiseScale()], 'NoiseScale(share=None)': lambda: [NoiseScale(share=None)]}
        seconds = {way: [] for way in ways}
        for i in range(rounds):
            for way,cbs in [*ways.items()][::1 if i % 2 else -1]:
                learn,steps = tasks[name].make(64, 0),Steps()
                with learn.distrib_ctx(sync_bn=False): learn.fit(100, 1e-3, cbs=[steps, *cbs()])
                seconds[way].append(steps.seconds)
        if os.environ['RANK'] == '0':
            ms = {way: median(s)*1e3 for way,s in seconds.items()}
            ratios = {way: median(a/b for a,b in zip(s, seconds['plain'])) for way,s in seconds.items()}
            print(pd.DataFrame({name: {f'{way}, {k}': v[way] for way in ways for k,v in (('ms per step', ms), ('of plain', ratios))}}).to_string(float_format='{:.3g}'.format), flush=True)


if __name__ == '__main__':
    if 'RANK' in os.environ: worker()
    else:
        print(machine())
        subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node', '2', __file__], check=True, env=os.environ | ({} if torch.cuda.is_available() else {'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1'}))
