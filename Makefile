# One entry point for the everyday commands; `make help` lists them. PYTHON chooses the interpreter.

PYTHON ?= python

.PHONY: help install test lint types check ci bench golden demo wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */|/' | awk -F'|' '{printf "%-9s %s\n", $$1, $$2}'

install:  ## install the project, editable, with what the tests need
	$(PYTHON) -m pip install -e '.[test]'

test:  ## run the tests
	$(PYTHON) -m pytest

lint:  ## check style and layout of the code
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## check the types
	$(PYTHON) -m mypy

check: lint types test  ## all of the above: what a change must pass

ci:  ## the same in a fresh virtual environment, the README's quick start included
	.ci/run

bench:  ## check and time the kernels, write this device's table into kernels/README.md
	$(PYTHON) tools/bench_kernels.py --record

golden:  ## make the golden tensors anew; PYTHON must have the reference environment (see CONTRIBUTING.md)
	$(PYTHON) tools/golden/make_golden.py

demo:  ## transcribe the sample recording with the demo model
	qwen4b-asr --model demo weights/demo/sample.wav

wheel:  ## build the wheel into dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

clean:  ## remove what the tools leave behind
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
