"`bs_sweep` counts right, compares fairly, can be interrupted and resumed, and leaves no footprint"
import math, signal, threading, time
from io import StringIO

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.utils import data as torch_data
from fastai.basics import Adam, Callback, CancelValidException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, Metric, SGD, accuracy, noop, set_seed
from fastai.callback.all import MixUp, ParamScheduler, SchedLin
from fastai.metrics import Perplexity

from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.finder import *
from fastai_bs_finder.predict import fit_steps
from fastai_bs_finder.result import SweepResult, keep_result
from fastai_bs_finder.sweep import *
from fastai_bs_finder.words import sweep_summary
from footprint import changes, forget, state
from learners import applications, digits, maker, stream


def sweep(learn, *args, **kwargs): return learn.bs_sweep(*args, **{'show_plot': False, 'n_eval': 300} | kwargs)


def plain(bs=16, n=320, opt_func=SGD, **kwargs):
    "A learner whose data come in order"
    X,y = digits()
    set_seed(1)
    dls = DataLoaders(DataLoader(list(zip(X[:n], y[:n])), bs=bs), DataLoader(list(zip(X[n:n + 100], y[n:n + 100])), bs=64), device='cpu')
    return Learner(dls, nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, wd=0., **kwargs)


def own_loop(model, bs, lr, target, n=320, most=10**4):
    "Steps of plain SGD until the mean training loss is at the target, looked at where `bs_sweep` does"
    X,y = (t[:n] for t in digits())
    steps,look,best = 0,1,math.inf
    while steps < most:
        for i in range(0, n, bs):
            model.zero_grad()
            nn.functional.cross_entropy(model(X[i:i + bs]), y[i:i + bs]).backward()
            with torch.no_grad():
                for p in model.parameters(): p -= lr*p.grad
            steps += 1
            if steps < look: continue
            look = max(steps + 1, math.ceil(1.04*steps))
            with torch.no_grad(): loss = nn.functional.cross_entropy(model(X), y).item()
            best = min(best, loss)
            if loss <= target: return steps,best


@pytest.mark.parametrize('bs', (8, 48, 320))
def test_equals_a_loop_of_ones_own(bs):
    "Steps, examples and the loss per example, whatever the batch size and the last, smaller batch of an epoch"
    learn = plain()
    row = sweep(learn, [bs], 1., lrs=[.3], n_eval=512, budget=1000).iloc[0]
    steps,loss = own_loop(learn.model, bs, .3, 1.)
    per_epoch = math.ceil(320/bs)
    assert (row.steps, row.examples) == (steps, steps//per_epoch*320 + min(steps % per_epoch*bs, 320)) and row.reached
    assert row.loss == pytest.approx(loss, rel=1e-5) and row.epochs == row.examples/320
    assert row.seconds > 0


def test_every_training_starts_alike():
    "From the learner's weights and its order of the data: a sweep over two sizes is two sweeps over one"
    both = sweep(digits_learner(), [16, 64], .5, lrs=[.1])
    for bs in (16, 64):
        alone = sweep(digits_learner(), [bs], .5, lrs=[.1])
        pd.testing.assert_frame_equal(both[both.bs == bs].drop(columns='seconds').reset_index(drop=True), alone.drop(columns='seconds'), check_exact=True)


def test_looking_does_not_change_the_training():
    "The weights at the end are those of a fit, with dropout, batch-norm and validation metrics"
    class NoValid(Callback):
        def before_validate(self):
            if self.n_epoch == 2: raise CancelValidException  # it would draw random numbers
    class Last(Callback):
        order,run_valid = 99,False
        def after_batch(self): last.append(torch.cat([p.detach().flatten().clone() for p in self.model.parameters()]))
    def make(cbs=()):
        set_seed(4)
        X,y = digits()
        dls = DataLoaders(DataLoader(list(zip(X[:480], y[:480])), bs=16, shuffle=True), DataLoader(list(zip(X[480:580], y[480:580])), bs=64), device='cpu')
        return Learner(dls, nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 10)), loss_func=CrossEntropyLossFlat(), opt_func=Adam, metrics=accuracy, cbs=list(cbs))
    for cbs in ([], [MixUp]):
        last = []
        sweep(make([Last(), *(c() for c in cbs)]), [16], budget=dict(steps=60), lrs=[1e-2], monitor='accuracy')
        looked,last = last[1:],[]  # the first step looks at the optimizer
        learn = make([Last(), NoValid(), *(c() for c in cbs)])
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
        assert len(looked) == 60 and all(torch.equal(a, b) for a,b in zip(looked, last))


def test_losses_are_means_per_example():
    "At learning rate 0 they are the same at every batch size, and those of the learner's own validation"
    learn = plain(metrics=accuracy)
    s = sweep(learn, [1, 7, 64, 320], budget=dict(steps=2), lrs=[0.], n_eval=512)
    loss,valid_loss,acc = learn.validate(0)[0],*learn.validate(1)
    for col,wanted in dict(loss=loss, valid_loss=valid_loss, accuracy=acc).items(): np.testing.assert_allclose(s[col], wanted, rtol=1e-5)


def test_seconds_are_those_of_training(monkeypatch):
    "Evaluation may take as long as it wants"
    now = [0.]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    class Slow(Callback):
        order = 99
        def after_batch(self): now[0] += 1. if self.training else 1000.
    learn = plain(cbs=Slow())
    s = sweep(learn, [32, 64], budget=dict(steps=30), lrs=[.1])
    assert list(s.seconds) == [30., 30.]


@pytest.mark.parametrize('budget,wanted', [(2, dict(steps=40)), (dict(steps=7), dict(steps=7)), (dict(epochs=3, steps=25), dict(steps=25)), (.5, dict(steps=10))])
def test_budgets(budget, wanted):
    row = sweep(plain(), [16], budget=budget, lrs=[1e-3]).iloc[0]
    assert row.steps == wanted['steps'] and not row.reached


def test_a_budget_of_seconds():
    s = sweep(plain(), [16], budget=dict(seconds=.3), lrs=[1e-3])
    assert .3 <= s.seconds[0] < .6


def test_the_best_learning_rate_is_inside():
    "It beats those lower and higher by a factor of √2 or more"
    s = sweep(plain(), [16], 1., lr=.05, budget=30)
    best = s.lr[s.best].item()
    lower,higher = s.lr[s.lr < best].max(),s.lr[s.lr > best].min()
    assert all(1.4 < f < 2.1 for f in (best/lower, higher/best)) and min(best/lower, higher/best) < 1.5
    assert s.steps[s.best].item() == s.steps[s.reached].min()
    hopeless = s[~s.reached]
    assert len(hopeless) and (hopeless.steps <= 1.25*1.05*s.steps[s.reached].max() + 1).all()


def test_the_next_size_begins_near_the_best_of_the_last():
    s = sweep(plain(), [16, 64], 1., lr=.1, budget=30)
    first = s[s.bs == 64].iloc[0].lr
    assert first == pytest.approx(s.lr[s.best & (s.bs == 16)].item()*4)  # the linear rule of SGD: no noise scale is known


def test_slices_of_learning_rates():
    def two_groups(model): return [list(model[0].parameters()), list(model[2].parameters())]
    s = sweep(plain(splitter=two_groups), [16, 32], 1., lr=slice(.01, .1), budget=100)
    assert all(isinstance(v, slice) and v.stop == pytest.approx(10*v.start) for v in s.lr) and s.reached.any()


def test_sizes_by_default():
    "The one in use and powers of two around the root of 1,500 examples, 32, and then those beside the best: in one epoch the smallest"
    s = sweep(digits_learner(bs=24), lrs=[.2], budget=1)
    assert list(s.bs) == [6, 8, 12, 16, 24, 32, 64, 128] and list(s.bs[s.loss == s.loss.min()])[0] in (6, 8, 12)


def test_accumulates_what_does_not_fit():
    learn = plain(n=320)
    whole = sweep(learn, [64], 1., lrs=[.3])
    learn.recorder.bs_fits = 20
    parts = sweep(learn, [64], 1., lrs=[.3])
    assert parts.steps[0] == whole.steps[0] and parts.loss[0] == pytest.approx(whole.loss[0], rel=1e-4)


def test_the_fit():
    bs = [4, 16, 64, 256]
    found = fit_steps(bs, [66*(1 + 154/b) for b in bs])
    assert (found['s_min'], found['critical'], found['error']) == pytest.approx((66, 154, 1), rel=1e-3)
    off = fit_steps(bs, [66*(1 + 154/b)*f for b,f in zip(bs, (1.2, 1/1.2, 1.2, 1/1.2))])
    assert 1.1 < off['error'] < 1.25 and fit_steps([4, 8], [10, 5]) is None
    only_noise = fit_steps(bs, [1000/b for b in bs])
    assert only_noise['critical'] > 1000


def sized(learn, **kwargs): return sweep(learn, [16, 32, 64], 1., lrs=[.2, .4], **kwargs)


class Interrupt(Callback):
    "Ctrl-C at a training batch, counted over the whole sweep"
    order,run_valid = 50,False
    def __init__(self, at):
        self.at,type(self).n = at,0  # what is on the callback itself is put back
    def do(self): signal.raise_signal(signal.SIGINT)
    def after_batch(self):
        type(self).n += 1
        if self.n == self.at: self.do()


@pytest.mark.parametrize('at', (pytest.param(1, marks=pytest.mark.slow), 60, pytest.param(120, marks=pytest.mark.slow)))
def test_interrupt_and_resume(at, capsys):
    "What is finished is returned, and not trained again"
    whole = sized(digits_learner())
    learn,stop = digits_learner(),Interrupt(at)
    was = state(learn)
    with learn.added_cbs(stop): part = sized(learn)
    assert ('Interrupted after' if len(part) else 'Interrupted before the first training') in capsys.readouterr().out
    assert len(part) < len(whole) and vars(learn.recorder).get('bs_sweep', part).equals(part)
    forget(learn)
    assert changes(was, state(learn)) == []
    for before in (part, pd.read_csv(StringIO(part.to_csv(index=False)))):
        rest = digits_learner(cbs=Interrupt(10**9))
        full = sized(rest, resume=before)
        assert Interrupt.n == full.steps.sum() - before.steps.sum() + 1  # one step to look at the optimizer
        pd.testing.assert_frame_equal(full.drop(columns='seconds'), whole.drop(columns='seconds'), check_dtype=False)
    again,count = digits_learner(),Interrupt(10**9)
    with again.added_cbs(count): sized(again, resume=whole)
    assert count.n == 1


class Fails(Interrupt):
    def do(self): raise OSError('the disk is gone')


@pytest.mark.parametrize('at', (1, 50))
@pytest.mark.parametrize('name', ('tabular: TabularDataLoaders, embeddings', next(n for n in applications if 'PyTorch' in n)))
def test_an_exception_leaves_no_footprint_and_loses_nothing(name, at, fastai_data):
    make,lr = maker(name, fastai_data)
    learn = make()
    was = state(learn)
    with pytest.raises(OSError, match='the disk is gone'), learn.added_cbs(Fails(at)): sweep(learn, [16, 24], budget=dict(steps=20), lrs=[1e-3, 1e-2])
    assert len(vars(learn.recorder).get('bs_sweep', ())) == at//20
    forget(learn)
    assert changes(was, state(learn)) == []


@pytest.mark.parametrize('name', [n for n in applications if 'unet' not in n and 'unfrozen' not in n])
def test_every_application(name, fastai_data):
    "Works, and leaves no footprint"
    make,lr = maker(name, fastai_data)
    learn = make()
    was = state(learn)
    s = sweep(learn, [12, 24], budget=dict(steps=3), lrs=[lr], n_eval=30)
    assert list(s.bs) == [12, 24] and (s.steps == 3).all() and s.loss.notna().all()
    forget(learn)
    assert changes(was, state(learn)) == []


def test_out_of_memory_ends_at_that_size(capsys):
    class Large(Callback):
        def before_batch(self):
            if len(self.yb[0]) > 40 and self.training: raise torch.OutOfMemoryError('no memory left')
    s = sweep(digits_learner(cbs=Large()), [16, 32, 64, 128], .6, lrs=[.1])
    assert set(s.bs) == {16, 32} and 'bs=64 does not fit in memory' in capsys.readouterr().out


@pytest.mark.parametrize('kwargs,words', [
    (dict(bss=[]), 'bss is empty'), (dict(bss=[0]), 'bss=0 is not|batch size in bss=0'), (dict(bss=[2.5]), 'batch size in bss=2.5'), (dict(bss=[9999]), 'bss has 9999, more than the 320 examples'),
    (dict(target='low'), "target='low' is not a number"), (dict(target=math.nan), 'target=nan'), (dict(budget=0), 'budget of epochs=0 is not a number above 0'), (dict(budget=dict(hours=1)), "budget={'hours': 1} is not a number of epochs"),
    (dict(lrs=[]), 'lrs has no learning rate'), (dict(lrs=[-1.]), 'lr=-1.0 is not a learning rate'), (dict(lr=math.inf), 'lr=inf is not'), (dict(monitor='accuracy'), "monitor='accuracy' is not one of loss, valid_loss"),
    (dict(n_eval=0), 'n_eval=0'), (dict(resume=pd.DataFrame(dict(bs=[1]))), 'resume has no column'), (dict(resume='a.csv'), "resume='a.csv' is not a DataFrame"), (dict(bss=nn), 'is not a list of batch sizes'), (dict(target=True), 'target=True'), (dict(lrs=[[.1, .2, .3]]), r'has 3 values, but the optimizer has 1 parameter group')])
def test_bad_input(kwargs, words):
    learn = plain()
    was = state(learn)
    with pytest.raises(ValueError, match=words): sweep(learn, **{'bss': [16]} | kwargs)
    forget(learn)
    assert changes(was, state(learn)) == []


def test_another_target_is_not_resumed():
    learn = plain()
    before = sweep(learn, [16], 1., lrs=[.3])
    for resume in (before, pd.read_csv(StringIO(before.to_csv()))):
        with pytest.raises(ValueError, match="resume was made with monitor='loss' and target=1.0, and this sweep has monitor='loss' and target=0.9"): sweep(learn, [16], .9, lrs=[.3], resume=resume)


def test_resume_goes_on_with_a_larger_budget():
    learn = plain()
    before = sweep(learn, [16], 1., lrs=[.1], budget=1)
    assert not before.reached.any()
    after = sweep(learn, [16], 1., lrs=[.1], budget=30, resume=before)
    assert after.reached.all() and len(after) == 1
    again = sweep(learn, [16], budget=2, lrs=[.1], resume=sweep(learn, [16], budget=1, lrs=[.1]))
    assert again.epochs[0] == 2


def test_a_search_that_is_finished_is_not_trained_again():
    whole = sweep(plain(), [16, 32], 1., lr=.1, budget=30)
    learn,count = plain(),Interrupt(10**9)
    with learn.added_cbs(count): again = sweep(learn, [16, 32], 1., lr=.1, budget=30, resume=pd.read_csv(StringIO(whole.to_csv())))
    assert count.n == 1
    pd.testing.assert_frame_equal(again.drop(columns='seconds'), whole.drop(columns='seconds'), check_dtype=False)


def test_slices_survive_a_file(tmp_path):
    def two_groups(model): return [list(model[0].parameters()), list(model[2].parameters())]
    def run(**kwargs): return sweep(plain(splitter=two_groups), [16, 32], 1., lrs=[slice(.03, .3), [.1, .2]], budget=30, **kwargs)
    whole = run()
    learn = plain(splitter=two_groups)
    keep_result(learn.recorder, 'bs_sweep_result', SweepResult(whole))
    learn.recorder.bs_sweep_result.to_csv(tmp_path/'sweep.csv')
    again = run(resume=SweepResult.from_csv(tmp_path/'sweep.csv'))
    assert list(map(str, again.lr)) == list(map(str, whole.lr)) and list(again.seconds) == list(whole.seconds)


def test_lower_is_better_for_errors():
    "By their names, or as one says"
    def mse(pred, y): return nn.functional.mse_loss(pred.softmax(1), nn.functional.one_hot(y, 10).float())
    def wrong(pred, y): return 1 - (pred.argmax(1) == y).float().mean()
    for metric,kwargs in ((Perplexity(), dict(monitor='perplexity', target=2.)), (mse, dict(monitor='mse', target=.03)), (wrong, dict(monitor='wrong', target=.2, comp=np.less))):
        row = sweep(plain(metrics=metric), [16], lrs=[.3], budget=60, **kwargs).iloc[0]
        assert row.reached and row.steps > 20 and row[kwargs['monitor']] <= kwargs['target']


def test_a_target_that_is_there_at_once_is_said(capsys):
    sweep(plain(), [16], 5., lrs=[.1])
    assert 'After a single step there is already a training loss of 5: choose a target that takes training' in capsys.readouterr().out


def test_a_model_that_changes_its_input():
    "The batches for evaluation stay what they are"
    class InPlace(nn.Linear):
        def forward(self, x): return super().forward(x.sub_(.3).div_(.5))
    class Copies(nn.Linear):
        def forward(self, x): return super().forward((x - .3)/.5)
    def loss(cls):
        learn = plain()
        set_seed(2)
        learn.model = cls(64, 10)
        learn.dls.train.dataset = [(x.clone(), y) for x,y in learn.dls.train.dataset]
        return sweep(learn, [16], budget=2, lrs=[.05]).loss[0]
    assert loss(InPlace) == pytest.approx(loss(Copies), rel=1e-5)


def test_out_of_memory_leaves_nothing_on_the_learner():
    class Large(Callback):
        def before_batch(self):
            if len(self.yb[0]) > 40 and self.training: raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')
    learn = plain(cbs=Large())
    was = state(learn)
    assert set(sweep(learn, [16, 64], 1., lrs=[.1]).bs) == {16}
    forget(learn)
    assert changes(was, state(learn)) == [] and not {'xb', 'yb', 'pred', 'loss'} & set(vars(learn))


class ForSixteen(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)
    def forward(self, x): return self.net(x.view(16, 64))


def for_sixteen():
    learn = plain()
    learn.model = ForSixteen()
    for dl in learn.dls.loaders: dl.bs,dl.drop_last = 16,True
    return learn


def test_a_model_for_one_batch_size(capsys):
    learn = for_sixteen()
    was = state(learn)
    assert set(sweep(learn, [8, 16, 64], budget=1, lrs=[.1]).bs) == {16}
    assert 'bs=8, 64 fails here (shape' in capsys.readouterr().out and learn.recorder.bs_sweep_result.unfit.keys() == {8, 64}
    forget(learn)
    assert changes(was, state(learn)) == []
    learn.max_bs()
    assert set(sweep(learn, [16, 40, 64], budget=1, lrs=[.1]).bs) == {16, 40, 64}  # in pieces of 16


def test_items_that_do_not_collate(capsys):
    items = [(torch.randn(2 + i % 7, 64), torch.tensor(i % 2)) for i in range(60)]
    model = nn.Sequential(nn.Linear(64, 2), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten())
    learn = Learner(DataLoaders(*(DataLoader(items, bs=1) for _ in range(2))), model, loss_func=CrossEntropyLossFlat())
    assert set(sweep(learn, [1, 4], budget=1, lrs=[.1]).bs) == {1} and 'bs=4 fails here (Error when trying to collate' in capsys.readouterr().out


class Locked:
    "A batch of another library, with a lock, that does not deep-copy"
    def __init__(self, x): self.x,self.lock = x,threading.Lock()
    shape = property(lambda self: self.x.shape)


def in_a_graph(x): return x.requires_grad_()*1


@pytest.mark.parametrize('kind', [Locked, in_a_graph, lambda x: dict(x=x, lock=threading.Lock()), lambda x: [x, threading.Lock()]])
def test_batches_that_do_not_deep_copy(kind):
    X,y = digits()
    def collate(items): return kind(torch.stack([x for x,_ in items])),torch.stack([y for _,y in items])
    class InPlace(nn.Linear):
        def forward(self, b):
            x = b.x if isinstance(b, Locked) else b['x'] if isinstance(b, dict) else b[0] if isinstance(b, list) else b
            with torch.no_grad(): x.div_(2)
            return super().forward(x)
    dls = DataLoaders(*(torch_data.DataLoader(list(zip(X[:200], y[:200])), 8, collate_fn=collate) for _ in range(2)), device='cpu')
    s = sweep(Learner(dls, InPlace(64, 10), loss_func=CrossEntropyLossFlat()), [8, 16], budget=dict(steps=60), lrs=[1e-9], n_eval=256)
    assert set(s.bs) == {8, 16} and s.loss[0] == pytest.approx(s.loss[1], rel=1e-4)  # nothing is learned, and the input is the same each time


def test_out_of_memory_in_evaluation_is_not_the_batch_size():
    class Large(Callback):
        def before_batch(self):
            if not self.training: raise torch.OutOfMemoryError('no memory left')
    with pytest.raises(torch.OutOfMemoryError): sweep(plain(cbs=Large()), [16, 32], 1., lrs=[.1])


def test_metrics_that_come_late_or_are_no_numbers(capsys):
    class Late(Metric):
        "Not a number until the model is better than chance"
        name = 'late'
        def reset(self): self.right = self.n = 0
        def accumulate(self, learn): self.right,self.n = self.right + (learn.pred.argmax(1) == learn.y).sum().item(),self.n + len(learn.y)
        @property
        def value(self): return self.right/self.n if self.right > .4*self.n else math.nan
    class Each(Late):
        name = 'each'
        value = np.ones(3)
    row = sweep(plain(metrics=[Late(), Each()]), [16], .6, lrs=[.3], monitor='late', budget=60).iloc[0]
    assert row.reached and row.late >= .6 and math.isnan(row.each)
    Late.value = math.nan
    never = sweep(plain(metrics=[Late()]), [16], .6, lrs=[.3], monitor='late', budget=1)
    assert not never.reached.any() and 'No training had a finite late' in capsys.readouterr().out


def test_a_loss_that_is_no_number_ends_it(capsys):
    s = sweep(plain(), [16], 1., lrs=[1e38], budget=30)
    assert s.steps[0] < 20 and not s.reached[0]


def test_validation_that_is_cancelled_is_an_error():
    class Never(Callback):
        def before_validate(self): raise CancelValidException
    learn = plain(cbs=Never())
    was = state(learn)
    with pytest.raises(ValueError, match='There is no loss to watch: the evaluation saw no batch'): sweep(learn, [16], 1., lrs=[.1])
    forget(learn)
    assert changes(was, state(learn)) == []


def test_schedules_are_set_aside():
    learn = plain(cbs=ParamScheduler({'lr': SchedLin(1e-5, 1e-4)}))
    s = sweep(learn, [16], budget=2, lrs=[.01, .3])
    assert s.loss[1] < s.loss[0] - .1 and s.loss[1] == pytest.approx(sweep(plain(), [16], budget=2, lrs=[.3]).loss[0])


def test_with_accumulation_the_size_in_use_is_the_window():
    learn = plain(bs=64)
    learn.recorder.bs_fits = 16
    with learn.no_logging(): learn.set_bs(64)
    s = sweep(learn, [64], 1., lr=.3, budget=60)
    assert learn.recorder.bs_sweep_result.bs_in_use == 64 and s.lr[0] == .3


def test_a_stream_has_no_epochs():
    with pytest.raises(ValueError, match='The budget is in epochs, and the training loader does not know'): sweep(stream(), [16], lrs=[.1])


def test_all_learning_rates_are_looked_at_first():
    learn,count = plain(),Interrupt(10**9)
    with pytest.raises(ValueError, match='has 3 values'), learn.added_cbs(count): sweep(learn, [16], lrs=[.3, [.1, .2, .3]])
    assert count.n == 0


def test_what_the_fit_cannot_tell_is_not_said():
    bs = [16, 32, 64, 128]
    for steps,words in (([1000/b for b in bs], 'the critical batch size is larger than that'), ([100]*4, 'the critical batch size is smaller than that'), ([66*(1 + 50/b) for b in bs], 'the measured critical batch size is 50')):
        stats = pd.DataFrame(dict(bs=bs, lr=.1, steps=steps, examples=1., seconds=1., loss=.1, best=True, reached=True))
        assert words in sweep_summary(SweepResult(stats, target=.1, bs_in_use=16, fit=fit_steps(bs, steps)))


def test_the_edge_of_the_learning_rates_is_said(capsys):
    sweep(plain(), [16], 1., lrs=[.01, .05], budget=60)
    assert 'The best learning rate of bs=16 is the highest that was tried' in capsys.readouterr().out


def test_what_it_says_and_shows(capsys):
    learn = digits_learner()
    learn.bs_find(.1, 200, show_plot=False)
    s = sweep(learn, [16, 64, 256], .5, lrs=[.2, .4, .8])
    said = capsys.readouterr().out.splitlines()[-1]
    top = s[s.best].set_index('bs')
    assert said.startswith(f"bs={top.seconds.idxmin()} reaches a training loss of 0.5 in the shortest time") and 'critical batch size is' in said
    fig = learn.recorder.plot_bs_sweep()
    assert [ax.get_ylabel() for ax in fig.axes] == ['Steps', 'Examples', 'Seconds']
    labels = fig.axes[0].get_legend_handles_labels()[1]
    assert 'predicted by bs_find' in labels and 'in use: 16' in labels
    sweep(learn, [16, 64], budget=1, lrs=[.1])
    assert 'In the same budget, bs=16 has the best training loss' in capsys.readouterr().out
    assert len(learn.recorder.plot_bs_sweep().axes) == 2
    nothing = sweep(learn, [16], 1e-9, lrs=[.1], budget=1)
    assert 'No training reached a training loss of 1e-09' in capsys.readouterr().out and not nothing.reached.any()
    with pytest.raises(ValueError, match='no sweep to plot'): digits_learner().recorder.plot_bs_sweep()


@pytest.mark.slow
def test_mnist(mnist):
    "784-128-10 to training loss 0.2: steps of about 66·(1 + 154/bs), and the noise scale along the way is the critical batch size to a factor of 2"
    class Digits(torch_data.Dataset):
        x,y = mnist
        def __len__(self): return len(self.x)
        def __getitem__(self, i): return self.x[i],self.y[i]
        def __getitems__(self, idxs): return self.x[idxs],self.y[idxs]
    set_seed(0)
    ds = Digits()
    ds.x.sub_(ds.x.mean()).div_(ds.x.std())
    dls = DataLoaders(torch_data.DataLoader(ds, 64, shuffle=True, collate_fn=noop), torch_data.DataLoader(torch_data.Subset(ds, range(1000)), 1000, collate_fn=noop))
    learn = Learner(dls, nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    sizes = [16, 64, 256, 1024]
    s = sweep(learn, sizes, .2, lr=.2, n_eval=2000)
    top = s[s.best].set_index('bs')
    print(s.to_string())
    at64 = top.loc[64]
    with learn.no_bar(): learn.bs_find(at64.lr, math.ceil(at64.steps*20/11), show_plot=False, profile=False)
    noise_scale = learn.recorder.bs_result.mean_noise_scale[0]
    found = learn.recorder.bs_sweep_result
    print(found.fit, noise_scale, found)
    for b in sizes: assert 1/1.25 < top.steps[b]/(66*(1 + 154/b)) < 1.25, b
    assert 1/2 < found.fit['critical']/noise_scale < 2


@pytest.mark.parametrize('n,sizes', [(1281, [50, 64, 128]), (129, [16, 32, 100]), (65, [8, 64])])
def test_no_batch_of_one_for_a_batch_norm(n, sizes):
    X,y = digits()
    def loader(sl): return torch_data.DataLoader(torch_data.TensorDataset(X[sl], y[sl]), sizes[0], shuffle=True)
    learn = Learner(DataLoaders(loader(slice(n)), loader(slice(n, n + 64))), nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
                    loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    with learn.no_bar(), learn.no_logging():
        was = state(learn)
        found = learn.bs_sweep(sizes, lrs=[.1], budget=1, show_plot=False)
        forget(learn)
        assert changes(was, state(learn)) == []
    assert list(found.bs) == sizes and (found.examples >= n - 1).all()
