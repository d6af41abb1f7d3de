"Batches that are not drawn at random are noticed, random ones are not"
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.utils import data as torch_data
from fastai.tabular.all import Normalize, TabularDataLoaders, tabular_learner
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD
from sklearn.datasets import load_digits

from fastai_bs_finder.all import *
from fastai_bs_finder.grow import GrowBatch


def in_classes(n, k=10):
    y = torch.randint(0, k, (n,))
    return torch.randn(n, 20) + .3*y[:, None]/k*10, y


def by_class(n):
    x,y = in_classes(n)
    order = y.argsort(stable=True)
    return x[order],y[order]


def by_target(n):
    x = torch.randn(n, 20)
    y = x @ torch.randn(20) + torch.randn(n)
    order = y.argsort()
    return x[order],y[order, None]


def in_blocks(n):
    "As of several recordings, one after the other"
    x,y = by_class(n)
    blocks = torch.arange(n).split(max(n//40, 20))
    order = torch.cat([blocks[i] for i in torch.randperm(len(blocks))])
    return x[order],y[order]


def time_series(n):
    walk = torch.randn(n + 20).cumsum(0)*.1
    return walk[:-1].unfold(0, 20, 1)[:n],(walk[20:] - walk[19:-1] > 0).long()[:n]


def with_memory(n):
    noise,x = torch.randn(n, 5),torch.zeros(n, 5)
    for i in range(1, n): x[i] = .97*x[i - 1] + .25*noise[i]
    return x,(x[:, 0] + torch.randn(n) > 0).long()


def random_with_outliers(n):
    x,y = in_classes(n, 2)
    return x.exp()**2,y


def random_rare(n):
    return torch.randn(n, 20),(torch.rand(n) < .03).long()


ordered,random_ones = (by_class, by_target, in_blocks, time_series, with_memory),(in_classes, random_with_outliers, random_rare)


def alike(x, y, bs=16, shuffle=False, kind=torch_data.DataLoader, num_it=None, n_batch=5):
    "Does `bs_find` say that the batches are alike?"
    dls = DataLoaders(kind(torch_data.TensorDataset(x, y), bs, shuffle=shuffle), kind(torch_data.TensorDataset(x[:64], y[:64]), 64))
    classes = int(y.max()) + 1 if y.dtype == torch.long else 1
    loss = CrossEntropyLossFlat() if y.dtype == torch.long else nn.MSELoss()
    learn = Learner(dls, nn.Linear(x.shape[1], classes), loss_func=loss, opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): sug = learn.bs_find(1e-4, num_it, n_batch, show_plot=False, profile=False)
    result = learn.recorder.bs_result
    if result.run.alike:
        assert set(sug) == {None} and result.table is None and result.advised is None
        assert str(result).startswith('Shuffle the training data, then ask again: the training loader does not draw its batches at random') and 'interval' not in str(result)
    return result.run.alike


sizes = [500, 1500, pytest.param(10_000, marks=pytest.mark.slow), pytest.param(50_000, marks=pytest.mark.slow)]

@pytest.mark.parametrize('n', sizes)
@pytest.mark.parametrize('data', ordered)
def test_what_is_ordered_is_noticed(data, n):
    torch.manual_seed(0)
    x,y = data(n)
    assert alike(x, y)
    if n > 1000: assert alike(x, y, num_it=40)  # which sees a part of the data only


@pytest.mark.parametrize('n', sizes)
def test_what_is_random_is_not(n):
    torch.manual_seed(1)
    found = [alike(*data(n), **more) for data in random_ones for more in (dict(), dict(shuffle=True), dict(num_it=25))]
    found += [alike(*data(n), shuffle=True) for data in ordered]
    assert sum(found) == 0


@pytest.mark.parametrize('shuffle', (False, True))
def test_digits_sorted_by_class(shuffle):
    X,y = load_digits(return_X_y=True)
    order = np.argsort(y[:1500], kind='stable')
    assert alike(torch.tensor(X[order]/16).float(), torch.tensor(y[order]), shuffle=shuffle, kind=DataLoader) == (not shuffle)


def test_the_random_states_and_the_loader_are_left_alone():
    torch.manual_seed(0)
    x,y = by_class(2000)
    before = torch.get_rng_state(),np.random.get_state()[1].tolist()
    learn = Learner(DataLoaders(*(torch_data.DataLoader(torch_data.TensorDataset(x, y), 16) for _ in range(2))), nn.Linear(20, 10),
                    loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    after_init = torch.get_rng_state()
    with learn.no_bar(), learn.no_logging(): learn.bs_find(1e-4, 40, show_plot=False, profile=False)
    assert torch.equal(torch.get_rng_state(), after_init) and np.random.get_state()[1].tolist() == before[1]
    assert next(iter(learn.dls.train))[1][:16].tolist() == y[:16].tolist()


@pytest.mark.parametrize('shuffle', (False, True))
def test_along_a_training(shuffle):
    torch.manual_seed(0)
    x,y = by_class(1500)
    learn = Learner(DataLoaders(*(torch_data.DataLoader(torch_data.TensorDataset(x, y), 16, shuffle=shuffle) for _ in range(2))), nn.Linear(20, 10),
                    loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=NoiseScale(share=None, every=20))
    result = learn.recorder.noise_scale_result
    assert result.alike == (not shuffle) and ('does not draw its batches at random' in str(result)) == (not shuffle)


def without_categories():
    torch.manual_seed(0)
    df = pd.DataFrame(torch.randn(400, 4).numpy(), columns=list('abct'))
    return tabular_learner(TabularDataLoaders.from_df(df, cont_names=list('abc'), y_names='t', procs=[Normalize], bs=16))


class Ragged(nn.Module):
    def __init__(self): super().__init__(); self.net = nn.Linear(6, 4)
    def forward(self, xs): return self.net(torch.stack([x.mean(0) for x in xs]))


def of_lists():
    torch.manual_seed(0)
    items = [(torch.randn(int(k), 6), t) for k,t in zip(torch.randint(1, 5, (400,)), torch.randint(0, 4, (400,)))]
    def collate(b): return [x for x,_ in b],torch.stack([t for _,t in b])
    dls = DataLoaders(*(torch_data.DataLoader(items, 16, shuffle=True, collate_fn=collate) for _ in range(2)))
    return Learner(dls, Ragged(), loss_func=nn.functional.cross_entropy, opt_func=SGD)


@pytest.mark.parametrize('make', (without_categories, of_lists))
def test_batches_that_are_not_plain_tensors(make):
    learn = make()
    with learn.no_bar(), learn.no_logging():
        learn.bs_find(.01, 40, 5, show_plot=False, profile=False)
        learn.fit(1, .01, cbs=NoiseScale(share=None, every=5))
        learn.fit(1, .01, cbs=GrowBatch(n_batch=2))
    assert len(learn.recorder.bs_stats) and len(learn.recorder.noise_scale)


def test_the_same_random_order_in_each_epoch_is_random():
    found = []
    for seed in range(10):
        torch.manual_seed(seed)
        found.append(alike(*in_classes(200), num_it=100, n_batch=5))
    assert sum(found) <= 1
