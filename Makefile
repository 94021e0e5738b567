# Everything here needs Python 3.11 or newer with its venv module, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test accuracy lint clean

# A video from the built-in tiny model: export it, then run the bundle.
demo: $(VENV)/.installed-export
	$(BIN)/wanx export --precision fp32 -o demo-bundle --force
	$(BIN)/wanx run demo-bundle "a red circle moving right on a blue background" -o demo.mp4 --seed 0

# A file of tests is run by one worker, since its tests share what takes long to make.
test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

# Part of `test`; see tools/accuracy_envelopes.py for new envelopes.
accuracy: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m accuracy -rP

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Installed as links to this folder, so only new dependencies call for another installation.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("wanx needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make $(MAKECMDGOALS) PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-input --constraint constraints.txt --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) demo-bundle demo.mp4
