# make distill: a new environment, then the demonstration. make test: a new environment, then all tests.
# make figures: every figure again from its saved result.
# make test-faults: kills, full disks, damaged files and the like on hundreds of small runs, some minutes.
PYTHON ?= python3

distill: .venv/run
	.venv/bin/python distill.py --overwrite

test: .venv/dev
	.venv/bin/pytest

test-faults: .venv/dev
	.venv/bin/python tests/faults/faults.py

figures: .venv/dev
	set -e; for result in experiments/results/*.json; do \
		.venv/bin/python experiments/$$(basename $$result .json).py --draw; done

lint: .venv/dev
	.venv/bin/ruff check .

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	.venv/bin/pip install --quiet --requirement requirements-dev.txt
	touch $@

.PHONY: distill test test-faults figures lint
