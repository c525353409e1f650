# `make run` and `make test` need nothing but Python 3.11 to 3.13 and about 3 GB of disk.

PYTHON ?= python3
MODE ?= full
JOBS ?= 1
BIN := .venv/bin
NEED_GB := 3
TORCH_CPU := https://download.pytorch.org/whl/cpu

# An activated environment must not leak into this one.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test lab bench lint clean setup

help:
	@echo "make run    run the notebooks: NB=11 (or NB='11 12'), MODE=fast, JOBS=2, ALL=1"
	@echo "make test   run the tests and every notebook in fast mode"
	@echo "make lab    open the notebooks in JupyterLab; LAB='--no-browser --port 8890' passes options"
	@echo "make bench  measure against peers, write data/results/bench.csv"
	@echo "make lint   check the style of the code"
	@echo "make clean  remove .venv and every cache"
	@echo "Each sets up .venv first; PYTHON=python3.12 chooses the Python."

run: setup
	@$(BIN)/python -m k2lab run $(NB) --mode $(MODE) --jobs $(JOBS) $(if $(ALL),--all)
	@if [ "$(MODE)" = full ]; then $(BIN)/python -m k2lab scorecard; fi

test: setup
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests

lab: setup
	@$(BIN)/python -m jupyterlab notebooks $(LAB)

bench: setup
	@$(BIN)/python -m tests.benchmarks
	@$(BIN)/python -m k2lab scorecard

lint: setup
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +

setup: .venv/.installed

# Remade when the requirements change. The checks come first, each failing with one line.
.venv/.installed: requirements.txt pyproject.toml
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "k2lab: '$(PYTHON)' not found; name a Python 3.11 to 3.13: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "k2lab: needs Python 3.11 to 3.13, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "k2lab: '$(PYTHON)' has no venv module; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); [ "$$free" -ge $(NEED_GB) ] || { \
	  echo "k2lab: needs $(NEED_GB) GB of free disk here, but there are $$free GB"; exit 1; }
	@if ! $(BIN)/python -c 'import sys, pip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	  echo "k2lab: making .venv with $$("$(PYTHON)" -V 2>&1)"; "$(PYTHON)" -m venv --clear .venv; fi
	@echo "k2lab: installing requirements.txt into .venv (some minutes the first time)"
	@# On Linux without a GPU, torch's CPU build saves gigabytes; PyPI's is the fallback.
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && \
	  $(BIN)/python -c 'import urllib.request as u; u.urlopen("$(TORCH_CPU)/torch/", timeout=5)' 2>/dev/null; then \
	  $(BIN)/python -m pip install -q --index-url $(TORCH_CPU) \
	    "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)" || true; fi
	@$(BIN)/python -m pip install -qq -r requirements.txt
	@touch $@
