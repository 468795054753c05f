# Two commands: `make demo` (all set-up, then the main job) and `make test` (all set-up, then the tests).
# `make test-long` repeats the kills of training processes with more points for each method.
PYTHON ?= python3
RUN ?= runs/demo
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-long lint setup setup-dev clean

demo: setup
	.venv/bin/luthier run examples/demo.yaml --out $(RUN) $(if $(wildcard $(RUN)/recipe.yaml),--resume,)

test: setup-dev
	.venv/bin/python -m pytest $(PYTEST)

test-long: setup-dev
	.venv/bin/python -m pytest -m long $(PYTEST)

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

setup:
	@PYTHON=$(PYTHON) scripts/setup.sh

setup-dev:
	@PYTHON=$(PYTHON) scripts/setup.sh dev

clean:
	rm -rf .venv runs build *.egg-info src/*.egg-info
