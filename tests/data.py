"The data sets that the tests need: run this to fetch them into FASTAI_HOME, with fastai's `untar_data`"
from fastai.data.external import URLs, untar_data

urls = dict(adult_sample=URLs.ADULT_SAMPLE, cifar10=URLs.CIFAR, imdb_sample=URLs.IMDB_SAMPLE, mnist_png=URLs.MNIST, mnist_sample=URLs.MNIST_SAMPLE, movie_lens_sample=URLs.ML_SAMPLE)
without_url = 'names',  # surnames of 18 languages, from a tutorial of PyTorch: what needs them is skipped where they are not

if __name__ == '__main__':
    for url in urls.values(): print(untar_data(url))
