# `make demo` and `make test` work on a fresh machine with Python 3.11 or later and access to PyPI.
# Tests run in a process per core: alone they keep one core busy. Each takes about 1 GB for torch and transformers, so at
# most 4, with one torch thread each.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fuzz lint types bench gpu wheel web paper vectors clean

demo: .venv/core  ## install, convert SmolLM2-135M-Instruct to an .rkf file, and print its answer to one question
	$(BIN)/rkf run --prompt "What is the capital of France?" --stats

test: .venv/dev  ## run every test, including those on the real model (fetched once into the user's cache)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

fuzz: .venv/dev  ## fuzz every reader of foreign bytes, MINUTES each; with atheris where the extra `fuzz` is installed
	$(BIN)/python -m tests.fuzz all --minutes $(or $(MINUTES),1)

lint: .venv/dev
	$(BIN)/ruff check .

types: .venv/dev  ## check types of the installed package, because in the checkout two rooms are outside rkf/
	rm -rf build/types && $(BIN)/pip install -q --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p rkf

bench: .venv/core  ## measure speed and memory of the default model on this machine
	$(BIN)/rkf bench "$$($(BIN)/python -m rkf.commands.default_model)" --json

gpu: .venv/dev  ## compare what runs on a GPU with the exact path of the CPU; without a GPU, what it can on the CPU
	$(BIN)/python -m benchmarks.gpu $(or $(MODEL),"$$($(BIN)/python -m rkf.commands.default_model)")

wheel: .venv/dev  ## build dist/*.whl with all kernels compiled for Linux on x86-64 and ARM (five minutes on two cores)
	$(BIN)/python -m rkf.runtime.prebuild
	$(BIN)/python -m build

WEB := rkf/serve/web
web:  ## copy the chat page's libraries from npm, at the versions of rkf/serve/web/package-lock.json
	mkdir -p build/web && cp $(WEB)/package.json $(WEB)/package-lock.json build/web && cd build/web && npm ci --silent
	cp build/web/node_modules/htm/preact/standalone.module.js $(WEB)/vendor/htm-preact.js
	cp build/web/node_modules/marked/lib/marked.esm.js build/web/node_modules/dompurify/dist/purify.es.mjs $(WEB)/vendor
	cp build/web/node_modules/@highlightjs/cdn-assets/es/highlight.min.js $(WEB)/vendor
	cd build/web/node_modules && cat htm/LICENSE marked/LICENSE dompurify/LICENSE @highlightjs/cdn-assets/LICENSE > ../../../$(WEB)/vendor/LICENSES

paper: .venv/dev  ## make docs/paper.md from docs/paper/*/*/results.json; TEXT=FILE first runs the missing trials
	$(BIN)/python -m benchmarks.paper $(if $(TEXT),--text "$(TEXT)")

vectors: .venv/dev  ## make missing golden files of the specification; the bytes of existing ones must not change
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
