# Two commands matter: `make demo` and `make test`. Each sets everything up by itself, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
VLLM := .venv-vllm
LMMS := .venv-lmms

.PHONY: demo test test-full test-oldest vllm-env test-vllm lmms-env test-lmms pins lint warm-up clean

# $(call install,FOLDER,CONSTRAINTS): a virtual environment of the pinned releases and no others. pip and setuptools
# come first, and without build isolation, so that what builds the package is pinned as well.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade --constraint $(2) pip setuptools
	$(1)/bin/python -m pip install --quiet --no-build-isolation --constraint $(2) -e ".[dev]"
	touch $(1)/.ready
endef

$(READY): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt)

demo: $(READY)
	$(BIN)/visrl demo

# Two workers of one thread each: half the time on two cores, and no more memory than a laptop has.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-full: $(READY)
	$(BIN)/python -m pytest

# The same tests on the lowest releases that pyproject.toml allows. Old releases warn of each other at import, so that
# deprecations are errors on the pinned ones only.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -m "not slow" -W default::DeprecationWarning \
		-W default::PendingDeprecationWarning -W default::FutureWarning

# vLLM for CPUs: it pins another torch than ours. Nothing is resolved: constraints-vllm.txt says why, and names all of it.
$(VLLM)/.ready: constraints-vllm.txt tests/vllm_name/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation ./tests/vllm_name
	touch $@

vllm-env: $(VLLM)/.ready

# Against a real vLLM on this machine's cores: a quarter of an hour or more, a gigabyte or three of memory.
test-vllm: $(READY) $(VLLM)/.ready
	$(BIN)/python -m pytest tests/test_vllm*.py

# lmms-eval, over the packages of .venv: torch, transformers and datasets are there already.
$(LMMS)/.ready: constraints-lmms.txt $(READY)
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --no-deps --requirement constraints-lmms.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	touch $@

lmms-env: $(LMMS)/.ready

# lmms-eval against our server, and its files scored: a minute or two.
test-lmms: $(LMMS)/.ready
	$(BIN)/python -m pytest tests/test_lmms_eval.py

# Moves every pin to the newest release that pyproject.toml allows, then runs the tests on them. Where they pass, commit
# constraints.txt; where a release beyond an upper bound of pyproject.toml is to be tried, raise the bound first.
pins:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	echo "# What \`make demo\` and \`make test\` install, on Python 3.11; \`make pins\` moves it." > $(VENV)/pins.txt
	$(BIN)/python -m pip freeze --all --exclude-editable >> $(VENV)/pins.txt
	mv $(VENV)/pins.txt constraints.txt
	touch $(READY)
	$(MAKE) test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The recipes of the embedded models: from random weights to runs/tiny/warm, and from that as it is shipped to
# runs/tiny/looks. One thread, so that they repeat to the bit; the same command goes on where it was stopped.
warm-up: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m visrl.models.tiny.pretrain configs/tiny/pretrain.yaml
	OMP_NUM_THREADS=1 $(BIN)/visrl train configs/tiny/train_sft.yaml
	OMP_NUM_THREADS=1 $(BIN)/visrl train configs/tiny/train_looks.yaml

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) $(LMMS) runs build *.egg-info
