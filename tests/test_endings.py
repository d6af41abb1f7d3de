"However a run ends, in whatever learner, nothing remains of it: no change, and no worker process"
import math, multiprocessing

import pytest, torch
from fastai.basics import Callback, CancelFitException

import fastai_bs_finder.all
from footprint import changes, forget, same, state, trained
from learners import maker
from tiers import each_pair, in_tiers

kinds = {'tabular': 'tabular: TabularDataLoaders, embeddings', 'image': 'vision: unet_learner, segmentation', 'text': 'text: language_model_learner',
         'loaders of PyTorch': 'plain PyTorch: model and loaders'}
first,middle,last = 0,9,19
measured = {first: [], middle: [4], last: [4, 12]}  # the batches at which measurements of 4 end, of those before this one


def mocking(learn): return hasattr(learn, 'lr_finder')


class At(Callback):
    "Call `f` in `event` of batch number `at` of a mock training"
    order = 5
    def __init__(self, event, at, f):
        def call():
            if mocking(self.learn) and self.train_iter == at: f(self.learn)
        setattr(self, event, call)


def throw(error):
    def f(*args): raise error
    return f


class Collate:
    "A collate function that fails at its call number `at` in a mock training, counted in an attribute of its own"
    def __init__(self, f, at, learn): self.f,self.at,self.learn,self.calls = f,at,learn,0
    def __call__(self, *args):
        self.calls += 1
        if mocking(self.learn) and self.calls == self.at + 1: raise OSError('unreadable')
        return self.f(*args)


def in_model(learn, at, error=ValueError('broken model')):
    def hook(*args):
        if mocking(learn) and learn.train_iter == at: raise error
    learn.model.register_forward_pre_hook(hook)

def out_of_memory(learn, at): in_model(learn, at, torch.OutOfMemoryError('no memory left'))
def in_callback(learn, at): learn.add_cb(At('after_pred', at, throw(ValueError('broken callback'))))
def interrupt(learn, at): learn.add_cb(At('before_batch', at, throw(KeyboardInterrupt())))
def interrupt_late(learn, at): learn.add_cb(At('after_loss', at, throw(KeyboardInterrupt())))
def cancel(learn, at): learn.add_cb(At('after_loss', at, throw(CancelFitException())))
def no_number(learn, at): learn.add_cb(At('after_loss', at, lambda l: setattr(l, 'loss', l.loss*math.nan) or setattr(l, 'loss_grad', l.loss_grad*math.nan)))

def in_loader(learn, at):
    dl = learn.dls.train
    name = 'collate_fn' if isinstance(dl, torch.utils.data.DataLoader) else 'create_batch'
    object.__setattr__(dl, name, Collate(getattr(dl, name), at, learn))

def in_worker(learn, at):
    dl = learn.dls.train
    if isinstance(dl, torch.utils.data.DataLoader): dl.num_workers,dl.prefetch_factor = 1,2
    else: dl.fake_l.num_workers = 1
    in_loader(learn, at)


errors = {in_model: ValueError, out_of_memory: torch.OutOfMemoryError, in_callback: ValueError, interrupt: KeyboardInterrupt, interrupt_late: KeyboardInterrupt, in_loader: OSError, in_worker: OSError, cancel: None, no_number: None}
endings = {break_it.__name__: (break_it, error) for break_it,error in errors.items()}

_untouched = {}

def untouched(make, lr, kind, in_workers):
    "What a training leaves behind on a learner that never saw `bs_find`: of each kind one is trained, and one that loads in workers"
    if (kind, in_workers) not in _untouched:
        learn = make()
        if in_workers: in_worker(learn, first)
        learn.fit(1, lr)
        _untouched[kind, in_workers] = trained(learn)
    return _untouched[kind, in_workers]


@pytest.mark.parametrize('ending,kind,at', in_tiers(each_pair, list(endings), list(kinds), list(measured)))
def test_nothing_remains(ending, kind, at, fastai_data):
    (make,lr),(break_it,error) = maker(kinds[kind], fastai_data),endings[ending]
    def find(learn): return learn.bs_find(lr, 20, 4, show_plot=False)
    learn = make()
    break_it(learn, at)
    was,processes = state(learn),multiprocessing.active_children()
    if error:
        with pytest.raises(error): find(learn)
    else:
        found = find(learn)
        assert learn.recorder.bs_stats.batch.tolist() == measured[at]
        if at == first: assert found == (None, None)
    assert not set(multiprocessing.active_children()) - set(processes)  # others may have ended meanwhile
    forget(learn)
    assert changes(was, state(learn)) == []
    learn.fit(1, lr)
    assert same(trained(learn), untouched(make, lr, kind, break_it is in_worker))
