# make demo   trains DP-Cap on generated scenes at epsilon 8, probes it, shows the result
# make test   runs the tests
# make check  runs those that take less than two minutes together
# make clean  removes the virtual environment and the demo's run

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
READY := $(VENV)/ready
RUN := runs/demo
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test check clean

test: $(READY)
	python -m pytest

check: $(READY)
	python -m pytest -m 'not long'

demo: $(READY)
	python -m dpcap.train --config=configs/demo.py --workdir=$(RUN)
	python -m dpcap.evaluate --config=configs/demo.py --workdir=$(RUN)
	python -m tools.report --workdir=$(RUN)

# Debian ships venv apart from python3: bring it where that is allowed.
$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or newer"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -q && \
	    apt-get install -qy python3-venv; } || \
	  { echo "error: $(PYTHON) lacks venv; install it (Debian: apt-get install python3-venv)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(RUN) $(RUN).secrets
