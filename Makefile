# make demo    compiles the trained demo model and generates text with it, from Python and without
# make test    the test suite, without what repeats other tests (what CI runs; docs/decisions/test-time.md)
# make test-all  all cases and families, kernels with users' flags, cubins of all kernels, the thread sanitizer
# make lint    ruff, mypy, clang-format, clang-tidy
# make bench   the benchmarks, against llama.cpp and transformers; minutes, writes benchmarks/results/
# Each sets up what it needs first: system packages, .venv, the build (scripts/bootstrap.sh).

VENV ?= .venv
PEERS ?= .venv-peers
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.hetcomp-installed
PEERS_INSTALLED := $(PEERS)/.installed
TEST_JOBS ?= 2
PYTEST_ARGS ?=

RUNTIME_SOURCES := $(shell find runtime_lib -type f)
CXX_SOURCES := $(shell find runtime_lib benchmarks tests -name '*.cpp' -o -name '*.h')

.PHONY: demo test test-all lint bench bootstrap test-packages peers clean

demo: bootstrap
	@scripts/demo.sh $(BIN)

# worksteal: tests that share a compiled model mostly stay with one worker.
test: bootstrap test-packages
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

test-all: PYTEST_ARGS += --all-cases
test-all: test

lint: bootstrap
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	scripts/typecheck.sh $(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	scripts/clang_tidy.sh $(BIN)/clang-tidy

bench: bootstrap peers
	$(BIN)/python -m benchmarks.run_all --peer-python $(PEERS)/bin/python

bootstrap: $(INSTALLED)

$(INSTALLED): pyproject.toml scripts/bootstrap.sh $(RUNTIME_SOURCES)
	@scripts/bootstrap.sh $(VENV)
	@touch $@

# What only the tests need: a browser for the plan's HTML report, qemu, a kernel and mke2fs for tests of NUMA and of a failing disk,
# Triton, AutoGPTQ's layer.
test-packages: | $(INSTALLED)
	@scripts/bootstrap.sh $(VENV) --test-packages

peers: $(PEERS_INSTALLED)

$(PEERS_INSTALLED): benchmarks/peer-requirements.txt | $(INSTALLED)
	$(BIN)/python -m venv $(PEERS)
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(PEERS)/bin/python -m pip --disable-pip-version-check install -r $<
	@touch $@

clean:
	rm -rf build out .mypy_cache .ruff_cache .pytest_cache
