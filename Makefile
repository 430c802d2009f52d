# make setup · train · test · test-layouts · check · bench.
# Needs Python 3.11 or later and a C compiler; all else is installed here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup train test test-layouts test-gpu check format bench clean

setup: $(INSTALLED)

# One list of versions (docker/constraints.txt). torch comes first: `torch==2.13.0` is the CPU build where pip finds one,
# and then satisfies whatever asks for torch; elsewhere it is the CUDA build.
$(INSTALLED): pyproject.toml docker/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gptscale needs Python 3.11 or later: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c docker/constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c docker/constraints.txt -e '.[dev]'
	touch $@

# A real GPT from nothing: the standard library's source text → tokenizer → shards → two DeepSpeed ranks → a sample.
# On the CPU, GPU or not: two ranks would need two GPUs, and the recipe's figures are a CPU's.
train: setup
	CUDA_VISIBLE_DEVICES= $(BIN)/gptscale train experiment=first
	@echo
	$(BIN)/gptscale generate source=runs/first prompt='def read_' generate.max_new_tokens=120
	@echo
	@echo "report: runs/first/report.html"

# Two files at a time: most tests wait for processes as long as they compute.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Every parallel layout beside one plain process, and a table of how far they are apart: ten minutes.
test-layouts: setup
	$(BIN)/python -m pytest -q tests/parity/test_layouts.py

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/gptscale bench step

# Not runs/ and corpora/: those are somebody's work.
clean:
	rm -rf $(VENV)
