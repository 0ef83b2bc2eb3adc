# `make help` lists the targets. What they need is installed into $(VENV) once, and again when setup.py changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PARITY_VENV ?= .venv-parity
BROWSER_VENV ?= .venv-browser
LOWEST_VENV ?= .venv-lowest
RELEASE_VENV ?= .venv-release

.DEFAULT_GOAL := help
.PHONY: help demo lora test test-slow test-parity test-browser bench docs quality style test-lowest release clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

# Passive: threads that spin while they wait draw ten times slower where another process has one of the cores.
demo: $(VENV)/.installed ## draw four pictures with checkpoints/emoji-mini
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/hf-dalle draw "a glossy 3d style emoji of teddy bear" \
		--checkpoint checkpoints/emoji-mini --num_images 4 --seed 0 --output teddy_bear.png

lora: $(VENV)/.installed-dev ## teach checkpoints/emoji-mini a new style from 100 pictures; needs npm
	$(BIN)/python training/prepare_style.py
	$(BIN)/accelerate launch --num_cpu_threads_per_process 2 training/train.py training/configs/emoji_mini_lora.yaml

test: $(VENV)/.installed-dev ## run the tests but the slow ones
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev ## run all tests
	$(BIN)/python -m pytest -m "slow or not slow"

test-parity: $(VENV)/.installed-dev $(PARITY_VENV)/.installed ## compare converted models with the originals' own code
	HF_DALLE_PARITY_PYTHON=$(abspath $(PARITY_VENV))/bin/python $(BIN)/python -m pytest -m parity tests/parity

test-browser: $(BROWSER_VENV)/.installed ## drive the pages (demo, votes, overlap) in headless Chromium; as root, gets one by apt
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null \
		|| (apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver)
	$(BROWSER_VENV)/bin/python -m pytest -m browser $$(grep -l "mark\.browser" tests/test_*.py)

test-lowest: $(LOWEST_VENV)/.installed ## run the tests with the lowest versions that setup.py takes; torch's may be GBs
	$(LOWEST_VENV)/bin/python -m pytest

release: $(RELEASE_VENV)/.installed ## check that the extras go together, build dist/, check what is in it and CITATION.cff
	$(RELEASE_VENV)/bin/uv pip compile --quiet --all-extras setup.py > /dev/null
	rm -rf dist
	$(RELEASE_VENV)/bin/python -m build
	$(RELEASE_VENV)/bin/twine check --strict dist/*
	$(RELEASE_VENV)/bin/cffconvert --validate

bench: $(VENV)/.installed-bench ## time and weigh it beside its peers; 10 minutes on two idle cores
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/dvae.py
	$(BIN)/python benchmarks/memory.py 1.2b
	$(BIN)/python benchmarks/train_loop.py --num_threads 1

docs: $(VENV)/.installed-docs ## draw the pictures of docs/ and build its pages into docs/_build
	$(BIN)/python docs/figures.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

quality: $(VENV)/.installed-dev ## check the lint, the format and the types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

style: $(VENV)/.installed-dev ## repair the lint and the format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove the environments and what tools left behind
	rm -rf .venv .venv-parity .venv-browser .venv-lowest .venv-release .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist docs/_build src/*.egg-info
	find src training benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# A torch that $(PYTHON) has is reused by a line in the new environment's path, wherever that torch is (in a virtual
# environment too, which --system-site-packages would not see). A $(VENV) that is there already is kept as it is.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" 2> /dev/null \
		> $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/installed_torch.pth || true

$(VENV)/.installed: setup.py | $(BIN)/pip
	$(BIN)/pip install -e .
	@touch $@

$(VENV)/.installed-dev: setup.py | $(BIN)/pip
	$(BIN)/pip install -e ".[dev]"
	@touch $(VENV)/.installed $@

# OpenAI's package asks for torchvision, mypy and pytest too, which its encoder and decoder do not use.
$(VENV)/.installed-bench: setup.py | $(BIN)/pip
	$(BIN)/pip install -e ".[bench,train]"
	$(BIN)/pip install --no-deps DALL-E==0.1
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: setup.py | $(BIN)/pip
	$(BIN)/pip install -e ".[docs]"
	@touch $(VENV)/.installed $@

# The originals and what they alone need; torch, transformers and the like are $(VENV)'s, by a line in the path, which
# comes after the packages of the environment itself. Nothing of it gets into $(VENV).
$(PARITY_VENV)/.installed: tests/parity/requirements.txt tests/parity/originals.txt | $(VENV)/.installed-dev
	$(BIN)/python -m venv $(PARITY_VENV)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(PARITY_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(PARITY_VENV)/bin/pip install -r tests/parity/requirements.txt
	$(PARITY_VENV)/bin/pip install --no-deps --no-build-isolation -r tests/parity/originals.txt
	for version in 1.0.0 1.4.2; do $(PARITY_VENV)/bin/pip install --no-deps \
		--target $(PARITY_VENV)/dalle-pytorch-$$version dalle-pytorch==$$version || exit 1; done
	@touch $@

# Lowest of what setup.py names; of what that brings along, the newest that fits.
$(LOWEST_VENV)/.installed: setup.py
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/pip install "uv>=0.9"
	$(LOWEST_VENV)/bin/uv pip install --python $(LOWEST_VENV)/bin/python --resolution lowest-direct -e ".[test]"
	@touch $@

$(RELEASE_VENV)/.installed:
	$(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/pip install "build>=1.6,<2" "cffconvert==2.0.0" "twine>=7.0,<8" "uv>=0.9"
	@touch $@

# gradio holds pillow below 13, selenium brings packages of its own: an environment beside, on top of $(VENV).
$(BROWSER_VENV)/.installed: setup.py | $(VENV)/.installed-dev
	$(BIN)/python -m venv $(BROWSER_VENV)
	@$(BIN)/python -c "import sys; print(*filter(lambda path: path.endswith('-packages'), sys.path), sep='\n')" \
		> $$($(BROWSER_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(BROWSER_VENV)/bin/pip install -e ".[browser]"
	@touch $@
