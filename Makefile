# Two commands on a fresh machine: `make quickstart` and `make test`. Both set up .venv the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
LINUX := $(filter Linux,$(shell uname -s))
EXTRAS := $(if $(LINUX),"mlx[cpu]",mlx) mlx-lm

.PHONY: setup quickstart test slow lint docs clean

setup: $(STAMP)

# torch first and pinned: any other order takes several GB of CUDA packages on a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlxlora needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EXTRAS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[torch,test]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/mlxlora quickstart

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# mkdocs-material comes with the first build: nothing else needs it.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[docs]'
	$(BIN)/python scripts/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs .pytest_cache build *.egg-info
