"The article's way to measure, for comparison: every batch steps the optimizer, those that are measured too"
import warnings

from fastai.basics import Learner
from fastai_bs_finder.finder import BSFinder
from fastai_bs_finder.mock import LockStep

biased = ("bs_find_stepping is for comparison only: while every batch steps, the noise in one gradient moves the weights at which the next "
          "is taken. That biases the scale |G|² by about −lr·tr(HΣ)/b, and the noise scale comes out too large or negative at learning "
          "rates that train well. Call learn.bs_find for a number to act on.")


class SteppingFinder(BSFinder):
    "Measures consecutive batches of a training that goes on as ever; by default one measurement follows the other"
    biased = True
    def __init__(self, num_it, n_batch=10, beta=.9, n_train=None, pbar=None):
        if isinstance(self, LockStep):
            raise ValueError("bs_find_stepping compares with the article's finder, which works in a single process: call it outside of distrib_ctx, "
                             "or call learn.bs_find")
        super().__init__(num_it, n_batch, beta, n_train or 0, pbar)
        warnings.warn(biased, stacklevel=6)

    def stand_still(self): pass
    def step_with(self, mean): pass


def bs_find_stepping(
    learn:Learner,
    lr=None, # As in `bs_find`, like the rest
    num_it:int|None=None,
    n_batch:int=10, # Number of consecutive batches per measurement
    beta:float=.9,
    **kwargs
) -> tuple: # What `bs_find` returns; warns that it is biased, and raises `ValueError` where several processes train together
    "`learn.bs_find` with the article's estimator"
    return learn.bs_find(lr, num_it, n_batch, beta, finder=SteppingFinder, **kwargs)
