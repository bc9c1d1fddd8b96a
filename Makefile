# `make demo` and `make test` need nothing installed by hand beyond Python 3.11+, gcc and make on Debian.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYX := $(shell find device firmware protocol server client -name '*.pyx' -o -name '*.pxd' -o -name '*.h' 2>/dev/null)
export TRIONIC_CACHE ?= $(CURDIR)/.cache

.PHONY: build
build: $(VENV)/.built

$(VENV)/.deps: pyproject.toml
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(PY) -m pip install -q --disable-pip-version-check --group dev
	@touch $@

$(VENV)/.built: $(VENV)/.deps $(PYX)
	@flock $(VENV)/.build-lock $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@
