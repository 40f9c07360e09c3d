# Every target does its own set-up: a fresh machine needs Python 3.11+, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Those that need Ray or the S3 server run by themselves: Ray's memory monitor and its clocks take a busy machine for a broken one.
QUICK := not bench and not gpu and not slow and not soak

.PHONY: setup demo test test-slow soak check bench cluster-up cluster-status cluster-down clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "vidfuse needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=/path/to/python3.11")'
	@echo "setting up $(VENV) (about 5 GB of packages the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,local]'
	@touch $(READY)

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m jobs.demo

test: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --timeout=300 --maxfail=5 -m "$(QUICK) and not ray and not s3"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --timeout=300 --maxfail=5 -m "$(QUICK) and (ray or s3)"

test-slow: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slow

soak: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m soak -s

check: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

bench: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m bench -s tests/bench

# UP: options of `python cluster/local/cluster.py up`, such as UP="--nodes 4 --cpus 2".
cluster-up: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python cluster/local/cluster.py up $(UP)

cluster-status: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python cluster/local/cluster.py status

cluster-down: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python cluster/local/cluster.py down

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
