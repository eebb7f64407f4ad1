# `make help` lists what can be made. Everything lives in .venv, build/ and out/; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
WORKSPACE ?= build/workspace
IMAGE ?= seedpod
TARGET ?= gpu
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
export DOCKER_BUILDKIT = 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint image image-test up down run check fetch bench clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/ready ## restore a clip, make a video from a prompt, and edit latents with nano models, into out/
	$(BIN)/python tools/demo.py --workspace $(WORKSPACE) --out out

test: .venv/dev ## run every test but those of the image
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/image

lint: .venv/dev ## ruff and mypy --strict
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

image: ## build the image: make image [TARGET=cpu] [IMAGE=seedpod:cpu] [ARGS='--build-arg ...']
	docker build --target $(TARGET) --tag $(IMAGE) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null) $(ARGS) .

image-test: .venv/dev ## build and run the image on a Docker engine of its own: Debian, as root
	$(BIN)/python -m pytest tests/image -v -rs --durations=0

up: ## serve nano on a laptop, at http://127.0.0.1:8000, until Ctrl-C
	@mkdir -p out
	HOST_UID=$$(id -u) HOST_GID=$$(id -g) $(COMPOSE) up --build

down: ## stop what compose runs
	$(COMPOSE) --profile gpu down

run: .venv/ready ## restore a clip: make run INPUT=in.mp4 OUTPUT=out.mp4 [ARGS='--scale 2']
	$(BIN)/python entrypoint.py run restore $(INPUT) -o $(OUTPUT) $(ARGS)

check: .venv/ready ## verify the checkpoints under SEEDPOD_ROOTS
	$(BIN)/python entrypoint.py check

fetch: .venv/ready ## download MODEL into the first of SEEDPOD_ROOTS: make fetch MODEL=seedvr2-3b
	$(BIN)/python entrypoint.py fetch $(MODEL)

bench: .venv/dev ## print every figure of docs/benchmarks.md
	$(BIN)/python -m benchmarks

clean: ## remove .venv, build and out
	rm -rf .venv build out/* .mypy_cache .ruff_cache .hypothesis

.venv/bin/python: requirements/pip.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/pip.txt
	@touch $@

# A CPU wheel of torch in a folder that pip is told to look in (PIP_FIND_LINKS) is preferred to the index, where
# torch comes with gigabytes of CUDA. torch-deps.txt holds the hashes of whatever the torch that it is needs.
.venv/ready: requirements/run.txt requirements/torch.txt requirements/torch-cpu.txt requirements/torch-deps.txt \
  .venv/bin/python
	@$(BIN)/pip install --quiet --no-index --no-deps -r requirements/torch-cpu.txt 2>/dev/null || true
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  -r requirements/torch.txt -c requirements/torch-deps.txt -r requirements/run.txt
	@touch $@

.venv/dev: requirements/dev.txt requirements/latents.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
	  -r requirements/latents.txt -r requirements/dev.txt
	@touch $@
