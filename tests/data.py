"The data sets that the tests need; run it to fetch them with fastai's `untar_data`, into .data unless FASTAI_HOME says otherwise"
import os
from pathlib import Path

from fastai.data.external import URLs, untar_data

urls = dict(adult_sample=URLs.ADULT_SAMPLE, cifar10=URLs.CIFAR, imdb_sample=URLs.IMDB_SAMPLE, mnist_png=URLs.MNIST, mnist_sample=URLs.MNIST_SAMPLE, movie_lens_sample=URLs.ML_SAMPLE)
without_url = 'names',  # surnames of 18 languages, from a tutorial of PyTorch

if __name__ == '__main__':
    os.environ.setdefault('FASTAI_HOME', str(Path(__file__).parents[1]/'.data'))
    for url in urls.values(): print(untar_data(url))
