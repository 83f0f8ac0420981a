# Every target makes its own environment in .venv first; a second run installs nothing.
#   TORCH_INDEX=URL   a package index with CPU builds of torch, for machines without an NVIDIA driver
#   CONFIG=FILE MODEL=DIR PORT=N   for `make serve`

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := torch==2.13.0
SERVE_FLAGS := $(CONFIG) $(if $(MODEL),--model $(MODEL)) $(if $(PORT),--port $(PORT))

.PHONY: serve demo test test-hosts check format bench soak clean

serve: $(INSTALLED)
	$(BIN)/baton serve $(SERVE_FLAGS)

demo: $(INSTALLED)
	$(BIN)/baton demo $(if $(PORT),--port $(PORT))

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not soak and not hosts"

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak

test-hosts: $(INSTALLED)
	@mkdir -p bench/results
	$(BIN)/python -m pytest -m hosts -s > bench/results/hosts.log 2>&1; status=$$?; cat bench/results/hosts.log; exit $$status

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest tests/test_imports.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python -m bench

$(INSTALLED): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		echo "installing into $(VENV), CUDA build of torch included: downloads about 4 GB"; \
	elif [ -n "$(TORCH_INDEX)" ]; then \
		echo "installing into $(VENV), CPU build of torch: downloads about 0.5 GB"; \
		$(BIN)/pip install --quiet --disable-pip-version-check --index-url "$(TORCH_INDEX)" $(TORCH); \
	else \
		echo "installing into $(VENV): downloads about 0.5 GB where the package index has a CPU build of torch, about 4 GB" \
			"where it has the CUDA build; TORCH_INDEX=URL names an index with CPU builds"; \
		$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH); \
	fi
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
