"The tasks on which predictions are compared with real training: data, model, optimizer and the training losses to reach"
from functools import cache, partial
from typing import NamedTuple

import numpy as np, pandas as pd, torch
from filelock import FileLock
from PIL import Image
from torch import nn
from fastai.basics import Adam, CrossEntropyLossFlat, DataLoader, DataLoaders, IndexSplitter, Learner, SGD, URLs, get_image_files, set_seed, untar_data
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, tabular_learner

from common import here, NoValid


def read(folder):
    "Pixels and classes, which are the names of folders; kept in build/ for the next benchmark, since 60,000 files take half a minute"
    kept = here.parent/'build'/f'{folder.parent.name}-{folder.name}.pt'
    kept.parent.mkdir(exist_ok=True)
    with FileLock(f'{kept}.lock'):  # two processes need it at the same time
        if not kept.exists():
            files = get_image_files(folder)
            classes = sorted({f.parent.name for f in files})
            part = kept.with_suffix('.part')
            torch.save((torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files]), torch.tensor([classes.index(f.parent.name) for f in files])), part)
            part.replace(kept)
    return torch.load(kept)


class Images:
    "A data set of images in memory, and their labels by the names of their folders"
    def __init__(self, folder):
        x,self.y = read(folder)
        x = (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)).float()
        dims = 0, 2, 3
        self.x = ((x - x.mean(dims, keepdim=True))/x.std(dims, keepdim=True)).contiguous()
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]
    def batch(self, idxs): return self.x[idxs],self.y[idxs]


@cache
def images(url, part): return Images(untar_data(url)/part)


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


class Task(NamedTuple):
    learner: callable # `learner(bs)`: a fresh one
    targets: tuple # Training losses to reach, falling
    lr: float # A learning rate that works at batch size 64
    opt: str = 'sgd' # Rule by which it is scaled

    def make(self, bs, seed):
        set_seed(seed)
        learn = self.learner(bs)
        learn.add_cb(NoValid()).remove_cb(ProgressCallback)
        learn.logger = noop
        return learn


_mnist,_cifar = partial(image_learner, URLs.MNIST, 'training', mlp), partial(image_learner, URLs.CIFAR, 'train', convnet)
tasks = {
    'MNIST, MLP, SGD': Task(partial(_mnist, SGD), (.2, .1), .2),
    'MNIST, MLP, Adam': Task(partial(_mnist, Adam), (.2, .1), 2e-3, 'adam'),
    'ADULT, tabular_learner, Adam': Task(adult_learner, (.345, .338), 4e-3, 'adam'),
    'CIFAR-10 subset, ConvNet, SGD': Task(partial(_cifar, SGD), (1.5, 1.3), .1),
    'CIFAR-10 subset, ConvNet, Adam': Task(partial(_cifar, Adam), (1.5, 1.3), 2e-3, 'adam'),
}
