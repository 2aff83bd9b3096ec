# Every target does its own set-up: a virtual environment, the pinned packages, the compiled kernels.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DIR ?= bench/results
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo protos test wheel wheel-check promtool sanitize forced-isa bench lint gpu-report serve-demo clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools pybind11
	FASTREC_BUILD_CPU=1 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/fastrec table1 --preset demo --out demo --json demo/table1.json

# A server, a load that climbs to three times what it can do, and the report of that.
serve-demo: setup
	$(BIN)/python examples/serve_demo.py --out demo/serving

# The wire protocol's descriptor set, after a change of its .proto files.
PROTOS := src/fastrec/serving/wire/protos
protos: setup
	$(BIN)/python -m grpc_tools.protoc -I$(PROTOS) --include_imports \
	  --descriptor_set_out=$(PROTOS)/schema.binpb $(PROTOS)/*.proto

# What serves in real time has the machine to itself; all else runs two at a time.
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/serving
	$(BIN)/python -m pytest tests/serving

# What a release ships (the CUDA kernels stay out: CuPy compiles them at first use), compiled anew.
wheel: setup
	rm -rf dist/*.whl build
	FASTREC_BUILD_CPU=1 FASTREC_BUILD_CUDA=0 $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

# That wheel in an empty environment without a compiler: import, info, an engine's scores, a server.
wheel-check: wheel
	FASTREC_WHEEL_CHECK=$$(ls $(CURDIR)/dist/*.whl) $(BIN)/python -m pytest -q tests/packaging

# Prometheus' checker of alert rules, out of Debian's package; without it its tests are skipped.
promtool: setup
	command -v promtool || test -x $(BIN)/promtool || { d=$$(mktemp -d) && cd $$d \
	  && apt-get download -q prometheus && dpkg -x prometheus_*.deb . \
	  && install usr/bin/promtool $(abspath $(BIN))/promtool; r=$$?; rm -rf $$d; exit $$r; }

# The compiled part's own tests: as shipped, and under address, undefined-behaviour and thread sanitizers.
sanitize:
	$(MAKE) -s -C csrc/cpu/tests -j2

# What an older machine would run, end to end.
forced-isa: setup
	for isa in scalar avx2; do \
	  FASTREC_FORCE_ISA=$$isa $(BIN)/python -m pytest -q -n 2 tests/test_contract.py tests/nn || exit 1; \
	done

bench: setup
	mkdir -p $(DIR)
	$(BIN)/python bench/bench_kernels.py --out $(DIR)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

# With a GPU: this machine's own Python and packages, no network; it builds for that GPU by itself.
# Without: a dry run in the venv. SECTIONS="ranker-1 ranker-64": only these, with more time.
gpu-report:
	mkdir -p $(DIR)
	@if $(PYTHON) -c 'import torch, triton; assert torch.cuda.is_available()' 2>/dev/null; then \
	  PYTHONPATH=src $(PYTHON) bench/gpu_report.py --out $(DIR) $(if $(SECTIONS),--sections $(SECTIONS)); \
	else \
	  $(MAKE) setup && $(BIN)/python bench/gpu_report.py --out $(DIR) $(if $(SECTIONS),--sections $(SECTIONS)); \
	fi

clean:
	rm -rf $(VENV) build demo src/*.egg-info src/fastrec/_native*.so
