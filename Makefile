# Everything here needs Python 3.11 or newer with its venv module, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# A file's tests share what takes long to make; a test that hangs ends its worker (pyproject.toml), twice at most.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 1

# Of every part of the code, what is quickest to run.
QUICK := tests/bundle tests/files tests/checkpoints \
	tests/runtime/inputs tests/runtime/output tests/runtime/sampling \
	tests/runtime/test_sizes.py tests/runtime/test_text.py tests/runtime/test_tokens.py \
	tests/models/test_text_encoder.py tests/kernels/test_rms_norm.py tests/kernels/test_launch_config.py \
	tests/exporter/quantization/test_recipe.py tests/exporter/quantization/test_scheme.py \
	tests/commands/test_completion.py tests/tools/test_floors.py tests/test_architecture.py tests/test_docs.py

# What needs no more than `pip install wanx` and pytest.
RUNTIME := tests/bundle/test_manifest.py tests/bundle/test_publish.py tests/bundle/test_plugin_kernel.py \
	tests/files/test_checksum.py tests/runtime/inputs/test_reading.py tests/runtime/output/test_checks.py \
	tests/runtime/output/test_encoding.py tests/runtime/output/test_provenance.py \
	tests/runtime/output/test_video.py tests/runtime/test_batch.py tests/runtime/test_sizes.py \
	tests/benchmarks/speed/test_change.py tests/benchmarks/speed/test_metrics.py

.PHONY: demo check test accuracy lint floors clean

# A video from the built-in tiny model: export it, then run the bundle.
demo: $(VENV)/.installed-export
	$(BIN)/wanx export --precision fp32 -o demo-bundle --force
	$(BIN)/wanx run demo-bundle "a red circle moving right on a blue background" -o demo.mp4 --seed 0

# Before a push: style, types and the quick tests, in less than two minutes on two cores.
check: $(VENV)/.installed-dev
	@start=$$(date +%s); \
	$(MAKE) --no-print-directory lint && $(PYTEST) -q -m "not slow and not gpu" $(QUICK) && \
	echo "make check took $$(($$(date +%s) - start)) s; make test runs everything"

test: lint
	$(PYTEST) -m "not slow and not gpu" --durations=20 --durations-min=1

# Part of `test`; see tools/accuracy_envelopes.py for new envelopes.
accuracy: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m accuracy -rP

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Once per release: the oldest versions that pyproject.toml allows, in an environment of their own.
# EXTRAS=export tries the exporter's too.
floors: FLOORS := $(VENV)-floors
floors:
ifneq ($(EXTRAS),)
	@echo "PyTorch's oldest version is a CUDA build on Linux: some 3 GB to download, 5 GB in $(FLOORS)"
endif
	rm -rf $(FLOORS)
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python tools/floors.py $(EXTRAS) > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --no-input --constraint $(FLOORS)/floors.txt --editable '.$(if $(EXTRAS),[$(EXTRAS)])' pytest
	$(FLOORS)/bin/wanx doctor
	$(FLOORS)/bin/wanx verify tiny
	$(FLOORS)/bin/wanx run tiny --seed 0 -o $(FLOORS)/floors.mp4
ifneq ($(EXTRAS),)
	$(FLOORS)/bin/wanx export --precision int8 --gate -o $(FLOORS)/int8
	$(FLOORS)/bin/wanx export --precision fp8 --gate -o $(FLOORS)/fp8
endif
	$(FLOORS)/bin/python -m pytest -q $(RUNTIME)

# Installed as links to this folder, so only new dependencies call for another installation.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("wanx needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make $(MAKECMDGOALS) PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-input --constraint constraints.txt --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-floors demo-bundle demo.mp4
