# make demo   set everything up and run the main job on artificial languages
# make test   set everything up, lint and run the tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test lint help-corpora clean

demo: $(VENV)/installed
	rm -rf demo
	$(BIN)/megaphase demo demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real text: see examples/help-corpora/README.md.
help-corpora: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" examples/help-corpora/run.sh $(CORPORA)

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info megaphase/plan/_builder*.so demo
