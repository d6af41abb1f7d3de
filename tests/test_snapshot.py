"Tensors of every class are put back, or warned about"
import warnings

import pytest, torch
from torch import nn
from torch.utils import data as torch_data
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, SGD, TensorBase, set_seed
from fastai.learner import Recorder

from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.snapshot import no_footprint
from footprint import changes, forget, state


class NoSetter(TensorBase):
    "tsai's `TSTensor`, for one"
    @property
    def data(self): return self


class Frozen(torch.Tensor):
    def __setattr__(self, k, v): raise AttributeError('frozen')


class NoFunctions(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None): raise TypeError(f'{func} is not for this')


class Closed(torch.Tensor):
    "Nothing that PyTorch's class has: no `requires_grad`, `grad`, `detach`, `numel`"
    def __getattribute__(self, k):
        if not k.startswith('__'): raise RuntimeError(f'no {k}')
        return object.__getattribute__(self, k)


class Wrapper(torch.Tensor):
    "Without memory of its own: an outer tensor that knows only its inner one"
    @staticmethod
    def __new__(cls, inner): return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
    def __init__(self, inner): self.inner = inner
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): raise NotImplementedError(str(func))


def inference():
    with torch.inference_mode(): return torch.arange(6.)


def of(cls): return lambda: torch.Tensor._make_subclass(cls, torch.arange(6.))


kinds = dict(no_setter=of(NoSetter), frozen=of(Frozen), no_functions=of(NoFunctions), closed=of(Closed), wrapper=lambda: Wrapper(torch.arange(6.)), inference=inference,
             shared=lambda: torch.arange(6.).share_memory_(), view=lambda: torch.arange(9.)[3:], windows=lambda: torch.arange(6.).unfold(0, 3, 1),
             csr=lambda: torch.eye(3).to_sparse_csr(), conjugate=lambda: torch.randn(3, dtype=torch.complex64).conj(), a_parameter=lambda: nn.Parameter(of(NoSetter)()))


def memory_of(t):
    with torch._C.DisableTorchFunctionSubclass():
        if type(t) is Wrapper: return t.inner
        return torch.Tensor.values(t) if torch.Tensor.layout.__get__(t) == torch.sparse_csr else torch.Tensor.detach(t)


@pytest.mark.filterwarnings('ignore:Sparse CSR')
@pytest.mark.parametrize('kind', kinds)
def test_a_tensor_of_any_class_is_put_back(kind):
    learn,t = digits_learner(),kinds[kind]()
    learn.model.held = [t]
    was = memory_of(t).clone()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'The snapshot cannot')
        with no_footprint(learn), torch._C.DisableTorchFunctionSubclass():
            with torch.inference_mode(kind == 'inference'), torch.no_grad(): memory_of(t).mul_(3)
            assert not torch.equal(memory_of(t), was)
            if kind in ('no_setter', 'frozen', 'no_functions', 'closed'): torch.Tensor.data.__set__(t, torch.zeros(2))
    assert torch.equal(memory_of(t), was)


def test_what_cannot_be_put_back_is_warned_about():
    class Uncopied(torch.Tensor):
        "Dispatches, and has no tensor to look at"
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None): raise NotImplementedError('no copies of this')
    learn = digits_learner()
    learn.model.held = [torch.Tensor._make_wrapper_subclass(Uncopied, (3,))]
    with pytest.warns(UserWarning, match=r'cannot look into an object of .*Uncopied \(NotImplementedError'):
        with no_footprint(learn): pass


class Series(torch_data.Dataset):
    def __init__(self):
        set_seed(0)
        self.x = NoSetter(torch.randn(600, 1, 20))
        self.y = (self.x.as_subclass(torch.Tensor).mean((1, 2)) > 0).long()
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return torch.Tensor(self.x[i].as_subclass(torch.Tensor)), self.y[i]


def series():
    "A learner like those of a time series library"
    dls = DataLoaders(torch_data.DataLoader(Series(), 16, shuffle=True), torch_data.DataLoader(Series(), 64), device='cpu')
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(20, 2)), loss_func=CrossEntropyLossFlat(), opt_func=SGD)


@pytest.mark.parametrize('call', [lambda learn: learn.bs_find(.1, 60, show_plot=False), lambda learn: learn.max_bs()])
def test_a_library_with_a_tensor_class_of_its_own(call):
    learn = series()
    was = state(learn)
    call(learn)
    forget(learn)
    assert changes(was, state(learn)) == []


def test_a_training_of_that_library_is_measured():
    learn = series()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1, cbs=NoiseScale(share=None, n_batch=3))
    assert len(learn.recorder.noise_scale) > 3
