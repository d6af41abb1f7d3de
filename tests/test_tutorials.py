"The tutorials that the README sends newcomers to: their code runs, on less data than they are stored with"
import json, os, subprocess, sys
from pathlib import Path

import pandas as pd, pytest

root = Path(__file__).parents[1]


def few_digits(source, to):
    "Every 10th image"
    for folder in source.glob('t*/*'):
        (to/folder.relative_to(source)).mkdir(parents=True)
        for image in sorted(folder.iterdir())[::10]: (to/image.relative_to(source)).symlink_to(image)

def few_people(source, to):
    to.mkdir(parents=True)
    pd.read_csv(source/'adult.csv').head(8000).to_csv(to/'adult.csv', index=False)


@pytest.mark.slow
@pytest.mark.parametrize('name,data,less', [('00_tutorial.mnist', 'mnist_png', few_digits), ('01_train', 'adult_sample', few_people)])
def test_its_code_runs(name, data, less, fastai_data, tmp_path):
    less(fastai_data(data), tmp_path/'data'/data)
    cells = json.loads((root/f'nbs/{name}.ipynb').read_text())['cells']
    (tmp_path/'tutorial.py').write_text('\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code') + '\nprint("the end")\n')
    done = subprocess.run([sys.executable, 'tutorial.py'], cwd=tmp_path, env=os.environ | dict(FASTAI_HOME=str(tmp_path), MPLBACKEND='agg', OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    assert done.stdout.endswith('the end\n') and 'The noise scale' in done.stdout
