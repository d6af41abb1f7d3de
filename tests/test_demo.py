"python -m fastai_bs_finder, as a user types it"
import os, re, subprocess, sys
from pathlib import Path

import pytest

from fastai_bs_finder.demo import main
from fastai_bs_finder.predict import round_bs

root = Path(__file__).parents[1]


def run(*args, cwd):
    env = {k: v for k,v in os.environ.items() if k != 'FASTAI_HOME'} | {'PYTHONPATH': str(root), 'MPLBACKEND': 'agg'}
    return subprocess.run([sys.executable, '-m', 'fastai_bs_finder', *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_finds_a_batch_size_and_saves_the_picture(tmp_path):
    p = run(cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert p.stderr == ''
    first = re.search(r'(Train|Stay) with bs=(\d+).*\.\n', p.stdout)
    said = re.search(r'The noise scale is (\d+) examples \(95% interval (\d+) to (\d+)\), measured with bs=16 at lr=0\.1\.', p.stdout[first.end():])
    noise_scale,lo,hi = map(int, said.groups())
    sug = re.search(r'SuggestedBS\(critical=(\d+), fastest=(\d+|None)\)', p.stdout)
    assert 20 < lo < noise_scale < hi and int(sug[1]) == round_bs(noise_scale) and first[2] == (sug[2] if first[1] == 'Train' else '16')
    assert 6 <= max(int(n) for n in re.findall(r'\[(\d+)/1000', p.stdout)) < 1000 and 'noise scale' in p.stdout   # it stops when the choice is clear
    assert [f.name for f in tmp_path.iterdir()] == ['bs_find.png']
    assert (tmp_path/'bs_find.png').read_bytes()[:4] == b'\x89PNG' and (tmp_path/'bs_find.png').stat().st_size > 20_000


def test_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('fastai_bs_finder.finder.why_enough', lambda *args: '')   # which depends on the times of steps
    found = []
    for _ in range(2):
        assert main('--lr .05 --bs 32 --num-it 100 --n-batch 5 --beta .5 --seed 3 --out other.pdf'.split()) == 0
        said = capsys.readouterr().out
        assert '[100/100' in said
        found.append(re.search(r'The noise scale is .*? with bs=32 at lr=0.05', said)[0])
    assert [f.name for f in tmp_path.iterdir()] == ['other.pdf'] and found[0] == found[1]


def test_help(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    said = capsys.readouterr().out
    assert e.value.code == 0 and 'handwritten digits' in said
    for option in ('--lr', '--bs', '--num-it', '--n-batch', '--beta', '--seed', '--out'): assert option in said


@pytest.mark.parametrize('args,words', [
    (['--lr', 'fast'], "argument --lr: invalid float value: 'fast'"),
    (['--lr', '-1'], 'lr=-1.0 is not a learning rate'),
    (['--lr', 'nan'], 'lr=nan is not a learning rate'),
    (['--bs', '0'], 'argument --bs: 0 is not between 1 and 1500'),
    (['--n-batch', '1'], 'n_batch=1 is not a whole number of 2 or more'),
    (['--num-it', '3'], 'num_it=3 is less than one measurement'),
    (['--beta', '1'], 'beta=1.0 is not in [0, 1)'),
    (['--out', 'nowhere/x.png'], 'there is no folder nowhere'),
    (['--out', 'x.xls'], 'x.xls does not end in .png'),
    (['--seed', '-1'], 'argument --seed: -1 is not between 0 and'),
    (['--bs', '1500'], 'n_batch=10 is more than the 1 batch of an epoch'),
    (['--out', '.'], 'argument --out: . is a folder'),
    (['--what'], 'unrecognized arguments: --what'),
])
def test_bad_arguments(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(args)
    p = capsys.readouterr()
    assert e.value.code == 2 and words in p.err and p.err.count('\n') == 1 and p.out == ''
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bad_arguments_from_a_shell(tmp_path):
    p = run('--lr', '-1', cwd=tmp_path)
    assert p.returncode == 2 and 'lr=-1.0 is not a learning rate' in p.stderr and p.stderr.count('\n') == 1 and p.stdout == ''


def test_a_training_that_fails_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main('--lr 1e30 --num-it 60'.split())
    p = capsys.readouterr()
    assert 'Lower lr, then ask again: the loss was not finite' in p.out and 'Traceback' not in p.err
