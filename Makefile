# Nothing need be installed by hand beyond Python 3.11+, gcc and make on Debian: each target sets up what it uses.
#
#   make demo     serve the card, exercise it with the client, say what happened (no root, no KVM, no QEMU)
#   make test     every test; guests run in real QEMU, made once and kept in $(TRIONIC_CACHE)
#   make guest    an interactive Linux guest in QEMU with the card as its only NIC
#   make check    format, lint, types
#   make fuzz     a million exchanges with peers that lie, in twenty minutes at most
#   make bench    the benchmarks, each a ratio against a peer
#   make clean    remove what was built (the cache stays; remove .cache by hand)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export TRIONIC_CACHE ?= $(CURDIR)/.cache

SOURCES := $(shell find device firmware server client \( -name '*.pyx' -o -name '*.pxd' -o -name '*.h' \))

# What the tests use of the host: lspci as a second reader of config space, passt as a real peer of the stream port, tcpdump of captures,
# headers to build the real libvfio-user.
TEST_PACKAGES := pciutils passt tcpdump libjson-c-dev

.PHONY: build demo test guest check fuzz bench clean host-packages

build: $(VENV)/.built

demo: build
	@$(PY) -m trionic demo

test: build host-packages
	@$(PY) -m tests.guest prepare
	@$(PY) -m pytest

guest: build host-packages
	@$(PY) -m trionic guest

check: build
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

fuzz: build
	@$(PY) -m fuzz --runs 1000000 --seconds 1200

bench: build host-packages
	@$(PY) -m bench.register_rtt
	@$(PY) -m bench.dma
	@$(PY) -m bench.guest_iperf
	@$(PY) -m bench.guest_iperf -d virtio-pci -d ifcvf -d vp_vdpa --against own

clean:
	rm -rf $(VENV) build *.egg-info
	find device firmware server client -name '*.so' -delete -o -name '*.c' -delete

host-packages:
	@missing=$$(for p in $(TEST_PACKAGES); do \
	    dpkg-query -W -f '$${Status}\n' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	    if [ "$$(id -u)" = 0 ]; then \
	        echo "installing $$missing" | tr '\n' ' '; echo; \
	        apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $$missing >/dev/null; \
	    else echo "not installed, and installing needs root: $$missing" | tr '\n' ' '; echo; fi; fi

$(VENV)/.deps: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trionic needs Python 3.11 or newer; try make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install python3-venv python3-dev >/dev/null && $(PYTHON) -m venv $(VENV); }
	@echo "installing the Python packages into $(VENV)"
	@$(PY) -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(PY) -m pip install -q --disable-pip-version-check --group dev
	@touch $@

$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	@echo "building the Cython extensions"
	@flock $(VENV)/.build-lock $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation \
	    --config-settings editable_mode=compat -e . >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@touch $@
