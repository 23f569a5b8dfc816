# Two commands do all set-up on a fresh machine: `make demo` and `make test`. Both create .venv once and reuse it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: help demo test test-long test-parallel test-faults test-faults-data test-faults-evals test-faults-cluster lint style clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml
	@echo "longspan: creating $(VENV) and installing the dependencies (some minutes, 3.3 GB; once)"
	@command -v $(PYTHON) >/dev/null || { echo "longspan: $(PYTHON) not found; pass PYTHON=/path/to/python3.11 (or 3.12)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools
	@# byte code at the end, on every core: pip makes it on one
	@# torch first and by itself: a range that another package widens could take a CUDA build of several GB
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile "torch==2.13.0"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@# not what hardly anybody imports, a quarter of it; templates of packages need not compile
	@$(BIN)/python -m compileall -qq -j 0 -x '/(tests?|models|rllib)/' $(VENV)/lib || true
	@touch $@

demo: $(VENV)/installed  ## corpus -> training -> perplexity-versus-length curve -> Hugging Face model, then where it all is
	@$(BIN)/python -m longspan.trainer.demo --runs $(RUNS)

test: $(VENV)/installed  ## the test suite (13 minutes on two cores, 15 with installation)
	@echo "longspan: lint, then tests, and types beside them"
	@$(MAKE) --no-print-directory style
	@# conftest.py puts the slow files first; xdist's own order would put the files of most tests first
	@$(BIN)/mypy -p longspan > $(VENV)/types.log 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long and not gpu"; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/types.log; \
	test $$tests -eq 0 && test $$types -eq 0

test-long: $(VENV)/installed  ## the suites that take longer (drift over 1e5 steps, ...)
	$(BIN)/python -m pytest -m "long" --timeout 3600 \
		--ignore tests/faults --ignore tests/faults_data --ignore tests/faults_evals --ignore tests/faults_cluster --ignore tests/parallel

test-parallel: $(VENV)/installed  ## tensor, context and data parallelism against one rank: the whole matrix, over gloo
	$(BIN)/python -m pytest -m "(long or not long) and not gpu" tests/parallel --timeout 3600

test-faults: $(VENV)/installed  ## 200 random kills of the trainer and the rest of the fault suite
	$(BIN)/python -m pytest -m "long or not long" tests/faults tests/checkpoint --timeout 3600

test-faults-data: $(VENV)/installed  ## readers killed 400 times while they download from a server that misbehaves
	$(BIN)/python -m pytest -s -m "long or not long" tests/faults_data --timeout 1800

test-faults-evals: $(VENV)/installed  ## reconcilers, evaluation workers and MLflow killed 62 times (at most 30 minutes)
	$(BIN)/python -m pytest -s -m "long or not long" tests/faults_evals --timeout 1800

test-faults-cluster: $(VENV)/installed  ## launchers, restarts and two hosts on this machine, ranks killed
	$(BIN)/python -m pytest -m "long or not long" tests/faults_cluster --timeout 900

lint: style  ## ruff and mypy
	@$(BIN)/mypy -p longspan

style: $(VENV)/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .

clean:  ## remove the environment; runs and corpora stay
	rm -rf $(VENV) *.egg-info build dist
