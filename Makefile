# Two commands for a newcomer: `make demo` edits a picture, `make test` runs the tests. Both install first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow doctor lint format docs docs-check toy results clean

demo: $(VENV)/installed
	$(RUN) edit.py --prompt-pair examples/before.png examples/after.png --input examples/input.png \
		--output out/answer.png --grid

test: $(VENV)/installed-dev  ## a process for each core, four at most, and a file's tests in one of them
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -m slow

doctor: $(VENV)/installed-dev  ## what this machine computes with, and whether it edits right: for bug reports
	$(RUN) -m toy.doctor

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(VENV)/installed-dev  ## every file with its comments beside its code, and all figures, under out/docs
	$(VENV)/bin/pycco -p -i -d out/docs *.py $(wildcard apps/*.py backbone/*.py bench/*.py data_making/*.py disk/*.py docs/*.py evaluation/*.py \
		exercises/*.py pictures/*.py scan_kernels/*.py toy/*.py toy/*/*.py training/*.py)
	$(RUN) docs/figures.py --output out/docs/figures

docs-check: $(VENV)/installed-dev  ## runs every command that README and docs show, and follows every link
	$(RUN) docs/check.py
	$(RUN) -m pytest -m "slow or not slow" tests/test_docs.py tests/test_figures.py tests/test_notebook.py

toy: $(VENV)/installed-dev  ## trains what is under toy/weights anew; resumable
	$(RUN) -m toy.pretrain
	$(RUN) -m toy.pretrain.report

results: $(VENV)/installed-dev  ## trains and measures every arm of docs/results.md, three seeds each; resumable
	$(RUN) -m evaluation.ablations

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is older than Python 3.11; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(RUN) rcldm.py > /dev/null  # compiles the scan, once
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf out runs data .pytest_cache .ruff_cache .hypothesis
