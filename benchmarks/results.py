"One page of all results, from those of each benchmark: writes README.md"
import re
from pathlib import Path

here = Path(__file__).parent
intro = """# Results

What `bs_find` and the rest of the package are worth, measured. Times and memory are ratios of two things that ran in the same script. `make bench` runs the scripts again, in about half an hour on two cores, and writes this page and those that it links to. With what `pip install -e .[bench]` installs, each script can be run alone: `.venv/bin/python benchmarks/accuracy.py`.

Predictions are compared with real trainings on nine tasks (`tasks.py`), at four or five batch sizes with the best learning rate of a grid for each and two seeds. These are in `training.csv`; `make bench` reads them; `make training` runs them again, which takes two hours. Whether it pays is tried on eleven tasks (`recipe_tasks.py`), whose trainings are in `recipe.csv`; again, `make bench` reads them, and `make recipe` runs them again, which takes an hour. What was tried for Adam, and what did not help, is in the [log](LOG.md). The data are fastai's MNIST, ADULT_SAMPLE, CIFAR and HUMAN_NUMBERS, its samples of MovieLens and IMDB, scikit-learn's digits, and the tables of Rossmann and the surnames; `nbs/62_rossmann.ipynb` and `nbs/61_surnames.ipynb` say where to get those two. fastai downloads those of its own data sets that are not in `FASTAI_HOME` yet. All of it was run on a CPU."""
pages = 'recipe', 'stopping', 'accuracy', 'prediction', 'scaling', 'overhead', 'finders', 'growing', 'distributed', 'optimizers'


def page(name):
    "Title, machine and date, and what is taken along: two sections, the first picture with its caption, the first table"
    text = (here/f'{name}.md').read_text()
    title,machine = re.match(r'# (.*)\n\n(.*?)\. Made by', text).groups()
    short,loses = (re.search(rf'^## {s}\n\n((?:- .*\n)+)', text, re.M)[1].strip() for s in ('In short', 'Where it loses'))
    picture,table = re.search(r'^!\[.*\]\(.*\)$(\n\n\w.*)?', text, re.M),re.search(r'^\|.*\n\|[-:| ]+\n(\|.*\n)+', text, re.M)
    return title,machine,short,loses,*(o[0].strip() if o else '' for o in (picture, table))


def main():
    found = {name: page(name) for name in pages}
    parts = ['\n\n'.join(filter(None, [f'## [{title}]({name}.md)', short, picture, table, machine])) for name,(title,machine,short,_,picture,table) in found.items()]
    lost = [f'**[{title}]({name}.md)**\n\n{loses}' for name,(title,_,_,loses,*_) in found.items()]
    (here/'README.md').write_text('\n\n'.join([intro, *parts, '## Where it loses', *lost]) + '\n')


if __name__ == '__main__': main()
