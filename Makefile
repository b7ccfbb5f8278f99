# make quickstart   set up, train, test, classify, draw a report; RECIPE=training/recipes/cifar100_lt.yaml for another run
# make test         set up and run the tests that start no other trainings
# make test-all     the others too: trainings that are killed, several processes, compilers
# make lint         set up and run ruff
PYTHON ?= python3
RECIPE ?= training/recipes/quickstart.yaml
RUN ?= runs/$(basename $(notdir $(RECIPE)))
ARGS ?=

.PHONY: setup quickstart test test-all lint

setup: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: setup
	.venv/bin/python training/train.py --recipe $(RECIPE) --output_dir $(RUN) --resume $(ARGS)
	.venv/bin/python training/predict.py --run $(RUN)
	.venv/bin/python training/figures.py --run $(RUN)

test: setup
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 -m "not slow"

test-all: setup
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
