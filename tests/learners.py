"Learners of every kind that fastai users have, on real data: small parts of it, and small networks, so that each test takes seconds"
from functools import lru_cache, partial

import numpy as np, pandas as pd, torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils import data as torch_data
from fastai.basics import CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, Learner, OptimWrapper, RandomSplitter, accuracy, set_seed
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, TabularPandas, tabular_learner
from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner
from fastai.vision.all import ConvLayer, ImageBlock, MaskBlock, ImageDataLoaders, aug_transforms, parent_label, resnet18, unet_learner, vision_learner

cats,conts = ['workclass', 'education', 'marital-status', 'occupation', 'relationship', 'race'],['age', 'fnlwgt', 'education-num']


@lru_cache
def adult(path): return pd.read_csv(path/'adult.csv')[:1200]


def tabular(path, procs=(Categorify, FillMissing, Normalize), **kwargs):
    dls = TabularDataLoaders.from_df(adult(path).copy(), path, procs=list(procs), cat_names=cats, cont_names=conts, y_names='salary', bs=32, **kwargs)
    return tabular_learner(dls, [32, 16], metrics=accuracy)


def tabular_pandas(path):
    df = adult(path).copy()
    to = TabularPandas(df, [Categorify, FillMissing, Normalize], cats, conts, 'salary', splits=RandomSplitter(seed=1)(df))
    return tabular_learner(to.dataloaders(bs=32), [32, 16], metrics=accuracy)


def images(fnames, label, **kwargs): return ImageDataLoaders.from_path_func('.', fnames, label, bs=8, num_workers=0, **kwargs)


@lru_cache
def files(folder, n):
    "The first `n` files of each class, in one list"
    return [f for c in sorted(folder.iterdir()) for f in sorted(c.iterdir())[:n]]


def mnist_frozen(path):
    learn = vision_learner(images(files(path/'train', 110), parent_label, batch_tfms=aug_transforms(do_flip=False)), resnet18, pretrained=False, metrics=accuracy)
    learn.freeze()
    return learn


def cifar_unfrozen(path):
    learn = vision_learner(images(files(path/'train', 22), parent_label), resnet18, pretrained=False, metrics=accuracy)
    learn.unfreeze()
    return learn


def small_body(pretrained=False): return nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), ConvLayer(16, 32, stride=2), nn.Identity())


def segmentation(path):
    from PIL import Image
    def pen(f): return (np.asarray(Image.open(f)) > 100).astype(np.uint8)
    block = DataBlock((ImageBlock, MaskBlock(['paper', 'pen'])), get_items=lambda _: files(path/'train', 50), get_y=pen, splitter=RandomSplitter(seed=1))
    return unet_learner(block.dataloaders('.', bs=4, num_workers=0), small_body, pretrained=False, n_out=2, cut=3)


@lru_cache
def texts(path, is_lm):
    df = pd.read_csv(path/'texts.csv')[:50 if is_lm else 120]
    return TextDataLoaders.from_df(df, path, text_col='text', label_col='label', is_lm=is_lm, valid_pct=.2, bs=8, seq_len=40)


def fresh(dls):
    "The same data in new loaders, whose random generators start from the seed"
    set_seed(1)
    return DataLoaders(*(dl.new() for dl in dls.loaders), path=dls.path)


def small(config): return config | dict(emb_sz=16, n_hid=32, n_layers=2)


def language_model(path): return language_model_learner(fresh(texts(path, True)), AWD_LSTM, config=small(awd_lstm_lm_config), pretrained=False, metrics=accuracy)


def text_classifier(path): return text_classifier_learner(fresh(texts(path, False)), AWD_LSTM, config=small(awd_lstm_clas_config), pretrained=False, seq_len=40, max_len=80, metrics=accuracy)


def ratings(path): return CollabDataLoaders.from_df(pd.read_csv(path/'ratings.csv')[:1500], bs=32)


def collab(path, **kwargs): return collab_learner(ratings(path), n_factors=8, y_range=(0, 5.5), **kwargs)


def collab_nn(path): return collab(path, use_nn=True, layers=[16])


def collab_sparse(path):
    learn = collab(path, opt_func=partial(OptimWrapper, opt=torch.optim.SparseAdam))
    for m in learn.model.modules():
        if isinstance(m, nn.Embedding): m.sparse = True
    return learn


@lru_cache
def digits():
    from sklearn.datasets import load_digits
    X,y = load_digits(return_X_y=True)
    return torch.tensor(X/16).float(),torch.tensor(y)


def torch_loaders(collate=None, n=480, **kwargs):
    X,y = digits()
    def loader(sl): return torch_data.DataLoader(torch_data.TensorDataset(X[sl], y[sl]), 16, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(5), collate_fn=collate, **kwargs)
    return DataLoaders(loader(slice(n)), loader(slice(n, n + 100)))


def loaders(items, n_valid=100, **kwargs):
    "fastai's loaders of `items`: shuffled for training, the first `n_valid` again for validation"
    return DataLoaders(*(DataLoader(d, bs=16, shuffle=s, drop_last=s) for d,s in ((items, True), (items[:n_valid], False))), **kwargs)


def mlp(n_out=10): return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, n_out))


def plain_pytorch(**kwargs): return Learner(torch_loaders(**kwargs), mlp(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


class Packed:
    "A `PackedSequence` as fastai passes it on: it would take one apart, being a tuple"
    def __init__(self, seqs): self.seqs = pack_sequence(seqs, enforce_sorted=False)


class NamesLSTM(nn.Module):
    def __init__(self, n_chars, n_langs):
        super().__init__()
        self.emb,self.lstm,self.out = nn.Embedding(n_chars, 16),nn.LSTM(16, 32),nn.Linear(32, n_langs)

    def forward(self, x):
        seqs = x.seqs.to(self.out.weight.device)  # fastai does not see that there are tensors
        packed = seqs._replace(data=self.emb(seqs.data))
        return self.out(self.lstm(packed)[1][0][0])


def surnames(path):
    lines = [(name, lang) for lang,f in enumerate(sorted(path.glob('*.txt'))) for name in f.read_text().split()[:40]]
    chars = {c: i for i,c in enumerate(sorted({c for name,_ in lines for c in name}))}
    ds = [(torch.tensor([chars[c] for c in name]), lang) for name,lang in lines]
    def collate(b): return Packed([x for x,_ in b]),torch.tensor([y for _,y in b])
    def loader(): return torch_data.DataLoader(ds, 16, shuffle=True, drop_last=True, collate_fn=collate)
    return Learner(DataLoaders(loader(), loader()), NamesLSTM(len(chars), 18), loss_func=CrossEntropyLossFlat())


class TwoByTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.top,self.bottom,self.head = nn.Linear(32, 16),nn.Linear(32, 16),nn.Linear(32, 11)

    def forward(self, a, b):
        h = self.head(torch.cat([self.top(a), self.bottom(b)], 1).relu())
        return h[:, :10],h[:, 10]


def two_losses(pred, digit, ink): return nn.functional.cross_entropy(pred[0], digit) + nn.functional.mse_loss(pred[1], ink)


def two_inputs_two_targets():
    X,y = digits()
    dls = loaders([(x[:32], x[32:], t, x.mean()) for x,t in zip(X[:480], y[:480])])
    dls.n_inp = 2
    return Learner(dls, TwoByTwo(), loss_func=two_losses)


class FromDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x): return dict(logits=self.net(x['pixels']))


def dict_batches():
    X,y = digits()
    dls = loaders([(dict(pixels=x), dict(digit=t)) for x,t in zip(X[:480], y[:480])])
    return Learner(dls, FromDict(), loss_func=lambda p,t: nn.functional.cross_entropy(p['logits'], t['digit']))


class Stream(torch_data.IterableDataset):
    "Digits in an order that a generator of its own draws: a data set without a length"
    def __init__(self, n): self.n,self.rng = n,np.random.default_rng(3)
    def __iter__(self):
        X,y = digits()
        return ((X[i], y[i]) for i in self.rng.permutation(self.n))


def stream():
    return Learner(DataLoaders(DataLoader(Stream(480), bs=16), torch_loaders().valid), mlp(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


def torch_stream():
    return Learner(DataLoaders(torch_data.DataLoader(Stream(480), 16), torch_loaders().valid), mlp(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


def data_parallel():
    learn = plain_pytorch()
    learn.model = nn.DataParallel(learn.model)
    return learn


# name -> (function that makes the learner, data set that it needs, learning rate)
applications = {
    'tabular: TabularDataLoaders, embeddings': (tabular, 'adult_sample', 1e-2),
    'tabular: TabularPandas': (tabular_pandas, 'adult_sample', 1e-2),
    'vision: vision_learner, frozen body, augmentation': (mnist_frozen, 'mnist_sample', 1e-2),
    'vision: vision_learner, unfrozen, a slice of learning rates': (cifar_unfrozen, 'cifar10', slice(1e-4, 1e-2)),
    'vision: unet_learner, segmentation': (segmentation, 'mnist_sample', 1e-3),
    'text: language_model_learner': (language_model, 'imdb_sample', 1e-2),
    'text: text_classifier_learner': (text_classifier, 'imdb_sample', slice(1e-3, 1e-2)),
    'collaborative filtering: collab_learner, dense embeddings': (collab, 'movie_lens_sample', 1e-2),
    'collaborative filtering: collab_learner, a network': (collab_nn, 'movie_lens_sample', 1e-2),
    'collaborative filtering: sparse embeddings, SparseAdam': (collab_sparse, 'movie_lens_sample', 1e-2),
    'plain PyTorch: model and loaders': (plain_pytorch, None, 1e-2),
    'plain PyTorch: LSTM over PackedSequence': (surnames, 'names', 1e-2),
    'several inputs, several targets': (two_inputs_two_targets, None, 1e-2),
    'batches with dictionaries': (dict_batches, None, 1e-2),
    'a stream without a length, fastai loader': (stream, None, 1e-2),
    'a stream without a length, PyTorch loader': (torch_stream, None, 1e-2),
    'nn.DataParallel': (data_parallel, None, 1e-2),
}


def maker(name, fastai_data):
    "A function that makes the learner of that name, from the same seed each time, and its learning rate"
    make,data,lr = applications[name]
    args = (fastai_data(data),) if data else ()
    def f():
        set_seed(1)
        return make(*args)
    return f,lr
