# setup: an environment in .venv.  demo: one command to see it work.  test, check, bench: what a change must pass.
# fuzz: properties with examples that no run had before; what it finds becomes an `@example`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
UV := .venv/bin/uv pip install --quiet --python $(PYTHON)
BENCHMARKS := $(filter-out qwen3 recording report rival_vllm sampling_profile soak_blows soak_scripts workloads,$(basename $(notdir $(wildcard benchmarks/*.py))))
COOKBOOK := tinker-cookbook==0.6.1
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
# Without compiled modules, each start of a process that uses torch takes ten seconds more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test fuzz compat recipes check format bench proto

help:
	@echo "make setup | demo | test | fuzz | compat | recipes | check | format | bench | proto"

setup: .venv/installed

$(PYTHON):
	@for name in python3.12 python3.11 python3.13 python3; do \
	  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec "$$name" -m venv .venv; \
	  fi; \
	done; \
	echo "Tinsmith needs Python 3.11 or newer on PATH" >&2; exit 1

.venv/installed: pyproject.toml | $(PYTHON)
	@[[ -x .venv/bin/uv ]] || $(PYTHON) -m pip install --quiet uv
	@$(UV) --editable '.[dev]'
	@$(UV) --no-deps '$(COOKBOOK)'
	@touch $@

demo: setup
	@$(PYTHON) -m tinsmith.demo.walkthrough

test: setup
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadgroup

fuzz: setup
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadgroup -m hypothesis --hypothesis-profile=fresh

# Writes docs/compatibility.md from what works: every method, every command, and earlier versions of the SDK.
compat: setup
	@for version in $$($(PYTHON) -m tests.contract.sdk_versions); do \
	  folder=".venv/sdk/$$version"; \
	  [[ -x "$$folder/bin/python" ]] || $(PYTHON) -m venv --without-pip "$$folder"; \
	  .venv/bin/uv pip install --quiet --python "$$folder/bin/python" "tinker==$$version" numpy; \
	done
	@TINSMITH_TEST_WRITE_COMPATIBILITY=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest \
	  tests/contract/test_compatibility.py tests/contract/test_sdk_versions.py tests/contract/test_tinker_cli.py

# Every recipe of the cookbook that docs/recipes.md lists, in small, against one server. `make recipes OPTIONS=--write`
# writes the outcomes into that page.
recipes: .venv/recipes/installed
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.contract.all_recipes $(OPTIONS)

.venv/recipes/installed: tests/contract/recipe_packages.txt .venv/installed
	@$(UV) --target .venv/recipes --no-deps --requirement $<
	@touch $@

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

bench: setup
	@for name in $(BENCHMARKS); do echo "== $$name"; $(PYTHON) -m "benchmarks.$$name"; done
	@$(PYTHON) -m benchmarks.report

# This generator writes code that every protobuf runtime since 5.29 takes; newer ones demand runtimes as new as themselves.
proto: setup
	.venv/bin/uv run --no-project --isolated --python $(PYTHON) --with 'grpcio-tools==1.62.3' --with 'setuptools<80' \
	  python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. tinsmith/wire/messages.proto
