# `make demo` and `make test` work on a fresh machine that has Python 3.11 or later and a way to PyPI.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types bench paper vectors clean

demo: .venv/core  ## from nothing to an answer of SmolLM2-135M-Instruct out of a .rkf file
	$(BIN)/rkf run --prompt "What is the capital of France?" --stats

test: .venv/dev  ## every test, those on the real model too (fetched once into the user's cache)
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .

types: .venv/dev  ## of the package as installed: in the checkout two rooms stand outside rkf/
	rm -rf build/types && $(BIN)/pip install -q --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p rkf

bench: .venv/core  ## speed and memory of the default model on this machine
	$(BIN)/rkf bench "$$($(BIN)/python -m rkf.commands.default_model)" --json

paper: .venv/dev  ## docs/paper.md from docs/paper/*/results.json; with TEXT=FILE the trials missing there are done first
	$(BIN)/python -m benchmarks.paper $(if $(TEXT),--text "$(TEXT)")

vectors: .venv/dev  ## make the golden files of the specification that are missing; bytes of the others may not change
	$(BIN)/python spec/make_vectors.py

clean:
	rm -rf .venv build dist *.egg-info

.venv/core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	touch $@

.venv/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@ .venv/core
