# Every target does its own set-up and no more than it needs: a virtual environment, the pinned packages
# (by uv where there is one), the compiled kernels (through ccache where there is one).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DIR ?= bench/results
DEMO ?= demo
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
UV := $(shell command -v uv 2>/dev/null)
PIP := $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install --disable-pip-version-check)

.PHONY: setup demo protos test test-all wheel wheel-check promtool sanitize forced-isa bench lint docs \
  gpu-report serve-demo clean

# Everything, GPU compilers and Ray among it; `make demo`, `test` and `lint` need less.
setup: $(VENV)/.dev

$(VENV)/.made:
	$(if $(UV),$(UV) venv --seed --allow-existing --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))
	$(PIP) -c constraints.txt setuptools pybind11
	touch $@

# $(call install,EXTRA,VARIABLES): compile what has changed, where its progress is seen, then the packages.
define install
	@echo "== fastrec-kernels[$(1)] into $(VENV)"
	$(2) $(BIN)/python setup.py -q build_ext --inplace
	$(2) $(PIP) -c constraints.txt --no-build-isolation -e '.[$(1)]'
	touch $@
endef
INPUTS := pyproject.toml setup.py constraints.txt $(NATIVE)

$(VENV)/.demo: $(INPUTS) | $(VENV)/.made
	$(call install,demo,FASTREC_BUILD_CPU=1 FASTREC_BUILD_CUDA=0)

$(VENV)/.test: $(VENV)/.demo
	$(call install,test,FASTREC_BUILD_CPU=1)

$(VENV)/.dev: $(VENV)/.test
	$(call install,dev,FASTREC_BUILD_CPU=1)

$(VENV)/.lint: pyproject.toml constraints.txt | $(VENV)/.made
	$(call install,lint,FASTREC_BUILD_CPU=0 FASTREC_BUILD_CUDA=0)

# Table I on a synthetic log. An interrupted run goes on.
demo: $(VENV)/.demo
	$(BIN)/fastrec table1 --preset demo --out $(DEMO) --json $(DEMO)/table1.json

# A server, a load that climbs to three times what it can do, and the report of that.
serve-demo: $(VENV)/.test
	$(BIN)/python examples/serve_demo.py --out demo/serving

# The wire protocol's descriptor set, after a change of its .proto files.
PROTOS := src/fastrec/serving/wire/protos
protos: $(VENV)/.test
	$(BIN)/python -m grpc_tools.protoc -I$(PROTOS) --include_imports \
	  --descriptor_set_out=$(PROTOS)/schema.binpb $(PROTOS)/*.proto

# Serving tests measure latency, so they run alone; the rest runs on two workers. Both parts run, whatever
# the first gives.
PYTEST = $(BIN)/python -m pytest
define run_tests
	@failed=0; \
	$(PYTEST) $(1) -n 2 --dist worksteal --ignore=tests/serving || failed=1; \
	$(PYTEST) $(1) tests/serving || failed=1; \
	exit $$failed
endef

# What a change needs: tests of more than ten seconds, and of packages of hundreds of megabytes, are left
# to `make test-all`.
test: $(VENV)/.test
	$(call run_tests,-m "not slow")

test-all: $(VENV)/.dev
	$(call run_tests)

# What a release ships (the CUDA kernels stay out: CuPy compiles them at first use), compiled anew.
wheel: $(VENV)/.test
	rm -rf dist/*.whl build
	FASTREC_BUILD_CPU=1 FASTREC_BUILD_CUDA=0 $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

# That wheel in an empty environment without a compiler: import, info, an engine's scores, a server.
wheel-check: wheel
	FASTREC_WHEEL_CHECK=$$(ls $(CURDIR)/dist/*.whl) $(BIN)/python -m pytest -q tests/packaging

# Prometheus' checker of alert rules, out of Debian's package; without it its tests are skipped.
promtool: $(VENV)/.made
	command -v promtool || test -x $(BIN)/promtool || { d=$$(mktemp -d) && cd $$d \
	  && apt-get download -q prometheus && dpkg -x prometheus_*.deb . \
	  && install usr/bin/promtool $(abspath $(BIN))/promtool; r=$$?; rm -rf $$d; exit $$r; }

# The compiled part's own tests: as shipped, and under address, undefined-behaviour and thread sanitizers.
sanitize:
	$(MAKE) -s -C csrc/cpu/tests -j2

# What an older machine would run, end to end.
forced-isa: $(VENV)/.test
	for isa in scalar avx2; do \
	  FASTREC_FORCE_ISA=$$isa $(BIN)/python -m pytest -q -n 2 tests/test_contract.py tests/nn || exit 1; \
	done

bench: $(VENV)/.test
	mkdir -p $(DIR)
	$(BIN)/python bench/bench_kernels.py --out $(DIR)

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

# The documentation as a site: build/site. A link that leads nowhere is an error.
$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.made
	$(call install,docs,FASTREC_BUILD_CPU=0 FASTREC_BUILD_CUDA=0)

docs: $(VENV)/.docs
	$(BIN)/zensical build --strict

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
	rm -rf $(VENV) build demo src/*.egg-info src/fastrec/_native*.so src/fastrec/lib/*.so src/fastrec/include
