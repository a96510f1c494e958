# make demo | test | test-build | test-all | bench | lint | format | gpu | clean. Every target sets up .venv by itself.
# With pipefail, so that a command piped into tee still fails.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/gpu
STAGE ?=
FAMILY ?=
BUDGET ?= 540
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh kernels/*.cuh kernels/*/*.cpp kernels/*/*.h kernels/*/*.cu)

.PHONY: demo test test-build test-all bench lint format gpu gpu-rehearsal clean build
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo      train on real data with torch.optim.LBFGS and with secant, draw secant-demo.png"
	@echo "make test      the tests (make test-build: sanitizers and compilers; make test-all: both, and the long proofs)"
	@echo "make bench     microbenchmarks against eager and compiled PyTorch"
	@echo "make lint      ruff, clang-format, mypy"
	@echo "make gpu       on a machine with a GPU: build, test and measure there; results in OUT=folder"
	@echo "               (STAGE=build,test,bench,profile and FAMILY=lbfgs,... choose, BUDGET is in seconds; gpu-rehearsal: on the CPU)"

# torch first and alone: a bare "torch" among other requirements may resolve to a build of several gigabytes.
$(VENV)/.deps: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch numpy
	$(PIP) install -c constraints.txt ruff mypy clang-format
	touch $@

# Warnings are errors here and in CI, not for users.
$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	SECANT_WERROR=ON $(PIP) install -c constraints.txt -e ".[demo,test,bench,triton]"
	touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/python -m secant demo

# A file at a time on two processes; threads of one that wait leave their core to the other.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

test: build
	$(PYTEST) --ignore tests/build --ignore-glob "*_standin.py" -m "not slow and not gpu" --durations=25

# Of the kernels as they are built: sanitizers, the other instruction sets, CUDA's sources on the CPU, what ptxas and
# Triton's compiler make of them, hostile calls. A quarter of an hour.
test-build: build
	$(PYTEST) tests/build tests/kernels/*_standin.py tests/kernels/*/*_standin.py -m "not slow and not gpu" --durations=25

test-all: build
	$(PYTEST) -m "not gpu"

bench: build
	$(BIN)/python -m secant bench
	$(BIN)/python -m pytest bench --benchmark-disable-gc --benchmark-sort=name --benchmark-columns=min,median,rounds

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	rm -rf build/typed && mkdir -p build/typed/secant
	ln -s $$(ls -d $(CURDIR)/pysrc/secant/* | grep -v '\.so$$') $(CURDIR)/kernels build/typed/secant
	$(BIN)/mypy

format: $(VENV)/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# On a machine with a GPU that has torch, Triton, CuPy, CMake, pybind11 and pytest, and needs no network: build, test,
# measure and profile, in stages that can be run apart (STAGE=build,test,bench,profile FAMILY=lbfgs,...).
gpu:
	$(PYTHON) bench/gpu.py --out "$(OUT)" --stage "$(STAGE)" --family "$(FAMILY)" --budget "$(BUDGET)"

# The same command on a machine without one, small and on the CPU.
gpu-rehearsal: build
	$(BIN)/python bench/gpu.py --out "$(OUT)" --stage "$(STAGE)" --family "$(FAMILY)" --budget "$(BUDGET)" --device cpu --quick

clean:
	rm -rf build dist out $(VENV)/.built pysrc/secant/*.so *.egg-info pysrc/*.egg-info
