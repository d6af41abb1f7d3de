"A type checker accepts the public API, and knows what it returns"
import os, subprocess, sys
from pathlib import Path

import pytest
import fastai_bs_finder

root = Path(__file__).parents[1]
uses = """
from typing_extensions import assert_type  # in `typing` from Python 3.11 on
import numpy as np, pandas as pd, torch
from fastai_bs_finder.all import *
from fastai_bs_finder.grow import GrowBatch, Stage

assert_type(rel_steps(64, 16, 100.), float)
assert_type(round_bs(100.), int)
assert_type(BSResult(pd.DataFrame()).table, pd.DataFrame | None)
assert_type(fieller(np.ones(4), np.ones(4)), tuple[float, float])
meter = NoiseMeter(beta=.9)
assert_type(meter.add([torch.zeros(2)], 16), bool)
assert_type(meter.n_batch, int)
NoiseScale(share=None), AccumulateGrads(64), GrowBatch([Stage(0, 64)])
"""
misuses = "rel_steps('64', 16, 100.)", 'NoiseMeter(beta=None)', "NoiseScale(every='often')", 'meter.add(torch.zeros(2), 16)', 'AccumulateGrads([64])', 'meter.mesure()'


def mypy(*args, cwd):
    "Run where `cwd` holds what an earlier run has found of the imports"
    return subprocess.run([sys.executable, '-m', 'mypy', '--ignore-missing-imports', '--follow-imports', 'silent', *map(str, args)], cwd=cwd, env=os.environ | dict(MYPYPATH=str(root)), capture_output=True, text=True)


@pytest.mark.slow
def test_the_signatures_and_their_use(tmp_path):
    "Of each module what stubgen writes down"
    subprocess.run([Path(sys.executable).with_name('stubgen'), '-q', '-o', tmp_path/'stubs', root/'fastai_bs_finder'], check=True, cwd=tmp_path)
    checked = mypy(tmp_path/'stubs/fastai_bs_finder', cwd=tmp_path)
    assert not checked.returncode, checked.stdout
    (tmp_path/'use.py').write_text(uses + '\n'.join(misuses))
    lines = [line for line in mypy('use.py', cwd=tmp_path).stdout.splitlines() if 'error:' in line]
    n = uses.count('\n')
    assert [int(line.split(':')[1]) for line in lines] == [n + 1 + i for i in range(len(misuses))], lines


def test_the_marker_of_typed_packages(): assert (Path(fastai_bs_finder.__file__).parent/'py.typed').exists()
