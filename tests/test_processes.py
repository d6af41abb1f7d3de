"Several processes: the same figures as one, nobody waits for ever, and nothing is left behind"
import json, os, random, re, signal, socket, subprocess, sys, textwrap, time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from filelock import FileLock
from sklearn.datasets import load_digits
from fastai.basics import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, SGD, Adam, accuracy
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, ProgressCallback
from fastai_bs_finder.all import *
from fastai_bs_finder.grow import GrowBatch
from fastai_bs_finder.mock import mock_training
from fastai_bs_finder.processes import is_distributed, processes_of
from fastai_bs_finder.profile import profile_steps
from fastai_bs_finder.set_bs import known_fits
import footprint
from processes import printed, run_processes

x,y = load_digits(return_X_y=True)
x,y = torch.tensor(x/16, dtype=torch.float32),torch.tensor(y)
n = 640
root = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch): monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # a GPU cannot be used after a fork


def loader(order, bs=8, **kwargs): return DataLoader([(x[i], y[i]) for i in order], bs=bs, num_workers=0, device=torch.device('cpu'), **kwargs)


def digits(order=range(n), bs=8, shuffle=False, dropout=0., make=None, **kwargs):
    torch.manual_seed(0)
    model = make() if make else nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 10))
    dls = DataLoaders(loader(order, bs, shuffle=shuffle), loader(range(n, 1797), 64), device=torch.device('cpu'))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **{'opt_func': SGD, 'lr': .05} | kwargs)
    return learn.remove_cb(ProgressCallback)


def together(rank, f, opt_func=SGD, lr=.05, shuffle=False, dropout=0., **kwargs):
    learn = digits(opt_func=opt_func, lr=lr, shuffle=shuffle, dropout=dropout)
    with learn.distrib_ctx(sync_bn=False): return f(learn, rank, **kwargs)


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def equal(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))


def find(learn, rank, *args, **kwargs):
    "What `find` returns, but the statistics as plain values, to compare across processes"
    before,was = footprint.state(learn),weights(learn)
    res = learn.bs_find(*args, **dict(show_plot=False, profile=False) | kwargs)
    rec = learn.recorder
    found = dict(suggested=tuple(res), stats=rec.bs_stats.to_dict('list'), run=rec.bs_result.run, profile=rec.bs_result.profile, layers=rec.bs_layers.to_dict('list'), by_element=rec.bs_result.by_element, table=pd.DataFrame(rec.bs_table).to_dict('list'))
    footprint.forget(learn)
    return found,footprint.changes(before, footprint.state(learn)),equal(was, weights(learn))


def same_order(W, n_batch, bs=8):
    "The order in which a single process sees the examples of each measurement that `W` processes take of it"
    share,each = n//W,n_batch*bs
    return [r*share + j*each + i for j in range(share//each) for r in range(W) for i in range(each)]


def doubled(learn):
    "In double precision, so that figures that nearly cancel out, |G|² in Adam's first steps, can be compared, too"
    learn.model.double()
    for dl in learn.dls.loaders: dl.dataset = [(x.double(), y) for x,y in dl.dataset]
    return learn

def figures(rank, W):
    "Of `W` processes, in all as many batches per measurement as a single process takes below"
    res = []
    for opt,double in product((SGD, Adam), (False, True)):
        learn = digits(opt_func=opt)
        if double: doubled(learn)
        with learn.distrib_ctx(sync_bn=False): res.append(find(learn, rank, num_it=80//W, n_batch=8//W, n_train=0, lr=.01))
    return res

@pytest.mark.parametrize('W', (2, 4))
def test_figures_of_a_single_process(W, tmp_path):
    ranks = run_processes(tmp_path, W, figures, W, seconds=60)
    for (opt,double),by_rank in zip(product((SGD, Adam), (False, True)), zip(*ranks, strict=True), strict=True):
        learn = digits(same_order(W, 8//W), opt_func=opt)
        one,*_ = find(doubled(learn) if double else learn, 0, num_it=80, n_batch=8, n_train=0, lr=.01)
        for found,changes,unchanged in by_rank:
            assert not changes and unchanged
            assert repr(found) == repr(by_rank[0][0])
        found = by_rank[0][0]
        assert len(found['stats']['batch']) == 10 and found['run'].bs == 8*W and found['run'].processes == W
        for c in one['stats']:
            exact = double and c != 'loss'  # which is kept in single precision
            if c not in ('batch', 'step') and (double or opt is SGD or not c.startswith('opt_')): np.testing.assert_allclose(found['stats'][c], one['stats'][c], rtol=1e-9 if exact else 1e-4, err_msg=c)
        if opt is SGD: assert found['by_element'] is None and one['by_element'] is None
        elif double:
            found,one = ({q: pd.DataFrame(getattr(o['by_element'], q), columns=o['by_element'].sizes) for q in ('phi', 'nu')} for o in (found, one))
            both = found['nu'].columns.intersection(one['nu'].columns)
            assert len(both) > 8 and len(found['nu']) == 8
            for q in found: np.testing.assert_allclose(found[q][both], one[q][both], rtol=1e-3)


class Complex(nn.Linear):
    def __init__(self): super().__init__(64, 10, dtype=torch.complex64)
    def forward(self, x): return super().forward(x.to(torch.complex64)).abs()

def test_complex_gradients_of_several_processes(tmp_path):
    opt = partial(OptimWrapper, opt=torch.optim.RMSprop)
    def run(rank):
        learn = digits(make=Complex, opt_func=opt)
        with learn.distrib_ctx(sync_bn=False): return find(learn, rank, num_it=40, n_batch=4, n_train=0, lr=1e-3)[0]
    found = run_processes(tmp_path, 2, run)[0]
    learn = digits(same_order(2, 4), make=Complex, opt_func=opt)
    one,*_ = find(learn, 0, num_it=80, n_batch=8, n_train=0, lr=1e-3)
    for c in ('loss', 'noise', 'scale', 'opt_noise', 'opt_scale'): np.testing.assert_allclose(found['stats'][c], one['stats'][c], rtol=1e-3, err_msg=c)


def test_one_batch_of_each_process_is_a_measurement(tmp_path):
    found,*_ = run_processes(tmp_path, 2, lambda rank: together(rank, lambda learn, r: find(learn, r, num_it=40, n_batch=1, n_train=0)))
    assert len(found[0]['stats']['batch']) == 40 and found[0]['stats']['noise_scale'][-1] > 0
    with pytest.raises(ValueError, match='n_batch=1 is not a whole number of 2'): digits().bs_find(n_batch=1)


def test_profile_and_memory(tmp_path):
    def f(learn, rank):
        res = find(learn, rank, profile=30., lr=.05, num_it=40, n_batch=4)
        return *res,learn.max_bs()
    ranks = run_processes(tmp_path, 2, lambda rank: together(rank, f, shuffle=True, dropout=.2))
    assert all(not changes and unchanged for _,changes,unchanged,_ in ranks)
    assert repr(ranks[0]) == repr(ranks[1])
    profile = ranks[0][0]['profile']
    assert set(profile.step_time) >= {16, 64} and profile.max_bs % 2 == 0 and ranks[0][3] == n
    assert 'bs=16 (2 processes × 8)' in printed(tmp_path, 0) and not printed(tmp_path, 1)


@pytest.mark.parametrize('says', ('', 'clear'))
def test_all_stop_at_the_same_measurement(says, tmp_path):
    "As rank 0 has it, whatever the others think later on"
    def f(learn, rank):
        from fastai_bs_finder import finder
        why = finder.why_enough
        if rank: finder.why_enough = lambda result, n_epoch_it: says if len(result) > 6 else ''
        else: finder.why_enough = lambda result, n_epoch_it: 'clear' if len(result) >= 9 else ''
        try: return find(learn, rank, lr=.05, n_batch=2, n_train=1, profile=1.)
        finally: finder.why_enough = why
    ranks = run_processes(tmp_path, 2, lambda rank: together(rank, f, shuffle=True))
    assert repr(ranks[0]) == repr(ranks[1]) and not ranks[0][1] and ranks[0][2]
    found = ranks[0][0]
    assert len(found['stats']['batch']) == 9 and found['run'].enough == 'clear' and found['run'].spent == 27 and not found['run'].stopped


def test_several_processes_stop_by_default(tmp_path):
    def f(learn, rank): return find(learn, rank, lr=.05, profile=True)
    ranks = run_processes(tmp_path, 2, lambda rank: together(rank, f, shuffle=True))
    assert repr(ranks[0]) == repr(ranks[1]) and not ranks[0][1] and ranks[0][2]
    run = ranks[0][0]['run']
    assert run.num_it == 200 and run.enough in ('clear', 'cost') and run.spent < 200


class Trouble(Callback):
    "Something that happens in one process, at one of its batches"
    order = 60
    def __init__(self, kind, at): self.kind,self.at,self.seen = kind,at,0
    def after_pred(self):
        self.seen += 1
        if self.seen - 1 != self.at: return
        if self.kind == 'exception': raise ZeroDivisionError('the cat sat on the cable')
        if self.kind == 'interrupt': raise KeyboardInterrupt
        if self.kind == 'kill': os.kill(os.getpid(), signal.SIGKILL)
        self.learn.pred = self.learn.pred*float('nan')


def find_with_trouble(kind, rank, ats):
    "What the finder says, or the error that it ends with, and what it leaves behind; one after the other, in the same processes"
    learn,res = digits(),[]
    with learn.distrib_ctx(sync_bn=False):
        for at in ats:
            if rank == 1: learn.add_cb(Trouble(kind, at))
            before = footprint.state(learn)
            try: learn.bs_find(num_it=24, n_batch=3, show_plot=False, profile=False)
            except BaseException as e: said = f'{type(e).__name__}: {e}'
            else: said = str(learn.recorder.bs_result)
            footprint.forget(learn)
            for cb in learn.cbs:
                if isinstance(cb, Trouble): cb.seen = 0
            res.append((said, footprint.changes(before, footprint.state(learn))))
            learn.remove_cb(Trouble)
        learn.fit(1)  # it still trains
    return res


@pytest.mark.parametrize('kind', ('exception', 'interrupt', 'nan'))
def test_trouble_in_one_process_ends_all(kind, tmp_path):
    ranks = run_processes(tmp_path, 2, lambda rank: find_with_trouble(kind, rank, (0, 11, 23)))
    for i,((first,changed),(second,changed_too)) in enumerate(zip(*ranks)):
        assert not changed and not changed_too
        if kind == 'nan': assert first == second and re.search(r'Lower lr, .* the loss was not finite after \d+ of 24 batches, at lr=0.05 \(rank 1\)' if i else r'Look for missing or infinite values in the data: .* before the first step \(rank 1\)', first)
        else:
            said = {'exception': 'the cat sat on the cable', 'interrupt': 'KeyboardInterrupt'}[kind]
            assert said in first and 'Rank 1 of 2 failed' in first and said in second and 'Rank' not in second


@pytest.mark.parametrize('at', (0, 11, 23))
def test_a_process_that_is_killed(at, tmp_path):
    def f(rank):
        learn = digits()
        with learn.distrib_ctx(sync_bn=False):
            if rank == 1: learn.add_cb(Trouble('kill', at))
            before = footprint.state(learn)
            try: learn.bs_find(num_it=24, n_batch=3, show_plot=False, profile=False)
            except Exception as e: return str(e),footprint.changes(before, footprint.state(learn))
    (said,changed),gone = run_processes(tmp_path, 2, f)
    assert gone is None and not changed and 'lost contact with the other processes: one of them was killed' in said


def test_trouble_before_and_after(tmp_path):
    def bad(stats):
        if torch.distributed.get_rank(): raise ZeroDivisionError('no suggestion')
    def f(rank):
        learn,res = digits(),[]
        with learn.distrib_ctx(sync_bn=False):
            for kwargs in (dict(n_batch=0 if rank else 3), dict(n_batch=3, suggest_funcs=bad), dict(n_batch=0)):
                try: learn.bs_find(num_it=24, show_plot=False, profile=False, **kwargs)
                except Exception as e: res.append(str(e))
        return res
    first,second = run_processes(tmp_path, 2, f)
    assert 'Rank 1 of 2 failed' in first[0] and 'n_batch=0 is not' in first[0] and 'n_batch=0 is not' in second[0] and 'Rank' not in second[0]
    assert 'no suggestion' in first[1] and 'no suggestion' in second[1]
    assert first[2] == second[2] and 'Rank' not in first[2]


def test_a_step_that_fails_in_one_process_only_ends_the_profile(tmp_path):
    class NotSoLarge(Callback):
        def after_pred(self):
            if len(self.learn.pred) > 8: raise torch.OutOfMemoryError('no room')
    def f(rank):
        learn = digits()
        with learn.distrib_ctx(sync_bn=False), mock_training(learn):
            if rank: learn.add_cb(NotSoLarge())
            return profile_steps(learn, [16, 64], 60.)
    for found in run_processes(tmp_path, 2, f): assert (found.trouble, found.failed, found.error, found.max_bs) == ('failed', 64, 'no room', 63)


def by_hand(rank, n_of, callback=None, **kwargs):
    "`DistributedDataParallel` without `distrib_ctx`: each process has data of its own"
    torch.distributed.init_process_group('gloo')
    learn = digits(range(n_of[rank]))
    learn.model = DistributedDataParallel(learn.model)
    if callback and rank: learn.add_cb(callback())
    return find(learn, rank, **kwargs)


class ShortEpoch(Callback):
    def before_batch(self):
        if self.training and self.iter == 34: raise CancelTrainException

@pytest.mark.parametrize('n_of,callback', (((640, 320), None), ((320, 640), None), ((640, 640), ShortEpoch)))
def test_different_numbers_of_batches(n_of, callback, tmp_path):
    ranks = run_processes(tmp_path, 2, lambda rank: by_hand(rank, n_of, callback, num_it=100, n_batch=3))
    assert not isinstance(ranks[0], Exception), ranks
    for found,changes,unchanged in ranks:
        assert not changes and unchanged
        assert len(found['stats']['batch']) > 5
        assert found['stats']['noise_scale'] == ranks[0][0]['stats']['noise_scale']


def test_bytes_that_a_measurement_sends(tmp_path):
    def f(learn, rank):
        sent,all_reduce = [],torch.distributed.all_reduce
        def counted(t, *args, **kwargs):
            sent.append(t.numel()*t.element_size())
            return all_reduce(t, *args, **kwargs)
        torch.distributed.all_reduce = counted
        gradient = sum(p.numel()*4 for p in learn.model.parameters())
        learn.bs_find(num_it=40, n_batch=8, n_train=0, show_plot=False, profile=False)
        return sum(sent)/5/gradient
    per_measurement = run_processes(tmp_path, 2, lambda rank: together(rank, f))
    assert 1 <= per_measurement[0] <= 1.1


@pytest.mark.parametrize('kwargs', (dict(), dict(cbs=GradientClip(.5)), dict(accumulate=True), dict(opt_func=Adam, lr=.003)))
def test_noise_scale_leaves_no_trace(kwargs, tmp_path):
    def run(rank, measure):
        torch.manual_seed(rank)
        learn = digits(shuffle=True, dropout=.2, **{k: v for k,v in kwargs.items() if k != 'accumulate'})
        learn.dls.train.rng.seed(3)
        torch.manual_seed(rank)
        cbs = [NoiseScale(share=None)]*measure + [AccumulateGrads(32)]*('accumulate' in kwargs)
        with learn.distrib_ctx(sync_bn=False): learn.fit_one_cycle(2, cbs=cbs)
        return weights(learn),[float(l) for l in learn.recorder.losses],learn.recorder.noise_scale if measure else None
    plain,measured = zip(*run_processes(tmp_path, 2, lambda rank: (run(rank, False), run(rank, True))))
    for a,b in zip(plain, measured): assert equal(a[0], b[0]) and a[1] == b[1]
    assert equal(measured[0][0], measured[1][0])
    stats,others = measured[0][2],measured[1][2]
    assert len(stats) >= 8 and stats.noise_scale.tolist() == others.noise_scale.tolist() and stats.batch.tolist() == others.batch.tolist()
    assert stats.noise.iloc[-1] > 0 and stats.bs.iloc[-1] == (64 if kwargs.get('accumulate') else 16)


def test_noise_scale_finds_the_truth(tmp_path):
    "At weights that stay, held against per-example gradients"
    def f(rank):
        random.seed(0)  # the order of the examples
        learn = digits(shuffle=True, lr=0.)
        with learn.distrib_ctx(sync_bn=False): learn.fit(6, lr=0., cbs=NoiseScale(share=None, beta=.99))
        return learn.recorder.noise_scale.iloc[-1]
    found = run_processes(tmp_path, 2, f)[0]
    learn = digits()
    per_example = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(nn.functional.cross_entropy(learn.model.eval()(x[i:i+1]), y[i:i+1]), list(learn.model.parameters()))]) for i in range(n)])
    mean = per_example.mean(0)
    S = (per_example - mean).square().sum()/(n - 1)
    truth = float(S/(mean.square().sum() - S/n))
    assert found.lo < truth < found.hi < 3*found.lo


def test_the_share_of_the_time(tmp_path):
    def f(rank):
        learn = digits(shuffle=True)
        with learn.distrib_ctx(sync_bn=False): learn.fit(4, cbs=NoiseScale(share=.02))
        found = learn.recorder.noise_scale_result
        return len(found),found.seconds/found.train_seconds,found.batch.tolist()
    first,second = run_processes(tmp_path, 2, f)
    assert first[2] == second[2] and 1 <= first[0] < 4*40/7/2


@pytest.mark.parametrize('n_batch,n_acc', ((8, None), (8, 32), (200, None)))
def test_noise_scale_at_least_once_per_epoch(n_batch, n_acc, tmp_path):
    "At the same batches in all processes, at the end of the epoch but for the first, and without a trace"
    def run(measure):
        torch.manual_seed(0)
        learn = digits(shuffle=True)
        learn.dls.train.rng.seed(3)
        cbs = [NoiseScale(n_batch=n_batch, share=1e-9)]*measure + ([AccumulateGrads(n_acc)] if n_acc else [])
        with learn.distrib_ctx(sync_bn=False): learn.fit(3, cbs=cbs)
        return weights(learn),learn.recorder.noise_scale if measure else None
    (plain,_,),(measured,first) = run_processes(tmp_path, 2, lambda rank: [run(False), run(True)])[0]
    second = torch.load(tmp_path/'1.pt', weights_only=False)[1][1]
    assert equal(plain, measured) and first.batch.tolist() == second.batch.tolist() and first.epoch.tolist() == [0, 1, 2]
    assert (first.batch[1:] % 40 > 30).all() and first.noise_scale.tolist() == second.noise_scale.tolist()


def test_set_bs(tmp_path):
    def f(learn, rank):
        learn.set_bs(64)
        res = [learn.dls.train.bs]
        learn.set_bs(256, fits=64)
        res += [learn.dls.train.bs,next(o.n_acc for o in learn.cbs if isinstance(o, AccumulateGrads))]
        learn.set_bs(16)
        res += [learn.dls.train.bs,any(isinstance(o, AccumulateGrads) for o in learn.cbs)]
        return res
    assert run_processes(tmp_path, 2, lambda rank: together(rank, f)) == [[32, 32, 128, 8, False]]*2
    assert printed(tmp_path, 0).splitlines() == ['Batches of 64 examples (2 processes × 32), 10 steps per epoch.',
        'Batches of 64 examples (2 processes × 32), the gradients of 4 accumulated: 256 examples per step, 3 steps per epoch.',
        'Batches of 16 examples (2 processes × 8), 40 steps per epoch.']
    assert not printed(tmp_path, 1)


def test_what_fits_is_remembered_for_each_process(tmp_path):
    def f(rank):
        learn = digits()
        with learn.distrib_ctx(sync_bn=False):
            res = [learn.max_bs(), known_fits(learn)]
            learn.recorder.bs_fits = 16
            learn.set_bs(64)
            res.append(learn.dls.train.bs)
        learn.set_bs(64)  # this process alone
        return res + [learn.dls.train.bs]
    assert run_processes(tmp_path, 2, f) == [[n, n, 16, 16]]*2


def test_accumulated_like_a_large_batch(tmp_path):
    def run(accumulate):
        learn = digits()
        with learn.distrib_ctx(sync_bn=False): learn.set_bs(128, fits=32 if accumulate else None).fit(2)
        return weights(learn)
    a,b = zip(*run_processes(tmp_path, 2, lambda rank: (run(False), run(True))))
    assert equal(b[0], b[1])
    for p,q in zip(a[0], b[0], strict=True): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_works_in_a_single_process_says_so(tmp_path):
    def f(learn, rank):
        res = []
        for call in (lambda: learn.bs_sweep([8]), lambda: learn.fit(1, cbs=GrowBatch())):
            try: call()
            except ValueError as e: res.append(str(e))
        return res
    for said in run_processes(tmp_path, 2, lambda rank: together(rank, f)): assert len(said) == 2 and all('single process' in s for s in said)


tutorial = [''.join(c['source']) for c in json.loads((root/'nbs/03_distributed.ipynb').read_text())['cells']]
script = next(c.removeprefix('%%writefile train.py\n') for c in tutorial if c.startswith('%%writefile train.py'))
commands = dict(re.findall(r'^\| ([^|]+) \| `([^`]+)`', next(c for c in tutorial if c.startswith('## How to start it')), re.MULTILINE))
_tell = "\nPath(f'rank{rank_distrib()}.txt').write_text(repr([learn.recorder.bs_stats.noise_scale.tolist(), found, learn.dls.train.bs]))\n"

def start(folder, *lines, **variables):
    "What commands that run at the same time print"
    env = os.environ | variables | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', MPLBACKEND='agg', ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='', PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with FileLock(folder.parents[1]/'port.lock'):  # launchers listen at the same one
        started = [subprocess.Popen(line, shell=True, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for line in lines]
        try: out = [p.communicate(timeout=300) for p in started]
        finally:
            for p in started: p.kill()
    assert not any(p.returncode for p in started), out
    return ''.join(o for o,_ in out)

@pytest.mark.slow
@pytest.mark.parametrize('where', commands)
def test_how_to_start_it(where, tmp_path):
    "Each command of the tutorial, on the CPU; with two processes, but `accelerate launch` starts one there"
    (tmp_path/'train.py').write_text(script + _tell)
    line,n = commands[where],2
    if where == 'one machine with 4 GPUs': n = 4
    elif where.startswith('two machines'):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            line = line.replace('FIRST_MACHINE:29500', f'127.0.0.1:{s.getsockname()[1]}').replace('_node 4', '_node 1')
    elif line.startswith('accelerate'):
        n = 1
        (tmp_path/'config.yaml').write_text('compute_environment: LOCAL_MACHINE\ndistributed_type: "NO"\nuse_cpu: true\nnum_machines: 1\nmachine_rank: 0\nnum_processes: 1\nmixed_precision: "no"\n')  # what `accelerate config` writes
        line = line.replace('launch', 'launch --config_file config.yaml')
    elif line.startswith('notebook_launcher'):
        setup,train = (script + _tell).split('with learn.distrib_ctx')
        body = textwrap.indent(f'with learn.distrib_ctx{train}', '    ')
        (tmp_path/'train.py').write_text(f'{setup}\nfrom accelerate import notebook_launcher\ndef train():\n{body}\n{line}\n')
        line = f'{sys.executable} train.py'
    printed = start(tmp_path, *[line]*(2 if where.startswith('two machines') else 1))
    results = [f.read_text() for f in tmp_path.glob('rank*.txt')]
    assert len(results) == n and len(set(results)) == 1
    assert printed.count('The noise scale is') == 1 and (f'bs={16*n} ({n} processes × 16)' if n > 1 else 'bs=16 at lr') in ' '.join(printed.split())
    assert (tmp_path/'bs_find.png').stat().st_size > 10_000


class Raises(Callback):
    "Raises something, in one process, when an event happens for the `nth` time"
    order = 5
    def __init__(self, event, what, nth=0): self.event,self.what,self.nth,self.seen = event,what,nth,0
    def __call__(self, event_name):
        if event_name == self.event:
            self.seen += 1
            if self.seen == self.nth + 1: raise self.what


@pytest.mark.parametrize('event', ('before_fit', 'before_epoch', 'before_train'))
def test_an_error_before_the_first_batch(event, tmp_path):
    def f(learn, rank):
        if rank: learn.add_cb(Raises(event, ZeroDivisionError('no luck')))
        try: learn.bs_find(num_it=24, n_batch=3, show_plot=False, profile=False)
        except Exception as e: said = str(e)
        learn.remove_cb(Raises)
        learn.bs_find(num_it=24, n_batch=3, show_plot=False, profile=False)
        return said,learn.recorder.bs_stats.noise.tolist()
    (first,noise),(second,noise_too) = run_processes(tmp_path, 2, lambda rank: together(rank, f))
    assert 'Rank 1 of 2 failed' in first and 'no luck' in first and second == 'no luck' and noise == noise_too


@pytest.mark.parametrize('what', (CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException))
def test_what_is_cancelled_in_one_process(what, tmp_path):
    def f(learn, rank):
        if rank: learn.add_cb(Raises('after_pred', what(), 10))
        return find(learn, rank, num_it=80, n_batch=3)
    ranks = run_processes(tmp_path, 2, lambda rank: together(rank, f))
    assert repr(ranks[0][0]) == repr(ranks[1][0])
    found = ranks[0][0]
    assert found['run'].bs == 16 and len(found['stats']['batch']) == pytest.approx({CancelFitException: 1, CancelBatchException: 13}.get(what, 8), abs=1)  # of two epochs, of which one may have ended early


def test_the_answer_where_processes_have_different_data(tmp_path):
    ranks = run_processes(tmp_path, 2, lambda rank: by_hand(rank, (640, 48), num_it=60, n_batch=2, profile=30., regret=0))
    assert repr(ranks[0][0]) == repr(ranks[1][0]) and not ranks[0][1] and not ranks[1][1]
    assert len(ranks[0][0]['stats']['batch']) > 10


def test_an_interrupt_during_the_profile(tmp_path):
    def f(learn, rank):
        if rank: learn.add_cb(Trouble('interrupt', 60))
        try: return learn.bs_find(num_it=40, n_batch=4, show_plot=False, profile=30.)
        except BaseException as e: return str(e) or type(e).__name__
    first,second = run_processes(tmp_path, 2, lambda rank: together(rank, f))
    assert 'Rank 1 of 2 failed' in first and 'KeyboardInterrupt' in first and second == 'KeyboardInterrupt'


@pytest.mark.parametrize('ranks', ((1,), (0, 1)))
@pytest.mark.parametrize('nth', (0, 2, 7))
def test_an_interrupt_between_a_meeting_and_what_is_sent_after_it(nth, ranks, tmp_path):
    "It waits for the next meeting, and does not break the connection"
    def f(learn, rank):
        seen,all_reduce = [],torch.distributed.all_reduce
        def interrupted(t, *args, **kwargs):
            if t.numel() > 1000:  # gradients
                seen.append(len(t))
                if len(seen) == nth + 1 and rank in ranks: os.kill(os.getpid(), signal.SIGINT)
            return all_reduce(t, *args, **kwargs)
        torch.distributed.all_reduce = interrupted
        handler,before = signal.getsignal(signal.SIGINT),footprint.state(learn)
        try: learn.bs_find(num_it=48, n_batch=3, show_plot=False, profile=False)
        except BaseException as e: said = f'{type(e).__name__}: {e}'
        torch.distributed.all_reduce = all_reduce
        unchanged = not footprint.changes(before, footprint.state(learn)) and signal.getsignal(signal.SIGINT) == handler
        learn.fit(1)  # the connection still holds
        return said,unchanged
    for rank,(said,unchanged) in enumerate(run_processes(tmp_path, 2, lambda rank: together(rank, f))):
        assert unchanged and said.endswith('KeyboardInterrupt: ' if rank in ranks else 'Rank 1 of 2 failed, and the others end with it: KeyboardInterrupt')


def test_a_second_interrupt_does_not_wait(tmp_path):
    def f(learn, rank):
        if rank: learn.add_cb(Twice())
        try: learn.bs_find(num_it=48, n_batch=3, show_plot=False, profile=False)
        except BaseException as e: return type(e).__name__,time.monotonic() - started
    class Twice(Callback):
        def after_pred(self):
            for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    started = time.monotonic()
    (first,_),(second,seconds) = run_processes(tmp_path, 2, lambda rank: together(rank, f))
    assert (first, second) == ('ProcessError', 'KeyboardInterrupt') and seconds < 30


def test_batch_norm_of_each_process(tmp_path):
    def f(rank):
        learn = digits(shuffle=True)
        learn.model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
        with learn.distrib_ctx(): return find(learn, rank, num_it=40, n_batch=4)  # with synchronized batch-norm, which needs a GPU
    ranks = run_processes(tmp_path, 2, f)
    assert repr(ranks[0]) == repr(ranks[1]) and not ranks[0][1] and ranks[0][2]


def test_an_incomplete_batch_is_no_early_end(tmp_path):
    def f(rank):
        learn = digits()
        learn.dls.train.bs,learn.dls.train.drop_last = 50,True
        with learn.distrib_ctx(sync_bn=False): return find(learn, rank, num_it=6, n_batch=2)
    found,*_ = run_processes(tmp_path, 2, f)[0]
    assert found['run'].num_it == 6 and not found['run'].stopped


def test_a_step_that_one_process_leaves_out_does_not_hold_up_noise_scale(tmp_path):
    def f(learn, rank):
        if rank: learn.add_cb(Raises('before_step', CancelStepException(), 9))
        learn.fit(1, cbs=NoiseScale(share=None))
        return learn.recorder.noise_scale.noise_scale.tolist()
    first,second = run_processes(tmp_path, 2, lambda rank: together(rank, f))
    assert len(first) > 3 and len(first) == len(second)


def test_noise_scale_with_another_accumulation_is_refused(tmp_path):
    def f(learn, rank):
        try: learn.fit(1, cbs=[NoiseScale(), GradientAccumulation(32)])
        except ValueError as e: return str(e)
    for said in run_processes(tmp_path, 2, lambda rank: together(rank, f)): assert 'use AccumulateGrads(32)' in said


def test_set_bs_after_a_training_that_broke_off(tmp_path):
    def f(learn, rank):
        learn.add_cb(Raises('after_pred', ZeroDivisionError(), 3))
        try: learn.fit(1)
        except ZeroDivisionError: pass
        learn.remove_cb(Raises)
        learn.set_bs(64)
        learn.fit(1)
        return len(learn.recorder.losses),learn.dls.train.bs
    assert run_processes(tmp_path, 2, lambda rank: together(rank, f)) == [(10, 32)]*2


@pytest.mark.parametrize('inside', (True, False))
def test_after_a_training_that_broke_off(inside, tmp_path):
    "fastai leaves its wrappers on the learner then, outside of `distrib_ctx`, too"
    def broken(learn):
        learn.add_cb(Raises('after_pred', ZeroDivisionError(), 3))
        try: learn.fit(1)
        except ZeroDivisionError: pass
        learn.remove_cb(Raises)
    def find(learn):
        most = learn.max_bs()
        learn.bs_find(num_it=40, n_batch=3, show_plot=False, profile=30.)
        found = learn.recorder.bs_result
        return most,type(most),found.run.n,found.profile.max_bs >= n,type(learn.dls.train).__name__,type(learn.model).__name__
    def f(rank):
        learn = digits(shuffle=True)
        with learn.distrib_ctx(sync_bn=False):
            broken(learn)
            if inside: return find(learn)
        return find(learn)
    left = ('DataLoader', 'Sequential') if inside else ('DistributedDL', 'DistributedDataParallel')
    assert run_processes(tmp_path, 2, f) == [(n, int, n, True, *left)]*2


def test_arguments_that_differ(tmp_path):
    def f(learn, rank):
        res = []
        for kwargs in (dict(n_batch=3 + rank), dict(n_batch=3, lr=.1 + rank), dict(n_batch=3, profile=not rank), dict(n_batch=3, num_it=40 + rank)):
            try: learn.bs_find(show_plot=False, **dict(num_it=40) | kwargs)
            except ValueError as e: res.append(str(e))
        def mine(stats): return 10 + rank
        return res,learn.bs_find(num_it=40, n_batch=3, show_plot=False, profile=False, suggest_funcs=mine)[0]
    for rank,(said,suggested) in enumerate(run_processes(tmp_path, 2, lambda rank: together(rank, f))):
        assert len(said) == 4 and all('The processes call bs_find with different arguments' in s for s in said) and f'n_batch={3 + rank},' in said[0]
        assert suggested == 10


@pytest.mark.parametrize('size,bs,kwargs,msg', [(16, 8, dict(n_batch=2), 'more than the 1 batch of an epoch, and a measurement has to fit into one epoch: lower n_batch to 1 or less, or measure with smaller batches$'),
                                                (640, 32, dict(n_batch=20), 'lower n_batch to 10 or less, or measure with smaller batches, bs=5 for example'), (20, 16, {}, 'less than one batch of bs=16 per epoch, and drop_last leaves it out')])
def test_epochs_that_are_too_short(size, bs, kwargs, msg, tmp_path):
    def f(rank):
        learn = digits(range(size), bs)
        learn.dls.train.drop_last = size < 2*bs
        with learn.distrib_ctx(sync_bn=False):
            try: learn.bs_find(show_plot=False, **kwargs)
            except ValueError as e: return str(e)
    for said in run_processes(tmp_path, 2, f): assert re.search(msg, said), said


def test_before_the_processes_are_connected(tmp_path):
    def f(rank):
        res = []
        for call in (digits().bs_find, digits().max_bs):
            try: call()
            except ValueError as e: res.append(str(e))
        return res
    for said in run_processes(tmp_path, 2, f): assert len(said) == 2 and all('do this inside of learn.distrib_ctx()' in s for s in said)


def test_only_the_first_process_speaks(tmp_path):
    def f(learn, rank):
        learn.fit(2, cbs=[NoiseScale(share=None), CSVLogger(tmp_path/f'{rank}.csv')])
        learn.bs_find(num_it=40, n_batch=3, show_plot=False)
        print('end')
    run_processes(tmp_path, 2, lambda rank: together(rank, f, shuffle=True))
    assert 'The noise scale was measured' in printed(tmp_path, 0) and 'The noise scale is' in printed(tmp_path, 0)
    assert 'noise scale' not in printed(tmp_path, 1)


def test_a_number_of_processes_that_does_not_divide_the_batch_size(tmp_path):
    def f(learn, rank):
        sug = learn.bs_find(num_it=120, n_batch=3, show_plot=False, profile=False, suggest_funcs=critical)
        learn.set_bs(sug)
        return sug.critical,learn.dls.train.bs
    critical_,each = run_processes(tmp_path, 3, lambda rank: together(rank, f))[0]
    assert each == -(-critical_//3)
    assert f'bs={critical_} (3 processes × {each}' + (f', {3*each} in all)' if critical_ % 3 else ')') in printed(tmp_path, 0)
