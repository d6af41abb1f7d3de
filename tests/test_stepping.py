"The article's estimator in benchmarks/stepping.py: what it is compared for is what it does"
import sys, warnings
from pathlib import Path

import pytest, torch
from fastai.basics import Callback
from fastai_bs_finder.demo import digits_learner
from processes import run_processes

sys.path.append(str(Path(__file__).parents[1]/'benchmarks'))
from stepping import bs_find_stepping


class Spy(Callback):
    "Notes in `log` the weights after each batch, and counts the steps in `steps`; lists of the caller's, which no snapshot sees"
    order = -20   # before the finder, which ends the run after its last batch
    def __init__(self, log, steps): self.log,self.step = log.append,steps.append
    def after_batch(self): self.log([p.detach().clone() for p in self.model.parameters()])
    def after_step(self): self.step(self.train_iter)


def spied(run):
    "The weights after each batch, the steps, and the learner"
    learn,log,steps = digits_learner(),[],[]
    learn.add_cb(Spy(log, steps))
    with learn.no_bar(), learn.no_logging(): run(learn)
    return log,steps,learn


def test_every_batch_steps_only_on_request():
    with pytest.warns(UserWarning, match='for comparison only.*biases the scale') as warned:
        _,steps,learn = spied(lambda learn: bs_find_stepping(learn, .1, 60, show_plot=False, profile=False))
    assert warned[0].filename == __file__
    assert list(learn.recorder.bs_stats.batch) == [10, 20, 30, 40, 50, 60] and len(steps) == 60
    assert learn.recorder.bs_result.run.biased and learn.recorder.bs_result.run.n_train == 0
    assert 'Stay with bs=16: this noise scale is biased, since the optimizer stepped after every batch: for comparison only.' in str(learn.recorder.bs_result)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        _,steps,learn = spied(lambda learn: learn.bs_find(.1, 60, show_plot=False, profile=False))
    assert len(steps) < 60 and not learn.recorder.bs_result.run.biased


def test_every_batch_steps_as_in_fit():
    with pytest.warns(UserWarning): found,*_ = spied(lambda learn: bs_find_stepping(learn, .1, 50, show_plot=False, profile=False))
    trained,*_ = spied(lambda learn: learn.fit(1, .1))
    assert len(found) == 50
    for a,b in zip(found, trained):
        for p,q in zip(a, b, strict=True): assert torch.equal(p, q)


def test_several_processes_are_told_that_it_works_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # a GPU cannot be used after a fork
    def untouched(rank):
        learn = digits_learner()
        weights = [p.clone() for p in learn.model.parameters()]
        with learn.distrib_ctx(), learn.no_bar(), learn.no_logging():
            with pytest.raises(ValueError, match='single process: call it outside of distrib_ctx'): bs_find_stepping(learn, .1, 60)
        return all(torch.equal(a, b) for a,b in zip(weights, learn.model.parameters(), strict=True))
    assert run_processes(tmp_path, 2, untouched) == [True, True]
