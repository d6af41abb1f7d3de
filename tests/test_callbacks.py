"Callbacks and optimizers that a learner may carry: the number is that of the stored gradients, loggers see nothing, and nobody can tell that bs_find ran"
from collections import deque
from functools import partial

import pytest, torch, wandb
from torch import nn
from fastai.basics import (Adam, Callback, CancelBatchException, CancelFitException, CancelStepException, CrossEntropyLossFlat, Learner, OptimWrapper, SGD,
                           accuracy, set_seed)
from fastai.callback.all import (ActivationStats, BnFreeze, ChannelsLast, CollectDataCallback, CSVLogger, CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixedPrecision,
                                 MixUp, NonNativeMixedPrecision, ModelToHalf, ParamScheduler, ReduceLROnPlateau, SaveModelCallback, SchedCos, ShortEpochCallback, ShowGraphCallback,
                                 TerminateOnNaNCallback)
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.wandb import WandbCallback
from fastai.optimizer import Lamb, Larc, Lookahead, QHAdam, RAdam, RMSProp, ranger

from fastai_bs_finder.all import *
from footprint import assert_no_footprint
from learners import digits, language_model, loaders, tabular
from test_applications import Store, find
from reference import paper_estimate


def convnet(path, **kwargs):
    "Batch-norm, dropout and real digits as images; callbacks write to `path`"
    X,y = digits()
    dls = loaders([(x.view(1, 8, 8), t) for x,t in zip(X[:400], y[:400])], 60)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(.2), nn.Linear(288, 10))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path, **kwargs)


class OnCPU(MixedPrecision):
    "Mixed precision for real, on the CPU: fastai's asks for CUDA, and does nothing where there is none"
    def before_fit(self):
        super().before_fit()
        self.kwargs['enabled'] = self.amp_mode.value == 'fp16'
        self.autocast,self.learn.scaler = torch.autocast('cpu', dtype=getattr(torch, dict(fp16='float16', bf16='bfloat16')[self.amp_mode.value])),torch.amp.GradScaler('cpu', **self.kwargs)


class Half(NonNativeMixedPrecision):
    "fastai's older fp16 training, whose first line refuses the CPU"
    def before_fit(self):
        self.learn.dls.device = type('Device', (str,), dict(type='cuda'))('cpu')
        super().before_fit()
        self.learn.dls.device = torch.device('cpu')


class Overflow(Callback):
    "The gradients of the seventh batch overflow"
    order = -30
    def after_backward(self):
        if self.train_iter == 6: next(self.model.parameters()).grad.fill_(float('inf'))


class Own(Callback):
    "A user's callback that cancels a batch and a step, and ends the training"
    order = -30
    def before_batch(self):
        if self.train_iter == 5: raise CancelBatchException
    def before_step(self):
        if self.train_iter == 7: raise CancelStepException
    def after_batch(self):
        if self.train_iter >= 22: raise CancelFitException


def wandb_run(path):
    wandb.init(mode='offline', dir=path)
    return WandbCallback(log_preds=False, log_model=False)


callbacks = {
    'MixedPrecision, fp16 with loss scaling': lambda path: OnCPU(),
    'MixedPrecision, fp16 with an overflow': lambda path: [OnCPU(), Overflow()],
    'MixedPrecision, bf16': lambda path: OnCPU('bf16'),
    'NonNativeMixedPrecision': lambda path: [ModelToHalf(), Half(max_loss_scale=2.**8)],
    'GradientAccumulation': lambda path: GradientAccumulation(32),
    'GradientClip': lambda path: GradientClip(.01),
    'MixUp': lambda path: MixUp(),
    'CutMix': lambda path: CutMix(),
    'SaveModelCallback': lambda path: SaveModelCallback(every_epoch=True),
    'EarlyStoppingCallback': lambda path: EarlyStoppingCallback(patience=1),
    'ReduceLROnPlateau': lambda path: ReduceLROnPlateau(),
    'CSVLogger': lambda path: CSVLogger(),
    'TensorBoardCallback': lambda path: TensorBoardCallback(path/'runs', trace_model=False, log_preds=False),
    'ShowGraphCallback': lambda path: ShowGraphCallback(),
    'BnFreeze': lambda path: BnFreeze(),
    'ChannelsLast': lambda path: ChannelsLast(),
    'ParamScheduler': lambda path: ParamScheduler(dict(lr=SchedCos(1e-2, 1e-4), mom=SchedCos(.9, .8))),
    'ActivationStats': lambda path: ActivationStats(with_hist=True),
    'CollectDataCallback': lambda path: CollectDataCallback(),
    'ShortEpochCallback': lambda path: ShortEpochCallback(pct=.9),
    'TerminateOnNaNCallback': lambda path: TerminateOnNaNCallback(),
    "a user's own, which cancels batches, steps and the fit": lambda path: Own(),
}
optimizers = {
    'SGD': SGD,
    'SGD, momentum': partial(SGD, mom=.9),
    'Adam': Adam,
    'RAdam': RAdam,
    'RMSProp': RMSProp,
    'QHAdam': QHAdam,
    'Larc': Larc,
    'Lamb': Lamb,
    'Lookahead': lambda params, lr: Lookahead(SGD(params, lr)),
    'ranger': ranger,
    'OptimWrapper, AdamW': partial(OptimWrapper, opt=torch.optim.AdamW),
    'OptimWrapper, SGD': partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, nesterov=True)),
    'OptimWrapper, Adagrad': partial(OptimWrapper, opt=torch.optim.Adagrad),
}
with_wandb = 'WandbCallback'
rnn = 'ModelResetter, RNNCallback, RNNRegularizer'   # carried by every AWD_LSTM learner


def learner(kind, name, path, fastai_data):
    "A function that makes the learner with that callback or optimizer, from the same seed each time"
    data = fastai_data(dict([(rnn, 'imdb_sample'), (with_wandb, 'adult_sample')])[name]) if name in (rnn, with_wandb) else None
    def make():
        set_seed(1)
        if name == rnn: return language_model(data)
        if name == with_wandb: return tabular(data).add_cb(wandb_run(path))
        return convnet(path, cbs=callbacks[name](path)) if kind == 'callback' else convnet(path, opt_func=optimizers[name])
    return make


rows = [('callback', name) for name in (*callbacks, with_wandb, rnn)] + [('optimizer', name) for name in optimizers]


@pytest.fixture(autouse=True)
def plain_half():
    "Half precision without oneDNN, which stops with an illegal instruction on some processors"
    with torch.backends.mkldnn.flags(enabled=False): yield


@pytest.fixture(autouse=True)
def quiet_wandb(offline_wandb): pass


class StoreScaled(Store):
    "Keeps the gradients as they are without loss scaling"
    def after_backward(self):
        scale = self.scaler.get_scale() if isinstance(getattr(self.learn, 'scaler', None), torch.amp.GradScaler) else getattr(getattr(self.learn, 'half', None), 'loss_scale', 1.)
        grads = [p.grad.flatten().double()/scale for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        self.keep((len(self.yb[0]), torch.cat(grads)))


@pytest.mark.parametrize('kind,name', rows)
def test_works(kind, name, tmp_path, fastai_data, record_property):
    record_property('works with', (kind, name, 'works'))
    learn,last = learner(kind, name, tmp_path, fastai_data)(),deque(maxlen=4)
    learn.add_cb(StoreScaled(last))
    def written(): return [f for f in tmp_path.rglob('*') if 'wandb' not in f.parts] + [wandb.run and wandb.run.step]
    files = written()
    find(learn, 1e-2, profile=False)
    stats = learn.recorder.bs_stats
    assert len(stats) == 3 or name == 'MixedPrecision, fp16 with an overflow'
    b,grads = zip(*last)
    assert stats[['raw_noise', 'raw_scale']].iloc[-1].tolist() == pytest.approx(paper_estimate(list(grads), b[0]), rel=1e-3)
    assert written() == files


@pytest.mark.parametrize('kind,name', rows)
def test_footprint_free(kind, name, tmp_path, fastai_data, record_property):
    record_property('works with', (kind, name, 'footprint-free'))
    assert_no_footprint(learner(kind, name, tmp_path, fastai_data), partial(find, lr=1e-2), lambda learn: learn.fit(2, 1e-2))
