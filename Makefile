# `make help` lists what can be made. Everything lives in .venv, build/ and out/; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
WORKSPACE ?= build/workspace

.DEFAULT_GOAL := help
.PHONY: help demo test lint check fetch run clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/ready ## restore examples/clip.mp4 with the nano model, into out/
	$(BIN)/python tools/demo.py --workspace $(WORKSPACE) --out out

test: .venv/dev ## run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/dev ## ruff and mypy --strict
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

check: .venv/ready ## verify the checkpoints under SEEDPOD_ROOTS
	$(BIN)/python entrypoint.py check

fetch: .venv/ready ## download MODEL into the first of SEEDPOD_ROOTS: make fetch MODEL=seedvr2-3b
	$(BIN)/python entrypoint.py fetch $(MODEL)

run: .venv/ready ## restore a clip: make run INPUT=in.mp4 OUTPUT=out.mp4 [ARGS='--scale 2']
	$(BIN)/python entrypoint.py run restore $(INPUT) -o $(OUTPUT) $(ARGS)

clean: ## remove .venv, build and out
	rm -rf .venv build out .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: requirements.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
