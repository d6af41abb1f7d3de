# make demo, make test: all that a newcomer needs. Both build .venv first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install data demo test test-all oldest ecosystem table notebooks short readme docs bench training recipe clean

help:
	@echo "make demo       find the batch size of a small learner: ends in under a minute"
	@echo "make test       run the notebooks' tests and the fast tier of pytest: ten minutes at most on two cores"
	@echo "make test-all   run the tests marked slow, too"
	@echo "make data       fetch the data sets that tests need into .data, or FASTAI_HOME: tests skip what is not there"
	@echo "make oldest     run pytest with the oldest versions supported, in an environment of its own"
	@echo "make ecosystem  try tsai, timm, transformers and fasterai as they are today, in an environment of its own, for the table"
	@echo "make table      run the tests that make the table of what bs_find works with"
	@echo "make notebooks  execute every notebook afresh and keep its outputs"
	@echo "make short      execute the notebooks with real trainings, shortened, into build/short; needs FASTAI_HOME"
	@echo "make readme     make README.md from nbs/index.ipynb"
	@echo "make docs       build the site of documentation into _docs"
	@echo "make bench      measure accuracy, time and memory, and write the pages of results (half an hour)"
	@echo "make training   run the real trainings that predictions are compared with (two hours)"
	@echo "make recipe     run the trainings with and without bs_find, from lr_find to the validation (an hour); these three need FASTAI_HOME"
	@echo "make clean      remove what was built, .venv included"

install: $(VENV)/.dev

# What an extra of pyproject.toml lists
$(VENV)/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Installing into $(VENV): some minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --no-compile -e '.[$*]'
	@touch $@

demo: install
	@$(BIN)/python -m fastai_bs_finder

data: install
	$(BIN)/python tests/data.py

test: install
	$(BIN)/nbdev-test --n-workers 2
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TIER)

test-all: TIER = -m '' --hypothesis-profile=short
test-all: test

oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -r tests/oldest.txt
	.venv-oldest/bin/python -m pip install -q --no-deps -e .
	.venv-oldest/bin/python -m pytest -n 2 -m '' $(addprefix --ignore tests/test_,docs.py project.py types.py jupyter.py)

ecosystem:
	$(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/python -m pip install -q -U -r tests/ecosystem.txt
	.venv-ecosystem/bin/python -m pip install -q -e .
	.venv-ecosystem/bin/python -m pytest -n 2 -m '' tests/test_ecosystem.py --works-with tests/works_with.csv

table: install
	$(BIN)/python -m pytest -n 2 tests/test_applications.py tests/test_callbacks.py --works-with tests/works_with.csv

notebooks: install
	PYTHONWARNINGS=ignore::FutureWarning,ignore::UserWarning $(BIN)/python -m nbconvert --to notebook --execute --inplace nbs/*.ipynb
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python nbs/readme.py

short: install
	BS_SHORT=1 PYTHONWARNINGS=ignore::FutureWarning,ignore::UserWarning $(BIN)/python -m nbconvert --to notebook --execute --output-dir build/short nbs/6*.ipynb

readme: install
	$(BIN)/python nbs/readme.py

docs: install
	$(BIN)/python docs/build.py

bench: $(VENV)/.bench
	for script in accuracy.py scaling.py overhead.py finders.py growing.py distributed.py optimizers.py prediction.py stopping.py 'recipe.py --page' results.py; do \
		$(BIN)/python -W ignore benchmarks/$$script || exit 1; done

training: $(VENV)/.bench
	rm -f benchmarks/training.csv
	$(BIN)/python -W ignore benchmarks/training.py

recipe: $(VENV)/.bench
	$(BIN)/python -W ignore benchmarks/recipe.py --fresh

clean:
	rm -rf $(VENV) .venv-oldest .venv-ecosystem _docs build dist *.egg-info
