"A few rows of a full product that hold every pair of its values"
from itertools import combinations, product


def pairwise(*options):
    "Tuples, one of each list of `options` in each, so that any two values of two lists are together in one of them; the same each time"
    def pairs(row): return set(combinations(enumerate(row), 2))
    rows = list(product(*map(range, map(len, options))))
    missing,chosen = set().union(*map(pairs, rows)),[]
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))  # of several the first
        missing -= pairs(chosen[-1])
    return [tuple(values[i] for values,i in zip(options, row)) for row in chosen]
