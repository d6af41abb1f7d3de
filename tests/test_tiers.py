"Every value and every pair is in the fast tier, in few rows, and everything in the slow one"
from itertools import combinations, product

import pytest

from tiers import each_pair, each_value, in_tiers


@pytest.mark.parametrize('cover,k,sizes,n_rows', [(each_pair, 2, (4, 3, 9), 36), (each_pair, 2, (2, 2, 2), 4), (each_pair, 2, (5, 4), 20), (each_pair, 2, (3, 3, 3, 3), 9),
                                                  (each_pair, 2, (1, 1, 1), 1), (each_value, 1, (4, 3, 9), 9), (each_value, 1, (2, 2), 2)])
def test_all_is_there_in_few_rows(cover, k, sizes, n_rows):
    options = [[f'{name}{i}' for i in range(n)] for name,n in zip('abcd', sizes)]
    rows = cover(*options)
    for some in combinations(range(len(sizes)), k): assert {tuple(row[i] for i in some) for row in rows} == set(product(*(options[i] for i in some)))
    assert len(rows) == len(set(rows)) == n_rows and rows == cover(*options)


def test_what_is_left_out_is_slow():
    params = in_tiers(each_value, 'ab', [print, repr], [1])
    assert [p.values for p in params] == list(product('ab', [print, repr], [1]))
    assert [[m.name for m in p.marks] for p in params] == [[], ['slow'], ['slow'], []]
