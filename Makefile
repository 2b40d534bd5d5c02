# make demo   set everything up; two phases beside static mixtures on artificial languages
# make test   set everything up, lint and run the tests
# make test-slow   the rest of the tests: further layouts and cases, kills by the dozen
# make rehearse   many layouts on a GPU that does not exist: minutes, no GPU needed
# make docs   write docs/run-file.md again, from the config classes, and build the site into build/site
# make wheel  build the source distribution and, from it, the wheel, into dist/
# make soak   20 minutes of kills, changed layouts and damaged checkpoints; says what was survived
# make slurm  as root on Debian or Ubuntu: what the tests of SLURM need; without it they skip
# make browser  as root on Debian: what the tests of the report's page need; without it they skip
# make test-sanitize   the plan's C++ under the address and undefined-behaviour sanitizers

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The many short processes of the tests would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test test-slow rehearse docs wheel soak slurm browser test-sanitize lint help-corpora clean

demo: $(VENV)/installed
	rm -rf demo
	$(BIN)/megaphase demo demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

rehearse: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m rehearse

docs: $(VENV)/installed
	$(BIN)/python docs/generate_run_file.py
	$(BIN)/python docs/build_site.py

wheel: $(VENV)/installed
	$(BIN)/python -m build --no-isolation

SOAK ?= --minutes 20
soak: $(VENV)/installed
	PYTHONPATH=tests/support $(BIN)/python tests/support/chaos.py $(SOAK)

# The daemons that the packages start are not used: the tests start their own.
slurm:
	apt-get update
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge

# Chromium without a window; the full browser, where it is already, does as well.
browser:
	apt-get update
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium-headless-shell

# The sanitizers' libraries must be loaded before Python; Python itself leaks by design.
SANITIZED := build/sanitized
test-sanitize: $(VENV)/installed
	MEGAPHASE_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	MEGAPHASE_BUILDER="$$(echo $(SANITIZED)/megaphase/plan/_builder*.so)" \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=tests/support \
	$(BIN)/python -m pytest -p sanitized_builder tests/plan/test_plan_builder.py tests/plan/test_plan_blend.py \
		tests/plan/test_piecewise_blend.py \
		tests/plan/test_plan_stream.py tests/plan/test_plan_index.py tests/plan/test_translation_packing.py \
		tests/plan/test_document_packing.py

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
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info megaphase/*/_*.so demo
