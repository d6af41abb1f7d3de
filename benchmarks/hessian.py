"""The paper's full noise scale, before it takes all curvatures to be alike: tr(HΣ)/(GᵀHG), with the Hessian H

It is eq. 2.8 of McCandlish et al. 2018.

One Hessian-vector product per batch gives both parts. With uⱼ = Hⱼ·gⱼ₋₁, the Hessian of one batch times the gradient of the batch before,
all at the same weights,

    E[gⱼ₋₁·uⱼ] = GᵀHG + tr(HΣ)/b,    E[gᵢ·uⱼ] = GᵀHG  (i < j − 1).

The three factors of each product come from different batches, so nothing is biased, and the running sum of the gradients serves as gᵢ.
It takes a second derivative of the loss, and some three times the time of a backward pass.
"""
import math, numpy as np, torch

from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
from fastai_bs_finder.batches import n_examples
from fastai_bs_finder.finder import BSFinder
from fastai_bs_finder.noise import GradSums, Noise, NoiseAverage


def dot(a, b): return torch.stack([(x*y).sum() for x,y in zip(a, b) if x is not None and y is not None]).sum()


class HessianSums:
    "The running sums of one measurement in the metric of the loss's Hessian"
    def __init__(self): self.before,self.own,self.other,self.sizes,self.samples = None,[],[],[],0

    def add(self,
        loss:torch.Tensor, # Mean loss of a batch, before its backward pass; its graph is kept
        params:list, # The parameters, all at the weights of the batches before
        sums:GradSums, # The running sums of the batches before
    ):
        "Multiply this batch's Hessian with the gradient of the batch before. Raises `RuntimeError` where there is no second derivative"
        if self.before is None: return
        g0,bs = self.before
        there = [p for p,g in zip(params, g0) if g is not None and p.requires_grad]
        grads = torch.autograd.grad(loss, there, create_graph=True, allow_unused=True)
        slope = dot(grads, [g for p,g in zip(params, g0) if g is not None and p.requires_grad])
        hv = dict(zip(map(id, there), torch.autograd.grad(slope, there, retain_graph=True, allow_unused=True)))
        hv = [hv.get(id(p)) for p in params]
        own = dot(g0, hv)
        self.own.append(own)
        self.sizes.append(bs)
        if sums.k > 1:
            self.other.append(dot(sums.totals, hv) - bs*own)
            self.samples += sums.samples - bs

    def keep(self,
        grads:list, # Gradients of the batch; not copied, so they must not change
        bs:int, # Number of examples in it
    ):
        "Remember the gradient of a batch for the next one"
        self.before = [g if g is None else g.detach() for g in grads],bs

    def noise_and_scale(self) -> Noise: # Unbiased estimates of tr(HΣ) and GᵀHG; nan with fewer than 3 batches
        "Complete the measurement"
        if not self.other: return Noise(math.nan, math.nan)
        scale = float(sum(self.other)/self.samples)
        return Noise(float(np.mean([b*(float(o) - scale) for b,o in zip(self.sizes, self.own)])), scale)


class HessianFinder(BSFinder):
    "Measures the full noise scale too, columns `full_*` of `learn.recorder.bs_stats`: `learn.bs_find(finder=HessianFinder)`"
    def before_fit(self):
        if any(isinstance(o, (MixedPrecision, NonNativeMixedPrecision)) for o in self.learn.cbs):
            raise ValueError("The full noise scale needs full precision: remove mixed precision for it, learn.to_fp32(), "
                             "or call bs_find without HessianFinder")
        super().before_fit()
        self.average = NoiseAverage(self.beta)

    def begin(self):
        super().begin()
        self.hessian_sums = HessianSums()

    def before_backward(self):
        if not self.meter.n_batch: return  # nothing is measured, or nothing before this batch
        try: self.hessian_sums.add(self.learn.loss_grad, self.meter.params, self.meter.sums)
        except RuntimeError as e:
            self.error = ValueError(f"The full noise scale needs second derivatives of the loss, and one is missing: {e}. "
                                    "Call bs_find without HessianFinder")
            self.stop((self.spent + 1, ''))

    def stand_still(self):
        self.hessian_sums.keep([p.grad for p in self.meter.params], n_examples(self.learn))
        super().stand_still()

    def columns(self):
        self.average.append(Noise(*(np.mean(self.processes.gather(x)) for x in self.hessian_sums.noise_and_scale())))
        return super().columns() | self.average.columns('full_')
