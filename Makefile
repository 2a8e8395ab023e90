# make install   create .venv with everything in it        make demo   the main job on the embedded digits
# make test      lint, types and tests                     make lock   renew constraints.txt from .venv
#
# PYTHON=...      the interpreter to build .venv with (default: the first of python3.11, 3.12, 3.13 that works)
# TORCH_INDEX=... extra package index to take torch from, e.g. for a CPU-only or a particular CUDA build

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LEAN := $(VENV)/.installed-demo
TORCH := torch==2.13.0
CANDIDATES := python3.11 python3.12 python3.13 python3
MODERN := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test lint lock

install: $(STAMP)

$(BIN)/python:
	@python=""; \
	for candidate in $(if $(PYTHON),$(PYTHON),$(CANDIDATES)); do \
	  if $$candidate -c '$(MODERN)' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11 or newer with venv was found. Install it (Debian: apt install python3 python3-venv)" >&2; \
	  echo "or name it: make install PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "creating $(VENV) with $$($$python --version)"; $$python -m venv $(VENV)

# torch first: it is the one package whose build (CPU or CUDA) depends on where it is taken from.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo]'
	@touch $@

# The demo needs no tools for tests; `make install` or `make test` add them.
$(LEAN): pyproject.toml constraints.txt | $(BIN)/python
	@test $(STAMP) -nt pyproject.toml -a $(STAMP) -nt constraints.txt || { \
	  $(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) && \
	  $(BIN)/python -m pip install -c constraints.txt -e '.[demo]'; }
	@touch $@

demo: $(LEAN)
	$(BIN)/sfumato synthesize demo:digits --public demo:glyphs --epsilon 8 --time-budget 450s --out runs/demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2

# Exact versions of what .venv holds, without the project itself and without local build tags (torch's +cpu).
lock: $(STAMP)
	@{ echo "# Exact versions the project is tested with. Renew: make lock"; \
	   $(BIN)/python -m pip freeze --exclude sfumato | grep -E '^[A-Za-z0-9._-]+==' | sed -E 's/\+[a-z0-9.]+$$//'; \
	} > constraints.txt.new
	@mv constraints.txt.new constraints.txt && touch $(STAMP)
