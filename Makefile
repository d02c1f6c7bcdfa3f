# make distill: create an environment and run the demonstration.
# make test: create an environment and run all tests, including the slow ones in tests/reliability/.
# make test-faults: inject faults into thousands of small runs (kills, full disks, damaged files); takes minutes.
# make mutants: break the code in some 300 ways, one by one, each of which a test must catch; takes 7 minutes.
# make figures: redraw every picture from its saved result.
PYTHON ?= python3

distill: .venv/run
	.venv/bin/python distill.py --overwrite

test: .venv/dev
	.venv/bin/pytest tests/ --reliability

test-faults: .venv/dev
	.venv/bin/python tests/reliability/faults.py

mutants: .venv/dev
	.venv/bin/python tests/mutants.py

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

.PHONY: distill test test-faults mutants figures lint
