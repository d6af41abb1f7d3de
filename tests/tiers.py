"Products of parameters in two tiers: a few rows that hold each value, or each pair of values, are always tested, the others are slow"
from itertools import combinations, product

import pytest


def each_value(*options):
    "Tuples, one of each list of `options` in each, so that any value is in one of them"
    return [tuple(values[i % len(values)] for values in options) for i in range(max(map(len, options)))]


def each_pair(*options):
    "Tuples, one of each list of `options` in each, so that any values of two lists are together in one of them; the same each time"
    def pairs(row): return set(combinations(enumerate(row), 2))
    rows = list(product(*map(range, map(len, options))))
    missing,chosen = set().union(*map(pairs, rows)),[]
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))  # of several the first
        missing -= pairs(chosen[-1])
    return [tuple(values[i] for values,i in zip(options, row)) for row in chosen]


def in_tiers(cover, *options):
    "For `pytest.mark.parametrize`: the full product, of which those that `cover` leaves out are slow"
    fast = cover(*options)
    return [pytest.param(*row, marks=[] if row in fast else pytest.mark.slow) for row in product(*options)]
