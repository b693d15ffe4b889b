# make infer      classify the demo pictures      make test   everything that must be green, within 15 minutes
# make setup      a virtual environment in .venv  make lint   format, lint, types
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# without an NVIDIA GPU the pinned torch is taken, whose CPU build pip prefers where it is offered
PINS := $(if $(shell command -v nvidia-smi),,-c constraints.txt)

.PHONY: setup infer test lint train

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PINS) -e '.[cpu,dev]'
	touch $@

infer: setup
	$(BIN)/torchrun launch/infer.py --streams-per-gpu 1 --verify

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# about half an hour on two cores; needs Debian's package dataset-fashion-mnist
train: setup
	$(BIN)/python launch/train.py /usr/share/datasets/fashion-mnist \
		--out launch/demo/parnet_fashion.safetensors --log results/train-parnet_fashion.json
