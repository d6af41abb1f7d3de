"The memory of a step is measured as it is, the largest batch size is found without an error, and nobody can tell that it was looked for"
import gc
from functools import partial

import psutil, pytest, torch
from torch import nn
from torch.utils import data as torch_data
from torch.utils.checkpoint import checkpoint
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, Recorder, SGD, set_seed
from fastai.callback.all import MixUp
from fastai.layers import ConvLayer, Flatten, sequential

from fastai_bs_finder import memory
from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.mock import mock_training
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
    with pytest.raises(torch.OutOfMemoryError, match='Not even one example fits.*100 bytes.*margin=0.9'): quiet(learner(), lambda learn: learn.max_bs())


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
