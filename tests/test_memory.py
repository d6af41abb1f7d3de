"The memory of a step is measured as it is, the largest batch size is found without an error, and nobody can tell that it was looked for"
import errno, gc, sys
from functools import partial

import numpy as np, psutil, pytest, torch
from torch import nn
from torch.utils import data as torch_data
from torch.utils.checkpoint import checkpoint
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, Recorder, SGD, set_seed
from fastai.callback.all import MixUp
from fastai.layers import ConvLayer, Flatten, sequential

from fastai_bs_finder import memory
from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.mock import mock_training, out_of_memory
from footprint import changes, forget, state
from learners import digits, loaders, maker, mlp, plain_pytorch, stream, tabular


def learner(model=None, bs=16, n=480, **kwargs):
    set_seed(1)
    X,y = digits()
    dls = loaders(list(zip(X[:n], y[:n])), device='cpu')
    dls.train.bs = bs
    return Learner(dls, model or mlp(), loss_func=CrossEntropyLossFlat(), **kwargs)


def convnet(): return sequential(nn.Unflatten(1, (1, 8, 8)), ConvLayer(1, 16), ConvLayer(16, 32, stride=2), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(32, 10))


class RowsLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm,self.out = nn.LSTM(8, 32, batch_first=True),nn.Linear(32, 10)

    def forward(self, x): return self.out(self.lstm(x.unflatten(1, (8, 8)))[0][:, -1])


kinds = {'MLP': lambda data: learner(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))), 'ConvNet': lambda data: learner(convnet()), 'LSTM': lambda data: learner(RowsLSTM()), 'tabular': lambda data: tabular(data('adult_sample'))}

@pytest.mark.parametrize('kind', kinds)
def test_a_line_through_two_small_probes(kind, fastai_data):
    learn = kinds[kind](fastai_data)
    with mock_training(learn):
        meter = memory._step_bytes(learn)
        for bs in (16, 60): meter.measure(learn, bs)
        predicted = meter.memory.bytes(480)
        size,found = meter.measure(learn, 480)
    assert size == 480 and predicted == pytest.approx(found, rel=.1)


def allocated(learn, bs):
    "The peak of what PyTorch's profiler sees allocated up to the end of the second backward pass"
    import torch.profiler as tp
    class Stop(Callback):
        def after_backward(self):
            if self.train_iter == 1: raise KeyboardInterrupt
    learn.dls.train.bs = bs
    with tp.profile(activities=[tp.ProfilerActivity.CPU], profile_memory=True) as p, pytest.raises(KeyboardInterrupt): learn.fit(9, 0., cbs=Stop())
    now,peak = 0,0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def measured(learn, *sizes):
    with mock_training(learn):
        meter = memory._step_bytes(learn)
        return [meter.measure(learn, bs)[1] for bs in sizes][-1]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.out = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)]),nn.Linear(64, 10)

    def forward(self, x): return self.out(checkpoint(self.body, x, use_reentrant=False))


@pytest.mark.parametrize('model', [mlp, convnet, RowsLSTM, Checkpointed, lambda: torch.jit.script(mlp())], ids=['MLP', 'ConvNet', 'LSTM', 'checkpoint', 'TorchScript'])
def test_what_the_profiler_sees(model):
    ratio = measured(learner(model(), opt_func=SGD), 240)/allocated(learner(model(), opt_func=SGD), 240)
    assert .9 <= ratio <= 1.4


def test_views_and_weights_do_not_count_and_nothing_is_kept():
    w = torch.zeros(100, 100, requires_grad=True)
    with memory._Allocations() as made:
        made_before = made.now
        w.T[:10].view(10, 100).detach().add_(1)
        assert made.now == made_before == 0
        y = torch.ones(100, 100) + 1
        z = [y[i] for i in range(9)],y.T,dict(a=y)
        s = torch.sparse_coo_tensor(torch.tensor([[0, 5]]), torch.ones(2, 100), (10**9, 100))
        assert 40_000 <= made.now <= 42_000
    loss = (w*2).exp().sum()
    with made: loss.backward()
    del y,z,s,loss,w
    gc.collect()
    assert made.now == 0 and not made.live


weights = sum(p.numel()*4 for p in mlp().parameters())

def torch_opt(opt): return partial(OptimWrapper, opt=opt)


@pytest.mark.parametrize('opt_func,plain,copies', [(partial(SGD, mom=.9), SGD, 1), (Adam, SGD, 2), (torch_opt(torch.optim.Adam), torch_opt(torch.optim.SGD), 2)], ids=['momentum', 'Adam', 'torch.optim.Adam'])
def test_state_that_the_optimizer_will_allocate(opt_func, plain, copies):
    stepped = learner(opt_func=opt_func)
    stepped.fit(1, 1e-3)
    fresh,after,none = (measured(l, 16, 240) for l in (learner(opt_func=opt_func), stepped, learner(opt_func=plain)))
    assert fresh - none == pytest.approx(copies*weights, rel=.1) and after - none == pytest.approx(0, abs=.1*weights)


class Full(nn.Module):
    "Runs out of memory above `most` examples, and says so to `events`"
    def __init__(self, net, most, events):
        super().__init__()
        self.net,self.most,self.note = net,most,events.__iadd__

    def forward(self, x):
        self.note([len(x)])
        if len(x) > self.most: raise torch.OutOfMemoryError(f'{len(x)} examples')
        return self.net(x)


def quiet(learn, f):
    "The result of `f`, after which `learn` is as it was"
    was = state(learn)
    try: return f(learn)
    finally:
        forget(learn)
        assert changes(was, state(learn)) == []


@pytest.mark.parametrize('most', [3, 20, 70, 300])
def test_out_of_memory(most):
    tried = []
    res = quiet(learner(Full(mlp(), most, tried), bs=64), lambda learn: learn.max_bs(check=True))
    failed = [b for b in tried if b > most]
    assert .6*most <= res <= most and len(failed) == len(set(failed)) <= 6


def test_nothing_fits():
    learn = learner(Full(mlp(), 1, []), bs=64)
    with pytest.raises(torch.OutOfMemoryError, match='not even with a batch of 2'): quiet(learn, lambda learn: learn.max_bs())


def test_one_example_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, '_host_available', lambda: 100)
    with pytest.raises(torch.OutOfMemoryError, match='Not even one example fits.*margin=0.9.*100 bytes'): quiet(learner(), lambda learn: learn.max_bs())


def test_a_failed_step_is_let_go():
    learn = learner(Full(mlp(), 60, []))
    with mock_training(learn):
        meter = memory._step_bytes(learn)
        meter.measure(learn, 16)
        was = meter.counting.now
        assert meter.measure(learn, 400) == (400, float('inf')) and meter.counting.now <= was


@pytest.fixture
def gpu(monkeypatch):
    "A function: from now on `torch.cuda` is a GPU of `total` bytes, in which a step with `b` examples takes `peak(b)`; returns the sizes that ran out of memory"
    def make(total, peak, others=0, reserved=0, fraction=1.):
        now,failed = [0],[]
        class Simulated(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp()

            def forward(self, x):
                now[0] = max(now[0], peak(len(x)))
                if peak(len(x)) > min(total - others, total*fraction):
                    failed.append(len(x))
                    raise torch.OutOfMemoryError('CUDA out of memory')
                return self.net(x)
        for name,f in dict(reset_peak_memory_stats=lambda d: now.__setitem__(0, 0), max_memory_allocated=lambda d: now[0], mem_get_info=lambda d: (total - others - reserved, total),
                           memory_reserved=lambda d: reserved, get_per_process_memory_fraction=lambda d: fraction, empty_cache=lambda: None).items(): monkeypatch.setattr(torch.cuda, name, f)
        monkeypatch.setattr(memory, '_device', lambda learn: torch.device('cuda', 0))
        return Simulated(),failed
    return make


@pytest.mark.parametrize('reserved', [0, 400_000])
@pytest.mark.parametrize('bs', [1, 2, 8, 64, 256])
def test_on_a_gpu_the_limit_is_found_without_running_into_it(gpu, bs, reserved):
    model,failed = gpu(10**6, lambda b: 50_000 + 2_000*b, others=100_000, reserved=reserved)
    assert quiet(learner(model, bs=bs), lambda learn: learn.max_bs()) == (.9*900_000 - 50_000)//2_000
    assert quiet(learner(model, bs=bs), lambda learn: learn.max_bs(1.)) == 425 and not failed


def test_on_a_gpu_a_limit_of_the_process_counts(gpu):
    model,failed = gpu(10**6, lambda b: 50_000 + 2_000*b, others=100_000, fraction=.5)
    assert quiet(learner(model), lambda learn: learn.max_bs(1.)) == 225 and not failed


def test_memory_is_that_of_the_device_on_which_fit_trains(monkeypatch):
    "Loaders of PyTorch have no device: fastai moves the model to the default one"
    monkeypatch.setattr(memory, 'default_device', lambda: torch.device('meta'))
    assert memory._device(plain_pytorch()).type == 'meta' and memory._device(learner()).type == 'cpu'


@pytest.mark.parametrize('peak', [lambda b: 50_000 + 8*b**2, lambda b: 50_000 + 1_000*b + 400_000*(b > 100), lambda b: max(200_000, 2_500*b), lambda b: 50_000 + 30_000*b**.5], ids=['square', 'jump', 'kink', 'root'])
@pytest.mark.parametrize('bs', [4, 16, 64])
def test_on_a_gpu_whose_memory_is_no_line(gpu, peak, bs):
    tried = []
    model,failed = gpu(10**6, lambda b: tried.append(b) or peak(b))
    most = max(b for b in range(1, 481) if peak(b) <= .9*10**6)
    res = quiet(learner(model, bs=bs), lambda learn: learn.max_bs())
    assert .6*most <= res and peak(res) <= 10**6 and len(failed) <= 6
    assert all(b <= 8*a for a,b in zip(tried, tried[1:]))


def test_on_a_gpu_an_in_use_size_that_does_not_fit(gpu):
    model,failed = gpu(10**6, lambda b: 50_000 + 10_000*b)
    assert quiet(learner(model, bs=400), lambda learn: learn.max_bs()) == pytest.approx(85, abs=20) and len(failed) == 1


@pytest.mark.cuda
@pytest.mark.parametrize('model', [lambda: nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 10)), lambda: sequential(nn.Unflatten(1, (2, 16, 16)), ConvLayer(2, 32), ConvLayer(32, 64, stride=2), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(64, 10))], ids=['MLP', 'ConvNet'])
def test_on_a_gpu_against_bisection(model, request):
    def small():
        set_seed(1)
        dl = torch_data.DataLoader(torch_data.TensorDataset(torch.rand(200_000, 512), torch.randint(10, (200_000,))), 64, drop_last=True)
        class Move(Callback):
            order = -60
            def before_batch(self): self.learn.xb,self.learn.yb = ([t.cuda() for t in b] for b in (self.xb, self.yb))
        return Learner(DataLoaders(dl, dl), model().cuda(), loss_func=CrossEntropyLossFlat(), cbs=Move())
    gc.collect()
    torch.cuda.empty_cache()
    request.addfinalizer(lambda: torch.cuda.set_per_process_memory_fraction(1.))
    torch.cuda.set_per_process_memory_fraction(2*2**30/torch.cuda.mem_get_info()[1])  # a GPU with 2 GB
    res = small().max_bs()
    learn,fits,fails = small(),1,200_001
    with mock_training(learn):
        meter = memory._step_bytes(learn)
        while fails - fits > max(.02*fits, 1):
            bs = (fits + fails)//2
            if meter.measure(learn, bs)[1] == float('inf'): fails = bs
            else: fits = bs
    assert .75*fits <= res <= fits


def fixed_batches():
    X,y = digits()
    dl = torch_data.DataLoader(torch_data.TensorDataset(X[:480], y[:480]), batch_sampler=[list(range(i, i + 16)) for i in range(0, 480, 16)])
    return Learner(DataLoaders(dl, dl), mlp(), loss_func=CrossEntropyLossFlat())


def deaf():
    "A loader that goes on with its 16"
    learn = learner()
    learn.dls.train.create_batches = DataLoader(learn.dls.train.dataset, bs=16).create_batches
    return learn


@pytest.mark.parametrize('make', [fixed_batches, deaf])
def test_a_loader_that_does_not_listen(make):
    with pytest.raises(ValueError, match='DataLoader, does not make batches of another size.*batch_sampler'): quiet(make(), lambda learn: learn.max_bs())
    learn = make()
    with mock_training(learn): assert estimate_memory(learn) is None


def frozen():
    learn = learner()
    learn.model.requires_grad_(False)
    return learn


@pytest.mark.parametrize('make,kwargs,message', [
    *[(learner, dict(margin=m), rf'margin={m!r} is not a number in \(0, 1\]: give') for m in (0, -1, 1.1, float('nan'), True, '1', None)],
    (frozen, {}, 'no trainable parameters.*unfreeze'), (partial(learner, n=10), {}, '10 examples make no batch of bs=16.*Lower bs'),
    (partial(learner, model=nn.LazyLinear(10)), {}, 'lazy layers')])
def test_bad_input(make, kwargs, message):
    with pytest.raises(ValueError, match=message): quiet(make(), lambda learn: learn.max_bs(**kwargs))


def test_at_most_the_training_set(monkeypatch):
    monkeypatch.setattr(memory, '_host_available', lambda: 10**12)
    assert learner().max_bs() == 480 and digits_learner().max_bs() == 1500
    assert stream().max_bs() > 10**6
    assert stream().max_bs(check=True) == 480


def test_without_a_recorder():
    learn = learner()
    learn.remove_cb(Recorder)
    assert learn.max_bs() == 480


makers = ['tabular: TabularDataLoaders, embeddings', 'text: language_model_learner', 'text: text_classifier_learner', 'collaborative filtering: sparse embeddings, SparseAdam',
          'plain PyTorch: model and loaders', 'plain PyTorch: LSTM over PackedSequence', 'batches with dictionaries', 'a stream without a length, fastai loader', 'a stream without a length, PyTorch loader']

@pytest.mark.parametrize('check', [False, True])
@pytest.mark.parametrize('name', makers)
def test_no_footprint(name, check, fastai_data, monkeypatch):
    monkeypatch.setattr(memory, '_host_available', lambda: 2*10**7)
    make,_ = maker(name, fastai_data)
    learn = make()
    first = quiet(learn, lambda learn: learn.max_bs(check=check))
    assert first >= 1 and quiet(learn, lambda learn: learn.max_bs(check=check)) == pytest.approx(first, rel=.05)


@pytest.mark.parametrize('at', ['forward', 'backward', 'loader'])
def test_no_footprint_after_an_exception(at):
    learn = learner(opt_func=Adam, cbs=MixUp(.4))
    learn.fit(1, 1e-3)
    def fail(*args): raise RuntimeError('as planned')
    if at == 'forward': learn.model.register_forward_pre_hook(fail)
    if at == 'backward': learn.model[0].weight.register_hook(fail)
    if at == 'loader': learn.dls.train.after_item = fail
    with pytest.raises(RuntimeError, match='as planned'): quiet(learn, lambda learn: learn.max_bs())
    with memory._Allocations() as made: pass
    torch.zeros(10)
    assert made.now == 0


def test_available(tmp_path, monkeypatch):
    free = psutil.virtual_memory().available
    def write(folder, **files):
        for name,text in files.items(): (folder/name.replace('__', '.')).write_text(text)
    assert memory._host_available(tmp_path) == pytest.approx(free, rel=.5)
    (tmp_path/'memory').mkdir()
    write(tmp_path/'memory', memory__limit_in_bytes='5000', memory__usage_in_bytes='4000', memory__stat='cache 1\ninactive_file 300\n')
    assert memory._host_available(tmp_path) == 1300
    write(tmp_path, memory__max='max\n', memory__current='4000\n', memory__stat='inactive_file 0\n')
    assert memory._host_available(tmp_path) == 1300
    write(tmp_path, memory__max='4100\n')
    assert memory._host_available(tmp_path) == 100
    write(tmp_path, memory__max='3000\n')
    assert memory._host_available(tmp_path) == 0


too_large = {k: RuntimeError(v) for k,v in dict(
    cuda='CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.80 GiB total capacity)', cuda_runtime='CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported',
    cublas='CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`', cublas_handle='CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`',
    cudnn='cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.',  # pytorch#22496: a convolution, from 42 examples on
    cudnn_host='cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED', cufft='cuFFT error: CUFFT_ALLOC_FAILED',
    mps='MPS backend out of memory (MPS allocated: 7.23 GB, other allocations: 1.54 GB, max allowed: 9.07 GB). Tried to allocate 896.00 MB on private pool.',  # accelerate#4226
    mps_buffer='Invalid buffer size: 14.60 GB', hip='HIP out of memory. Tried to allocate 2.00 GiB', npu='NPU out of memory. Tried to allocate 2.00 GiB', xpu='XPU out of memory. Tried to allocate 2.00 GiB',
    xpu_native='Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)', hpu='FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1234',
    cpu="[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 35896320000 bytes. Error code 12 (Cannot allocate memory)",  # anomalib#1094
    cpu_windows='[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 31850496000 bytes.', bad_alloc='std::bad_alloc',
    index='Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false.',  # pytorch#80020
    index_of_an_operator='input tensor must fit into 32-bit index math', range='integer out of range', elements='nonzero is not supported for tensors with more than INT_MAX elements',
    grid='CUDA error: invalid configuration argument', launch='CUDA error: too many resources requested for launch',  # pytorch#16998
    mmap='unable to mmap 8216 bytes from file </torch_1>: Cannot allocate memory (12)', worker_killed='DataLoader worker (pid 6000) is killed by signal: Killed. ',
    worker='Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "collate.py", line 47, in collate\n    return torch.cat(imgs)\n'
           "RuntimeError: [enforce fail at CPUAllocator.cpp:64] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 402653184 bytes.",  # arcgis-python-api#743
    numpy_in_a_worker='Caught _ArrayMemoryError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "data.py", line 4, in get\n    x = np.zeros(n)\n'
           'numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB for an array with shape (1, 2)',
    in_a_callback='Exception occured in `Some` when calling event `after_batch`:\n\tCUDA out of memory. Tried to allocate 2.00 GiB').items()}
too_large |= dict(torch=torch.OutOfMemoryError('no more'), python=MemoryError(), system=OSError(errno.ENOMEM, 'Cannot allocate memory'),
                  numpy=ValueError('array is too big; `arr.size * arr.dtype.itemsize` is larger than the maximum possible size.'))
others = [RuntimeError(s) for s in (
    'unsupported memory format option Contiguous', 'the memory bank is full', 'ran out of memory slots', 'index out of range in self', 'CUDA error: an illegal memory access was encountered',
    'value cannot be converted to type at::Half without overflow', 'cannot allocate a slot in the memory network', "shape '[16, 64]' is invalid for input of size 4096", 'selected index k out of range',
    'Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "d.py", line 4, in get\n    raise RuntimeError("no CUDA out of memory.")\nRuntimeError: bad item')]
others += [KeyError('out of memory'), ValueError('out of memory.'), OSError(errno.ENOENT, 'memory')]


def raised(f):
    try: f()
    except Exception as e: return e


@pytest.mark.parametrize('kind', too_large)
def test_errors_that_mean_too_large(kind):
    error = too_large[kind]
    def wrapped(how):
        try: raise error
        except Exception as e:
            if how == 'from': raise ValueError('the batch failed') from e
            if how == 'none': raise ValueError('the batch failed') from None
            raise ValueError('the batch failed')
    assert out_of_memory(error) and all(out_of_memory(raised(lambda: wrapped(how))) for how in ('from', 'none', ''))
    if sys.version_info >= (3, 11): assert out_of_memory(ExceptionGroup('all', [ValueError('another'), ExceptionGroup('some', [error])]))  # noqa: F821


@pytest.mark.parametrize('error', others, ids=lambda e: str(e)[:30])
def test_errors_that_do_not(error): assert not out_of_memory(error)


def test_allocators_of_this_machine():
    assert all(out_of_memory(raised(f)) for f in (lambda: torch.empty(10**15), lambda: np.zeros((10**9, 10**9)), lambda: torch.empty(2**62, 8)))


def test_what_the_caller_was_handling_does_not_count():
    "`except torch.OutOfMemoryError: learn.max_bs()`"
    def ragged(): raise ValueError('ragged')
    def caught():
        try: ragged()
        except Exception as e: return out_of_memory(e)
    try: raise torch.OutOfMemoryError('before')
    except torch.OutOfMemoryError: assert not caught()


@pytest.mark.parametrize('kind', ['cublas', 'cudnn', 'mps', 'cpu', 'index', 'grid', 'worker', 'numpy'])
def test_all_of_them_are_backed_off_from(kind, capsys):
    "In `max_bs`, the profile and the sweep"
    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def forward(self, x):
            if self.training and len(x) > 40: raise type(too_large[kind])(*too_large[kind].args)
            return self.net(x)
    assert 24 <= quiet(learner(Limited()), lambda learn: learn.max_bs(check=True)) <= 40
    learn = learner(Limited())
    learn.bs_find(.1, 200, show_plot=False, profile=2.)
    assert learn.recorder.bs_fits < 64
    learn = learner(Limited())
    was = state(learn)
    assert set(learn.bs_sweep([16, 64], lrs=[.1], budget=dict(steps=5), n_eval=256, show_plot=False).bs) == {16}
    assert 'bs=64 does not fit in memory' in capsys.readouterr().out
    forget(learn)
    assert changes(was, state(learn)) == []


class Only(nn.Module):
    "A model whose hidden state is made for some batch sizes"
    def __init__(self, works):
        super().__init__()
        self.net,self.works = mlp(),works
    def forward(self, x):
        if self.training and not self.works(len(x)): raise RuntimeError(f'Expected hidden size (1, 16, 32), got [1, {len(x)}, 32]')
        return self.net(x)


def only(works, bs=16):
    learn = learner(Only(works), bs=bs)
    learn.dls.train.drop_last = True
    return learn


sizes_that_work = [(lambda n: n == 16, 16, 16, 'Only batches of 16 examples work here'), (lambda n: n == 1, 1, 1, 'Only batches of 1 example work here'), (lambda n: n == 3, 3, 3, 'Only batches of 3 examples'),
                   (lambda n: n <= 64, 16, 64, 'Batches of more than 64 examples fail here'), (lambda n: n <= 40, 16, range(33, 41), 'Batches of more than'), (lambda n: n >= 12, 16, 480, 'Batches of fewer than 16 examples fail')]


@pytest.mark.parametrize('check', [None, True])
@pytest.mark.parametrize('works,bs,most,words', sizes_that_work)
def test_sizes_that_fail_for_another_reason(works, bs, most, words, check, capsys):
    learn = only(works, bs)
    res = learn.max_bs(check=check)
    said = capsys.readouterr().out
    assert (res in most if isinstance(most, range) else res == most) and learn.recorder.bs_fits == res
    assert words in said and 'Expected hidden size' in said and said.count('\n') == 1


def test_ragged_items_that_do_not_collate(capsys):
    items = [(torch.randn(2 + i % 7, 64), torch.tensor(i % 2)) for i in range(120)]
    learn = Learner(DataLoaders(*(DataLoader(d, bs=1, shuffle=True) for d in (items, items[:20]))), nn.Sequential(nn.Linear(64, 2), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten()), loss_func=CrossEntropyLossFlat())
    assert learn.max_bs() == 1
    assert 'not the same size' in capsys.readouterr().out


def test_the_size_in_use_fails_with_the_error_itself():
    with pytest.raises(RuntimeError, match='Expected hidden size'): quiet(only(lambda n: n == 5), lambda learn: learn.max_bs())
