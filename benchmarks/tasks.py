"The tasks on which predictions are compared with real training: data, model, optimizer and the training losses to reach"
from functools import cache, partial
from typing import NamedTuple

import pandas as pd
from torch import nn
from fastai.basics import Adam, CrossEntropyLossFlat, DataLoader, DataLoaders, IndexSplitter, Learner, SGD, URLs, set_seed, untar_data
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, tabular_learner

import recipe_tasks as recipe
from common import NoValid
from images import Images, images


def image_learner(url, part, model, opt_func, bs):
    ds = images(url, part)
    dl = DataLoader(ds, bs=bs, shuffle=True, drop_last=True, indexed=True, create_item=noop, create_batch=partial(Images.batch, ds))
    return Learner(DataLoaders(dl, dl, device='cpu'), model(), loss_func=CrossEntropyLossFlat(), opt_func=opt_func)


def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def convnet():
    def block(a, b): return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(nn.AvgPool2d(2), block(3, 16), block(16, 32), block(32, 64), nn.Flatten(), nn.Linear(64*2*2, 10))


@cache
def adult():
    df = pd.read_csv(untar_data(URLs.ADULT_SAMPLE)/'adult.csv', skipinitialspace=True)
    return TabularPandas(df, [Categorify, FillMissing, Normalize], ['workclass', 'education', 'marital-status', 'occupation', 'relationship', 'race'],
                         ['age', 'fnlwgt', 'education-num'], 'salary', splits=IndexSplitter(range(800, 1000))(df))


def adult_learner(bs): return tabular_learner(adult().dataloaders(bs=bs))


sizes = 16, 64, 256, 1024, 4096

class Task(NamedTuple):
    learner: callable # `learner(bs)`: a fresh one
    targets: tuple # Training losses to reach, falling
    lr: float # A learning rate that works at batch size 64
    opt: str = 'sgd' # Rule by which it is scaled
    sizes: tuple = sizes # Batch sizes to train with
    hessian: bool = True # Can its Hessian's noise scale be had in reasonable time?

    def make(self, bs, seed):
        set_seed(seed)
        learn = self.learner(bs)
        learn.add_cb(NoValid()).remove_cb(ProgressCallback)
        learn.logger = noop
        return learn


def with_horizon_in_examples(learner, bs):
    "A learner whose second moments look back on as many examples at every batch size, see Marek et al. 2025, within the bounds that they found to be safe"
    learn = learner(bs)
    learn.opt_func = partial(learn.opt_func, sqr_mom=min(max(.99**(bs/64), .9), .9999))
    return learn


_mnist,_cifar = partial(image_learner, URLs.MNIST, 'training', mlp), partial(image_learner, URLs.CIFAR, 'train', convnet)
tasks = {
    'MNIST, MLP, SGD': Task(partial(_mnist, SGD), (.2, .1), .2),
    'MNIST, MLP, Adam': Task(partial(_mnist, Adam), (.2, .1), 2e-3, 'adam'),
    'ADULT, tabular_learner, Adam': Task(adult_learner, (.345, .338), 4e-3, 'adam'),
    'CIFAR-10 subset, ConvNet, SGD': Task(partial(_cifar, SGD), (1.5, 1.3), .1),
    'CIFAR-10 subset, ConvNet, Adam': Task(partial(_cifar, Adam), (1.5, 1.3), 2e-3, 'adam'),
    'MNIST, ConvNet with batch-norm, Adam': Task(recipe.tasks['MNIST, ConvNet'].learner, (.04,), 3e-3, 'adam', sizes[:-1], False),
    'MovieLens sample, collab_learner, Adam': Task(recipe.movielens_learner, (.05,), 5e-3, 'adam', sizes[:-1], False),
    'Rossmann, tabular_learner, Adam': Task(recipe.rossmann_learner, (.045,), 2e-3, 'adam', sizes[:-1], False),
    'Surnames, LSTM, Adam': Task(recipe.tasks['Surnames, LSTM'].learner, (.25,), 4e-3, 'adam', sizes[:-1], False),
}
