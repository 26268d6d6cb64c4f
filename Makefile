# Two commands for a newcomer: `make demo` edits a picture, `make test` runs the tests. Both install first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint format toy ablations clean

demo: $(VENV)/installed
	$(RUN) edit.py --prompt-pair examples/before.png examples/after.png --input examples/input.png \
		--output out/answer.png --grid

test: $(VENV)/installed
	$(RUN) -m pytest

test-slow: $(VENV)/installed
	$(RUN) -m pytest -m slow

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

toy: $(VENV)/installed  ## trains what is under toy/weights anew; resumable
	$(RUN) toy/pretrain.py

ablations: $(VENV)/installed  ## trains and measures every arm of docs/results.md, three seeds each; resumable
	$(RUN) ablations.py

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is older than Python 3.11; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf out runs data .pytest_cache .ruff_cache .hypothesis
