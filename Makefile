# Two commands matter: `make demo` and `make test`. Each sets everything up by itself, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-full lint warm-up clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/visrl demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-full: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The recipe of the embedded model, from random weights to runs/tiny/warm. One thread, so that it repeats to the bit.
warm-up: $(READY)
	$(BIN)/python -m visrl.models.tiny.make runs/tiny/start
	OMP_NUM_THREADS=1 $(BIN)/visrl train configs/tiny/train_sft.yaml
	OMP_NUM_THREADS=1 $(BIN)/visrl train configs/tiny/train_sft_2.yaml

clean:
	rm -rf $(VENV) runs build *.egg-info
