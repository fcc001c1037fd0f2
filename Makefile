# Two commands for people: `make demo` and `make test`. Both set everything up first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A version that our exports must be read by and that cannot be installed beside ours.
OLD := $(VENV)/transformers-4.57.1
OLD_PACKAGES := transformers==4.57.1 tokenizers==0.22.2 huggingface_hub==0.36.2
FOLDERS := hd kernels model train bench cli

export DS_ACCELERATOR ?= cpu

.PHONY: help setup demo test browser check faults format clean

help:
	@echo "make demo    the whole job at nano size on a CPU: data, two stages, two models, report"
	@echo "make test    the test suite"
	@echo "make browser install Chromium and its driver (Debian, as root) for the tests of the web page"
	@echo "make check   formatting, lint, types, import arrows"
	@echo "make faults  break training runs in every way; the figures of docs/reliability.md (an hour and more)"
	@echo "make format  rewrite the sources in the project's format"

setup: $(STAMP)

# Installed again only when what is to be installed has changed.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps lmms-eval
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/llava-hd demo --out runs/demo

# Without a package index its test is skipped, and says so.
$(OLD): $(STAMP)
	-$(BIN)/python -m pip install --quiet --no-deps --target $@ $(OLD_PACKAGES)
	touch -c $@

test: $(STAMP) $(OLD)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

# The web page is tested in Chromium; without one its tests are skipped, and say so.
browser:
	@{ command -v chromium && command -v chromedriver; } >/dev/null \
	|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } \
	|| echo "no Chromium with its driver could be installed; tests of the web page will be skipped"

faults: $(STAMP)
	$(BIN)/llava-hd bench faults --docs docs/reliability.md

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .types && ln -sfn .. .types/llava_hd
	MYPYPATH=.types $(BIN)/mypy $(addprefix -p llava_hd.,$(FOLDERS))
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .types build *.egg-info runs
