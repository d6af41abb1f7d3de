"The rooms of the package: which module may import which, and what an import costs"
import ast, re, subprocess, sys
from pathlib import Path

import fastai.distributed, fastai_bs_finder

folder = Path(fastai_bs_finder.__file__).parent
doors = 'all', 'demo', '__init__', '__main__', '_modidx'  # ways in, which no room may use
trees = {p.stem: ast.parse(p.read_text()) for p in folder.glob('*.py') if p.stem not in doors}


def imported(tree):
    "`(module, name)` of what a module imports from its siblings, in functions, too; `name` is `None` for a module as a whole"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('fastai_bs_finder')):
            module = (node.module or '').removeprefix('fastai_bs_finder').lstrip('.')
            yield from ((module or o.name, o.name if module else None) for o in node.names)
        if isinstance(node, ast.Import): yield from ((o.name.partition('.')[2], None) for o in node.names if o.name.startswith('fastai_bs_finder.'))


imports = {name: set(imported(tree)) for name,tree in trees.items()}


def floor(name, above=()):
    assert name not in above, f"a circle: {' > '.join([*above, name])}"
    return 1 + max((floor(o, (*above, name)) for o in {o for o,_ in imports[name]}), default=0)


def test_five_floors_without_a_circle():
    floors = {name: floor(name) for name in imports}
    print({i: sorted(n for n,f in floors.items() if f == i) for i in range(1, 6)})
    assert max(floors.values()) <= 5
    assert {'noise', 'predict', 'checks', 'loaders', 'interrupt', 'losses', 'order', 'adaptive'} == {n for n,f in floors.items() if f == 1}
    assert {'finder', 'grow', 'sweep'} == {n for n,f in floors.items() if f == 5}


def test_the_tens_of_a_notebook_are_its_floor():
    for path in folder.parent.glob('nbs/[1-5]*.ipynb'):
        number,name = re.match(r'(\d)\d_(\w+)', path.stem).groups()
        if name not in doors: assert int(number) == floor(name), path.name


def test_no_name_with_an_underscore_crosses_a_wall():
    assert [(room, o, name) for room,found in imports.items() for o,name in found if name and name.startswith('_')] == []


def test_predictions_need_numpy_and_scipy_alone():
    code = "import sys; from fastai_bs_finder.predict import rel_steps, scale_lr; print([m for m in ('fastai', 'fastcore', 'torch', 'torch.distributed', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_fastai_stays_as_it_is():
    "Importing all changes nothing in its loaders; what works without a GPU is there for the time of a call"
    code = ("import fastai.distributed as d; before = dict(vars(d.DistributedDL)); import fastai_bs_finder.all; "
            "assert dict(vars(d.DistributedDL)) == before and d.DistributedDL._broadcast.__module__ == 'fastai.distributed'")
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code]).returncode == 0
    from fastai_bs_finder.processes import broadcast_on_any_device
    fastais = fastai.distributed.DistributedDL._broadcast
    with broadcast_on_any_device(): assert fastai.distributed.DistributedDL._broadcast is not fastais
    assert fastai.distributed.DistributedDL._broadcast is fastais


def test_sentences_and_pictures_have_a_room_of_their_own():
    "Nothing else prints, and nothing else knows matplotlib"
    for name,tree in trees.items():
        prints = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print']
        assert name == 'words' or not prints, name
        assert name == 'plot' or not any('matplotlib' in ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))), name


def test_no_line_is_too_long_to_read():
    for path in folder.glob('[!_]*.py'):
        for i,line in enumerate(path.read_text().splitlines(), 1): assert len(line) <= 160, f'{path.name}:{i}'
