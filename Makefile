# Two commands do everything on a fresh machine with Python and make:
#   make demo   train a small model on two ranks and watch its metrics
#   make test   run the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/.installed-demo
JAX_STAMP := $(VENV)/.installed-jax
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
SITE_STAMP := $(VENV)/.installed-site

export OMP_NUM_THREADS ?= 1

# One more than there are cores: tests of processes and of time wait a good deal.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min((os.cpu_count() or 1) + 1, 4))")

# What pytest knows of the tests that failed and have not passed since.
FAILED := .pytest_cache/v/cache/lastfailed

.PHONY: docs build demo test engines campaign lint bench gpu-check check-minimums multinode clean
.DEFAULT_GOAL := test

$(DEMO_STAMP): pyproject.toml constraints.txt
	@echo "==> installing metricfold, PyTorch and TensorBoard into $(VENV) (first time: one to two minutes, 1.1 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[torch,console,tensorboard]"
	@touch $@

$(JAX_STAMP): $(DEMO_STAMP)
	@echo "==> installing JAX into $(VENV)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[jax]" "optax>=0.2.6"
	@touch $@

$(STAMP): $(DEMO_STAMP)
	@echo "==> installing the development tools, and what the tests need, into $(VENV) (first time: a few minutes)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt --group dev -e ".[all]"
	@touch $@ $(JAX_STAMP)

# Only what is shown is installed, which takes a minute; what the tests need takes several.
demo: $(if $(findstring jax,$(DEMO_ARGS)),$(JAX_STAMP),$(DEMO_STAMP))  ## train a small language model on two ranks; DEMO_ARGS="--ranks 4" and the like pass through
	@echo "==> metricfold demo: two ranks train a small language model, for about a minute"
	@$(BIN)/metricfold demo $(DEMO_ARGS)

# Hundreds of processes import the package: compiled once, that takes them half the time.
# Those that run "alone" mostly wait, for a deadline or for a process to end, so two may at a time.
# What fails runs once more, with nothing beside it: on a busy machine a test that waits for other
# processes can fail for want of time, and a change must not be held to account for that. The suite
# passes if all of those do, and names them; a worker that crashed is a failed test, too. A file that
# could not be imported, which is listed by its own name, is a fault in any case.
# pytest's exit status 1: tests failed; 5: what PYTEST_ARGS selects holds no tests of this part. Any
# other one says that tests were left out.
test: $(STAMP)  ## PYTEST_ARGS="tests/test_metric.py -x" and the like pass through
	@echo "==> the whole test suite, in random order, warnings as errors"
	@unset PYTHONDONTWRITEBYTECODE; rm -f $(FAILED); together=0; alone=0; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not alone" $(PYTEST_ARGS) || together=$$?; \
	echo "==> the tests about deadlines and signals"; \
	$(BIN)/python -m pytest -n 2 --dist worksteal -m alone $(PYTEST_ARGS) || alone=$$?; \
	case $$together/$$alone in 0/0|0/5|5/0) exit 0;; [015]/[015]) ;; *) exit 1;; esac; \
	! grep '\.py":' $(FAILED) || exit 1; \
	echo "==> the tests that failed, once more: one at a time, with nothing beside them"; \
	$(BIN)/python -m pytest $(PYTEST_ARGS) -n 0 -m "" --last-failed --last-failed-no-failures=none && ! grep :: $(FAILED)

engines: $(STAMP)  ## trainings by engines that take long to start
	@METRICFOLD_ENGINES=1 $(BIN)/python -m pytest -p no:randomly -rs tests/test_engines.py $(PYTEST_ARGS)

campaign: $(STAMP)  ## faults by the thousand, in a quarter of an hour; CAMPAIGN_ARGS="--seed 3 --quick ranks" and the like pass through
	@echo "==> a campaign of faults: ranks, the store, signals, sinks, files, checkpoints"
	@PYTHONPATH=tests $(BIN)/python -m campaign $(CAMPAIGN_ARGS)

lint: $(STAMP)
	@echo "==> ruff format, ruff check, mypy --strict"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

$(BENCH_STAMP): $(STAMP)
	@echo "==> installing the libraries to compare with (first time: a minute)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt --group bench
	@touch $@

bench: $(BENCH_STAMP)  ## BENCH_ARGS="--quick" shows in a minute that everything runs; "log peers" measures these
	@echo "==> benchmarks: ratios measured side by side in one run, and the same logs through other libraries"
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

gpu-check: $(STAMP)  ## what only a GPU can show; GPU_ARGS="--only steps" and the like pass through
	@echo "==> waits, kernels, steps, a watched model, a trace, ranks and JAX on the GPU: ratios measured side by side"
	@PYTHONPATH=tests $(BIN)/python -m gpu_check $(GPU_ARGS)

check-minimums: $(STAMP)  ## the tests of each extra at its oldest versions, in environments of their own; MINIMUMS_ARGS="datasets" and the like pass through
	@echo "==> the oldest versions that pyproject.toml claims: a table"
	@PYTHONPATH=tests $(BIN)/python -m check_minimums $(MINIMUMS_ARGS)

multinode: $(STAMP)  ## two hosts on this machine, as root; MULTINODE_ARGS="--only restarts" and the like pass through
	@echo "==> two network namespaces, torchrun on both: totals and latency, restarts, faults"
	@PYTHONPATH=tests $(BIN)/python -m multinode $(MULTINODE_ARGS)

$(SITE_STAMP): $(STAMP)
	@echo "==> installing what makes the site and the packages"
	@$(BIN)/python -m pip install --quiet -c constraints.txt --group site
	@touch $@

docs: $(SITE_STAMP)  ## the site of docs/, into build/site; without a network, and warnings are errors
	@echo "==> the site, into build/site"
	@$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs build/site
	@echo "open build/site/index.html"

build: $(SITE_STAMP)  ## the wheel and the source distribution, into dist/, looked over by twine
	@echo "==> packages, into dist"
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
