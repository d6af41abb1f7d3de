"The tasks of recipe.py: real data, a learner as a newcomer makes it, validated by a metric, and a number of epochs"
from functools import cache, partial
from typing import NamedTuple

import numpy as np, pandas as pd, torch
from filelock import FileLock
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import TensorDataset
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, RandomSplitter, URLs, accuracy, exp_rmspe, fastai_path, rmse, set_seed, untar_data
from fastai.callback.progress import ProgressCallback
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, add_datepart, make_date, tabular_config, tabular_learner
from fastai.text.all import AWD_LSTM, LMDataLoader, TextDataLoaders, awd_lstm_lm_config, language_model_learner
from fastai.vision.all import ConvLayer, ResBlock
from fastcore.basics import noop

from common import here
from images import images


def loaders(train, valid, bs):
    "Loaders of tensors in memory, which make a batch at once; those of training shuffle"
    def loader(ds, shuffle): return DataLoader(ds, bs=bs, shuffle=shuffle, drop_last=shuffle, create_item=noop, create_batch=partial(TensorDataset.__getitem__, ds))
    return DataLoaders(loader(train, True), loader(valid, False), device='cpu')


def classifier(data, model, bs): return Learner(loaders(*data(), bs), model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


@cache
def pictures(url, train, valid, n_train=None, n_valid=None):
    "Images of two folders, their pixels normalized; of the first `n_train` and `n_valid` in a random order"
    def some(part, n):
        ds = images(url, part)
        idx = torch.randperm(len(ds), generator=torch.Generator().manual_seed(0))[:n]
        return TensorDataset(ds.x[idx], ds.y[idx])
    return some(train, n_train),some(valid, n_valid)


mnist = partial(pictures, URLs.MNIST, 'training', 'testing')
cifar = partial(pictures, URLs.CIFAR, 'train', 'test')


def convnet():
    convs = [ConvLayer(a, b, stride=2) for a,b in ((1, 16), (16, 32), (32, 64))]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(64*4*4, 10))


def resnet():
    blocks = [ResBlock(1, n, 2*n, stride=2) for n in (16, 32, 64)]
    return nn.Sequential(ConvLayer(3, 16, stride=2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


@cache
def digits():
    x,y = map(torch.tensor, load_digits(return_X_y=True))
    return tuple(TensorDataset((x[i]/16).float(), y[i]) for i in map(list, RandomSplitter(seed=0)(x)))


def mlp(): return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def adult(n=None):
    df = pd.read_csv(untar_data(URLs.ADULT_SAMPLE)/'adult.csv', skipinitialspace=True)
    train,valid = RandomSplitter(seed=0)(df)
    return TabularPandas(df, [Categorify, FillMissing, Normalize], ['workclass', 'education', 'marital-status', 'occupation', 'relationship', 'race'],
                         ['age', 'fnlwgt', 'education-num'], 'salary', splits=(train[:n], valid[:n]))


def adult_learner(bs, n=None): return tabular_learner(adult(n).dataloaders(bs=bs), metrics=accuracy)


def rossmann_table():
    "The table of fastai's lesson 6 from its seven files, as in nbs/62_rossmann.ipynb"
    path = fastai_path('data')/'rossmann'
    names = ['train', 'test', 'store', 'store_states', 'state_names', 'googletrend', 'weather']
    train,test,store,store_states,state_names,trend,weather = [pd.read_csv(path/f'{o}.csv', low_memory=False) for o in names]
    days = pd.concat([train, test], ignore_index=True)
    days['StateHoliday'] = days.StateHoliday != '0'
    add_datepart(days, 'Date', drop=False)
    store = store.merge(store_states, how='left', on='Store')
    store = store.fillna(dict(CompetitionOpenSinceYear=1900, CompetitionOpenSinceMonth=1, Promo2SinceYear=1900, Promo2SinceWeek=1))
    year,month,p_year,p_week = [store[o].astype(int) for o in ('CompetitionOpenSinceYear', 'CompetitionOpenSinceMonth', 'Promo2SinceYear', 'Promo2SinceWeek')]
    store['CompetitionOpenSince'] = pd.to_datetime(dict(year=year, month=month, day=15))
    store['Promo2Since'] = pd.to_datetime(p_year.astype(str) + '-' + p_week.astype(str) + '-1', format='%G-%V-%u')
    trend['Date'],trend['State'] = trend.week.str.split(' - ').str[0],trend.file.str.split('_').str[2].replace('NI', 'HB,NI')
    add_datepart(trend, 'Date')
    trend_de = trend[trend.file == 'Rossmann_DE'].rename(columns=dict(trend='trend_DE'))
    weather = weather.merge(state_names, how='left', left_on='file', right_on='StateName').drop(columns='file')
    make_date(weather, 'Date')
    df = (days.merge(store, how='left', on='Store').merge(trend[['State', 'Year', 'Week', 'trend']], how='left', on=['State', 'Year', 'Week'])
          .merge(trend_de[['Year', 'Week', 'trend_DE']], how='left', on=['Year', 'Week']).merge(weather, how='left', on=['State', 'Date']))
    def days_since(event): return (df.Date - df[event]).dt.days.clip(lower=0).where(df[event].dt.year >= 1990, 0)
    df['CompetitionMonthsOpen'] = (days_since('CompetitionOpenSince')//30).clip(upper=24)
    df['Promo2Weeks'] = (days_since('Promo2Since')//7).clip(upper=25)
    events,df = ['SchoolHoliday', 'StateHoliday', 'Promo'],df.sort_values(['Store', 'Date'])
    for o in events:
        event_date = df.Date.where(df[o] == 1).groupby(df.Store)
        for name,nearest in ('After', event_date.ffill()), ('Before', event_date.bfill()): df[name + o] = (df.Date - nearest).dt.days.fillna(0).astype(int)
    def last_seven(df): return df.groupby('Store')[events].rolling(7, min_periods=1).sum().droplevel('Store')
    df = df.join(last_seven(df).add_suffix('_bw')).join(last_seven(df[::-1]).add_suffix('_fw')).sort_index()
    df = df[df.Sales > 0].reset_index(drop=True)
    df['log_sales'],df['valid'] = np.log(df.Sales).astype(np.float32),df.Date >= df.Date[len(test)]
    return df


rossmann_cats = ['Store', 'DayOfWeek', 'Year', 'Month', 'Day', 'StateHoliday', 'CompetitionMonthsOpen', 'Promo2Weeks', 'StoreType', 'Assortment',
                 'PromoInterval', 'CompetitionOpenSinceYear', 'Promo2SinceYear', 'State', 'Week', 'Events', 'Promo_fw', 'Promo_bw',
                 'StateHoliday_fw', 'StateHoliday_bw', 'SchoolHoliday_fw', 'SchoolHoliday_bw']
rossmann_conts = ['CompetitionDistance', 'Max_TemperatureC', 'Mean_TemperatureC', 'Min_TemperatureC', 'Max_Humidity', 'Mean_Humidity', 'Min_Humidity',
                  'Max_Wind_SpeedKm_h', 'Mean_Wind_SpeedKm_h', 'CloudCover', 'trend', 'trend_DE', 'AfterStateHoliday', 'BeforeStateHoliday', 'Promo',
                  'SchoolHoliday']


@cache
def rossmann(n=60_000):
    "`n` rows to train on at random, and as large a part of the last weeks to validate; these are kept in build/"
    kept = here.parent/'build'/f'rossmann-{n}.pkl'
    kept.parent.mkdir(exist_ok=True)
    with FileLock(f'{kept}.lock'):
        if not kept.exists():
            df = rossmann_table()[[*rossmann_cats, *rossmann_conts, 'Sales', 'log_sales', 'valid']]
            df.sample(frac=n/(~df.valid).sum(), random_state=0, ignore_index=True).to_pickle(kept)
    df = pd.read_pickle(kept)
    splits = [df.index[part].tolist() for part in (~df.valid, df.valid)]
    df,top = df.drop(columns=['Sales', 'valid']),np.log(1.2*df.Sales.max())
    to = TabularPandas(df, [FillMissing, Categorify, Normalize], rossmann_cats, rossmann_conts, 'log_sales', splits=splits)
    return to,top


def rossmann_learner(bs):
    to,top = rossmann()
    return tabular_learner(to.dataloaders(bs=bs), layers=[1000, 500], config=tabular_config(ps=[.001, .01], embed_p=.04), y_range=(0, top), wd=.2, metrics=exp_rmspe)


def rebatched(dls, bs): return type(dls)(*(dl.new(bs=bs, num_workers=0) for dl in dls.loaders))


@cache
def ratings(): return CollabDataLoaders.from_df(pd.read_csv(untar_data(URLs.ML_SAMPLE)/'ratings.csv'), seed=0)


def movielens_learner(bs): return collab_learner(rebatched(ratings(), bs), n_factors=50, y_range=(.5, 5.5), wd=.1, metrics=rmse)


@cache
def reviews(): return TextDataLoaders.from_df(pd.read_csv(untar_data(URLs.IMDB_SAMPLE)/'texts.csv'), text_col='text', label_col='label', seed=0)


class BagOfWords(nn.Module):
    "The mean of the words' embeddings, padding left out, and two layers"
    def __init__(self, n_vocab, n=200):
        super().__init__()
        self.emb,self.out = nn.Embedding(n_vocab, n, padding_idx=1),nn.Sequential(nn.Linear(n, 50), nn.ReLU(), nn.Dropout(.2), nn.Linear(50, 2))

    def forward(self, x): return self.out(self.emb(x).sum(1)/(x != 1).sum(1, keepdim=True))


def imdb_learner(bs): return Learner(rebatched(reviews(), bs), BagOfWords(len(reviews().vocab[0])), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


@cache
def names():
    "Names as padded rows of character numbers, their lengths, and their languages"
    files = sorted((fastai_path('data')/'names').glob('*.txt'))
    lines = [(name.strip(), i) for i,f in enumerate(files) for name in f.read_text(encoding='utf8').splitlines() if name.strip()]
    chars = {c: i + 1 for i,c in enumerate(sorted({c for name,_ in lines for c in name}))}
    xs = pad_sequence([torch.tensor([chars[c] for c in name]) for name,_ in lines], batch_first=True)
    lens,y = torch.tensor([len(name) for name,_ in lines]),torch.tensor([i for _,i in lines])
    return tuple(TensorDataset(xs[i], lens[i], y[i]) for i in map(list, RandomSplitter(seed=0)(lines)))


class NamesLSTM(nn.Module):
    def __init__(self, n_emb=32, n_hid=128):
        super().__init__()
        self.emb,self.lstm,self.out = nn.Embedding(128, n_emb),nn.LSTM(n_emb, n_hid, batch_first=True),nn.Linear(n_hid, 18)

    def forward(self, x, lens): return self.out(self.lstm(pack_padded_sequence(self.emb(x), lens, batch_first=True, enforce_sorted=False))[1][0][-1])


@cache
def numbers():
    "The numbers up to 9,999 in words, as documents of a hundred numbers each, to train and to validate; and the words"
    parts = [[line.split() + ['.'] for line in (untar_data(URLs.HUMAN_NUMBERS)/f'{part}.txt').read_text().splitlines()] for part in ('train', 'valid')]
    words = sorted({w for lines in parts for line in lines for w in line})
    return *([torch.tensor([words.index(w) for line in lines[i:i + 100] for w in line]) for i in range(0, len(lines), 100)] for lines in parts),words


def numbers_learner(bs):
    train,valid,words = numbers()
    dls = DataLoaders(*(LMDataLoader(docs, bs=bs, seq_len=16, shuffle=s) for docs,s in ((train, True), (valid, False))))
    dls.vocab = words
    return language_model_learner(dls, AWD_LSTM, config=awd_lstm_lm_config | dict(emb_sz=64, n_hid=128, n_layers=2), drop_mult=.3, pretrained=False, metrics=accuracy)


class Task(NamedTuple):
    learner: callable # `learner(bs)`: a fresh one, with a metric
    epochs: int # Of the baseline

    def make(self, bs, seed):
        "A learner from that seed, once the data are loaded: splitting them draws, too"
        set_seed(seed)
        learn = self.learner(bs).remove_cb(ProgressCallback)
        learn.logger = noop
        return learn


tasks = {
    'Rossmann': Task(rossmann_learner, 2),
    'ADULT': Task(adult_learner, 8),
    'MNIST, ConvNet': Task(partial(classifier, mnist, convnet), 3),
    'CIFAR-10 subset, resnet': Task(partial(classifier, cifar, resnet), 5),
    'Surnames, LSTM': Task(partial(classifier, names, NamesLSTM), 8),
    'HUMAN_NUMBERS, language model': Task(numbers_learner, 15),
    'IMDB sample, text': Task(imdb_learner, 15),
    'MovieLens sample': Task(movielens_learner, 5),
    'Digits': Task(partial(classifier, digits, mlp), 10),
    'MNIST, 600 images': Task(partial(classifier, partial(mnist, 600, 2000), convnet), 20),
    'ADULT, 1,500 rows': Task(partial(adult_learner, n=1500), 10),
}
