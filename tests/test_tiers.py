"Every pair, in few rows"
from itertools import combinations, product

import pytest

from pairwise import pairwise


@pytest.mark.parametrize('sizes,most', [((4, 3, 9), 36), ((2, 2, 2), 4), ((5, 4), 20), ((3, 3, 3, 3), 9), ((1, 1, 1), 1)])
def test_every_pair_is_there_in_few_rows(sizes, most):
    options = [[f'{name}{i}' for i in range(n)] for name,n in zip('abcd', sizes)]
    rows = pairwise(*options)
    for (i,a),(j,b) in combinations(enumerate(options), 2): assert {(row[i], row[j]) for row in rows} == set(product(a, b))
    assert len(rows) == len(set(rows)) <= most
    assert rows == pairwise(*options)


def test_values_of_any_kind():
    "Equal ones, and functions"
    assert pairwise([print, print], [[], {}]) == [(print, []), (print, {})]*2
