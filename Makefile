# make demo    the whole way on real data: train, distil, prune, factorise, quantise, convert, save, load, report
# make test    the test suite
# Both make .venv, install pinned dependencies and build the extension first; a second run rebuilds nothing.
#
# make build   the extension alone             make bench    timings beside the peers, with figures
# make lint    ruff, mypy, clang-format        make gpu      build, test, sanitize, bench on a GPU (STAGE=...)
# make bench-peers   beside OpenVINO, ONNX Runtime and DeepSparse, installed in .venv-peers
# make methods       every compression method on real data: one table, benches/results/methods.json, an HTML page
# make bench-report  docs/performance.md and its plots, from the results in benches/results
# make wheel   dist/*.whl                      make sanitize the C++ kernels under ASan and UBSan
# make sanitize-aarch64   the Arm kernels under ASan and UBSan, cross-compiled and under qemu-user
# make cuda    the CUDA extension alone        make clean   forget what was built
# make wheel-aarch64   dist/*aarch64.whl, cross-compiled, tried under qemu-user
# make c       build/c/libtautorch.{a,so}, for devices without Python (CMAKE_ARGS for cross-compiling)
#
# Variables: PYTHON, CXX, VENV, TORCH=2.13.0, TAUTORCH_CUDA=auto|on|off, PIP_ARGS, ARGS (given on to the command).

VENV ?= .venv
TORCH ?= 2.13.0
TAUTORCH_CUDA ?= auto
STAGE ?= all
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
CMAKE := $(VENV)/bin/cmake -G Ninja --log-level=WARNING -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
  -DPython_EXECUTABLE=$(abspath $(PY))
STAMPS := $(VENV)/.stamps
DEPS := $(STAMPS)/deps-$(TORCH)
BUILT := $(STAMPS)/build-$(TAUTORCH_CUDA)

ifneq ($(origin CXX),default)
export CXX
endif
export TAUTORCH_CUDA

CSRC := $(shell find csrc include cmake -type f)
CFORMAT := $(shell find csrc include examples/c tests/native -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test build bench bench-peers bench-report methods gpu cuda c lint wheel wheel-aarch64 sanitize sanitize-aarch64 \
  clean FORCE
.DEFAULT_GOAL := build

demo: build
	$(VENV)/bin/tautorch demo $(ARGS)

# A file's tests stay in one process, for their fixtures. -n 0 in ARGS: all in this one.
test: build
	$(PY) -m pytest tests -q -n auto --maxprocesses 8 --dist loadfile $(ARGS)

bench: build
	$(PY) -m pytest benches --benchmark-enable -q -s $(ARGS)

# Each peer is installed on the first run, in an environment of its own: their pins exclude each other.
bench-peers: build
	$(PY) -m benches.peers $(ARGS)

bench-report: build
	$(PY) -m benches.report $(ARGS)

# Under an hour on two idle cores; results are kept in build/methods, and a run that was stopped goes on.
# ARGS="--only digits", ARGS="--claim QAT", ARGS=--quick, ARGS=--fresh.
methods: build
	$(PY) -m benches.methods $(ARGS)

# Builds what it needs by itself: the machine with the GPU may have no network, so no .venv is made for it.
gpu:
	$(if $(wildcard $(PY)),$(PY),python3) benches/gpu/run.py --stage $(STAGE) $(ARGS)

# The CUDA extension alone, in build/cuda; it needs nvcc and no GPU. The log holds registers and spills of every kernel.
cuda: $(DEPS)
	$(if $(TAUTORCH_CUTLASS_DIR),,$(PIP) --no-deps -r requirements/cuda.txt)
	TAUTORCH_CUDA=on $(CMAKE) -S . -B build/cuda -DTAUTORCH_CPU=OFF -DTAUTORCH_OUTPUT_DIR=$(abspath build/cuda)
	$(VENV)/bin/cmake --build build/cuda >build/cuda/build.log 2>&1 || { grep -v ptxas build/cuda/build.log | tail -n 40; exit 1; }
	@! grep -E '[1-9][0-9]* bytes spill|wgmma.*serialized' build/cuda/build.log

# Needs CMake and a C++ compiler, nothing of Python.
c:
	@$(need_compiler)
	$(C_CMAKE) -S . -B build/c -DTAUTORCH_PYTHON=OFF $(CMAKE_ARGS)
	$(C_CMAKE) --build build/c --parallel $$(nproc 2>/dev/null || echo 2) --target tautorch_static tautorch_shared
C_CMAKE := $(firstword $(wildcard $(VENV)/bin/cmake) cmake)

build: $(BUILT)

lint: $(STAMPS)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict python/tautorch
	$(VENV)/bin/clang-format --dry-run -Werror $(CFORMAT)

wheel: $(DEPS)
	@$(need_compiler)
	$(PY) -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir dist
	@ls dist/*.whl

# Cross-compiled and tried under qemu-user, beside torch too. ARGS="--torch none": without.
wheel-aarch64: $(DEPS)
	$(PY) tools/wheel_aarch64.py $(ARGS)

# Subprocesses of a test load the plain extension; leaks are not looked for, because Python never frees all it holds.
# -s: a sanitizer ends the process, and what pytest has captured of its report with it. Left out is what runs torch's code
# rather than ours, and what repeats a kernel's sizes: the rest takes 3 minutes of CPU time.
# The one about freed tensors needs an allocator that reuses addresses, which the address sanitizer takes care not to do.
UNDER_SANITIZERS = LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
SANITIZED := not freed_tensors and not gradients and not opcheck and not bad_ and not refused and not threads_do_not and not any_case
sanitize: build
	$(CMAKE) -S . -B build/sanitize -DTAUTORCH_SANITIZE=address,undefined -DTAUTORCH_OUTPUT_DIR=$(abspath build/sanitize)
	$(VENV)/bin/cmake --build build/sanitize
	$(UNDER_SANITIZERS) $(PY) tests/sanitized.py build/sanitize tests/ops -q -s -k "$(SANITIZED)" $(ARGS)
	$(UNDER_SANITIZERS) TAUTORCH_TEST_BUILD=$(abspath build/sanitize) \
	  $(PY) -m pytest tests/capi -q -s -k "not plain and not installed" $(ARGS)
	$(VENV)/bin/cmake --build build/sanitize --target native_test
	build/sanitize/tests/native/native_test tests/golden/golden.json

# The address sanitizer runs under qemu-user, its search for leaks does not.
sanitize-aarch64: $(DEPS)
	$(CMAKE) -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DTAUTORCH_PYTHON=OFF -DTAUTORCH_SANITIZE=address,undefined \
	  -S . -B build/aarch64-sanitize
	$(VENV)/bin/cmake --build build/aarch64-sanitize --target native_test
	for cpu in cortex-a72 neoverse-n1 max; do ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu $$cpu \
	  build/aarch64-sanitize/tests/native/native_test tests/golden/golden.json || exit 1; done

clean:
	rm -rf build dist $(STAMPS)/build-* python/tautorch/*.so

# ---- set-up ---------------------------------------------------------------------------------------------------------

# Each check is one line when it fails.
need_compiler = for c in $${CXX:-c++ g++ clang++}; do \
  echo 'int main() {}' | $$c -std=c++17 -x c++ -fsyntax-only - 2>/dev/null && exit 0; done; \
  echo "tautorch: no C++17 compiler ($${CXX:-c++, g++, clang++}); install one (apt-get install g++) or give CXX=/path/to/it" >&2; exit 1
find_python = for p in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && break; p=; done; \
  test -n "$$p" || { echo "tautorch: Python 3.11, 3.12 or 3.13 not found; install one or give PYTHON=/path/to/python" >&2; exit 1; }

# A virtual environment that is there is taken as it is.
$(PY):
	@$(need_compiler)
	@$(find_python); \
	"$$p" -m venv $(VENV) || { \
	  echo "tautorch: $$p cannot make a virtual environment; install its venv module (apt-get install python3-venv)" >&2; exit 1; }

$(DEPS): requirements/lock.txt requirements/triton.txt | $(PY)
	@$(need_compiler)
	$(PIP) -r requirements/lock.txt torch==$(TORCH)
	$(PY) -c "import triton" 2>/dev/null || $(PIP) -r requirements/triton.txt
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/deps-* && touch $@

$(STAMPS)/lint: requirements/lint.txt $(DEPS)
	$(PIP) -r requirements/lint.txt
	@touch $@

# The editable install maps the package's files, so it is renewed when their list changes.
$(STAMPS)/files: FORCE
	@mkdir -p $(STAMPS) && find python -name '*.py' | sort > $@.new && if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(BUILT): $(CSRC) CMakeLists.txt pyproject.toml $(DEPS) $(STAMPS)/files
	@$(need_compiler)
	@if [ "$$TAUTORCH_CUDA" = on ] || { [ "$$TAUTORCH_CUDA" = auto ] && [ -e /dev/nvidia0 ] && command -v nvcc >/dev/null; }; then \
	  [ -n "$$TAUTORCH_CUTLASS_DIR" ] || $(PIP) --no-deps -r requirements/cuda.txt; fi
	$(PIP) --no-build-isolation --no-deps --editable .
	@rm -f $(STAMPS)/build-* && touch $@
