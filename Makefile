# Two commands set everything up on a fresh machine: `make quickstart` and `make test`. Both can be repeated.

PYTHON ?= python3
VENV   ?= .venv
# cpu or cuda: which build of torch. Chosen by whether there is an NVIDIA driver; override with `make TORCH=...`.
TORCH  ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
INSTALLED := $(VENV)/.installed-$(TORCH)
BUILT := $(VENV)/.built-$(TORCH)
PIP := $(BIN)/python -m pip install --quiet

.PHONY: help install quickstart quickstart-ppo test lint shows doctor clean

help:
	@echo "make quickstart      environment, then GRPO on arithmetic: about five minutes of training on 2 cores"
	@echo "make quickstart-ppo  environment, then a reward model and PPO with all four roles: about eight minutes"
	@echo "make test            environment, then the tests that need no GPU"
	@echo "make shows           the long claims: three seeds and two controls each, 10^5 fuzz operations"
	@echo "make lint            ruff and mypy"
	@echo "make doctor          is this machine ready?"

install: $(BUILT)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	# torch first and pinned: an open requirement would fetch gigabytes of CUDA for a machine without a GPU.
	# The CPU build by its own name where pip can see it, else whatever the version number gives.
	$(if $(filter cpu,$(TORCH)),$(PIP) "torch==$(TORCH_VERSION)+cpu" ||) $(PIP) "torch==$(TORCH_VERSION)"
	$(PIP) --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

# DeepSpeed builds one small collective op on first use, and our CPU ops are C++: done once here, with a bound, so that
# no two ranks race for it. Without a compiler plain torch computes, several times slower.
$(BUILT): $(INSTALLED)
	timeout 600 $(BIN)/python -m rlhf.backends.prebuild
	timeout 600 $(BIN)/python -m kernels.cpu
	touch $@

quickstart: install
	$(BIN)/rlhf train configs/arithmetic_grpo_cpu.yaml

quickstart-ppo: install
	$(BIN)/rlhf reward-model configs/arithmetic_reward_model_cpu.yaml
	$(BIN)/rlhf train configs/arithmetic_ppo_cpu.yaml

test: install
	$(BIN)/python -m pytest -m "not gpu and not slow"

shows: install
	$(BIN)/python -m pytest -m slow -s

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

doctor: install
	$(BIN)/rlhf doctor

clean:
	rm -rf $(VENV) build dist *.egg-info
