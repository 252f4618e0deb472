# Everything below runs in .venv, which `make setup` makes and fills from requirements.lock. README.md has the plain commands.

PYTHON ?= python3
# Where to take torch from, when not from PyPI; without a GPU: https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.installed
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -qq
PYTEST := $(BIN)/python -m pytest
SLOWER := notebook or browser or process or slow
APART := gpu or long or soak or triton_interpreter
RESULTS := benchmarks/results
RUNS := $(or $(REFINE_RUNS),runs)
FIRST_HALF := tests/notebooks tests/sweep tests/runs
START := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check check-rest check-first-half check-second-half long soak gpu-proof lab bench docs lint lock chromium

help: ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

# -- environment ---------------------------------------------------------------------------------------------------------

setup: $(READY) ## .venv with the locked packages and this project; nothing to do where it stands
	@:

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; (3, 11, 5) <= v < (3, 14) or sys.exit("refine_lab needs \
	Python 3.11.5 to 3.13, and $(PYTHON) is %d.%d.%d: name another with make PYTHON=..." % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the locked packages into .venv (the first time: a few minutes)"
ifneq ($(TORCH_INDEX),)
	@$(PIP_INSTALL) --no-deps --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.lock)"
endif
	@$(PIP_INSTALL) -r requirements.lock
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@$(BIN)/python -m widgets.server
	@touch $@

# The whole environment as pins. Left out: torch's own exact pins (nvidia-*, cuda-*) and its build (+cpu), so that the lock
# serves both builds. Added: what pip would ask for on macOS only.
LOCK_BIN := .venv-lock/bin
LINUX := triton|flash-linear-attention|fla-core|einops
lock: ## requirements.lock and environment.yml anew, from the ranges in pyproject.toml
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@$(LOCK_BIN)/pip install -qq torch==2.13.0 triton==3.7.1
	@$(LOCK_BIN)/pip install -qq setuptools appnope -e '.[hub,dev,eval]'
	@{ echo '# The whole environment, dev tools included, for the CUDA and the CPU build of torch; written by `make lock`.'; \
	  $(LOCK_BIN)/pip freeze --all --exclude-editable \
	  | sed -E -e '/^(pip|nvidia-[^=]*|cuda-[^=]*)==/d' -e 's/\+[a-z0-9.]+$$//' \
	    -e "s/^($(LINUX))==.*/&; sys_platform == 'linux'/" \
	    -e "s/^appnope==.*/&; sys_platform == 'darwin'/"; } > requirements.lock
	@rm -rf .venv-lock
	@$(MAKE) --no-print-directory environment.yml

environment.yml: requirements.lock
	@{ echo '# The same pins for conda; written by `make lock`.'; \
	  printf '%s\n' 'name: refine_lab' 'channels:' '  - conda-forge' 'dependencies:' '  - python=3.11' '  - pip' '  - pip:'; \
	  sed -e '/^#/d' -e 's/^/      - /' requirements.lock; \
	  echo '      - -e .'; } > $@

# -- use -----------------------------------------------------------------------------------------------------------------

demo: $(READY) ## environment, install, and notebooks/midtrain.ipynb executed
	@ready=$$(date +%s); status=0; mkdir -p "$(RUNS)"; touch .venv/.demo; \
	executed="$(RUNS)"/$$(date +%Y%m%d-%H%M%S)-midtrain.ipynb; \
	report="$${executed%.ipynb}-report.html"; \
	$(BIN)/papermill --log-output --no-progress-bar notebooks/midtrain.ipynb "$$executed" -p fresh true -p report "$$report" || status=$$?; \
	echo; \
	echo "install   $$((ready - $(START))) s"; \
	echo "notebook  $$(($$(date +%s) - ready)) s"; \
	echo "executed  $$executed"; \
	echo "report    $$report"; \
	find "$(RUNS)" -mindepth 1 -maxdepth 1 -type d -newer .venv/.demo | sort | while read -r run; do \
	  cp "$$executed" "$$run/midtrain.ipynb"; echo "run       $$run"; done; \
	exit $$status

lab: $(READY) ## JupyterLab on notebooks/start.ipynb, which leads to the others
	$(BIN)/jupyter lab notebooks/start.ipynb --ServerApp.root_dir=. $$(test "$$(id -u)" != 0 || echo --allow-root)

bench: $(READY) ## the benchmarks, into benchmarks/results/
	@mkdir -p $(RESULTS)
	$(BIN)/python -m benchmarks.step_cost --model tiny-deltanet --json $(RESULTS)/step_cost.json
	$(BIN)/python -m benchmarks.step_cost --model tiny-lact --json $(RESULTS)/step_cost_lact.json
	$(BIN)/python -m benchmarks.families --json $(RESULTS)/families.json
	$(BIN)/python -m benchmarks.decode --model tiny-lact --json $(RESULTS)/decode.json
	$(BIN)/python -m benchmarks.rollout_cost --model tiny-deltanet --json $(RESULTS)/rollout_cost.json
	$(BIN)/python -m benchmarks.memory_view --model tiny-deltanet --json $(RESULTS)/memory_view.json
	$(BIN)/python -m benchmarks.write_attribution --json $(RESULTS)/write_attribution.json
	$(BIN)/python -m benchmarks.memory --model tiny-deltanet --json $(RESULTS)/memory.json
	$(BIN)/python -m benchmarks.ttt --model tiny-deltanet --json $(RESULTS)/ttt.json
	$(BIN)/python -m benchmarks.evaluation --model tiny-deltanet --json $(RESULTS)/evaluation.json
	$(BIN)/python -m benchmarks.widgets --json $(RESULTS)/widgets.json
	$(BIN)/python -m benchmarks.durability --json $(RESULTS)/durability.json

docs: $(READY) ## docs/api.md, docs/glossary.md and the table of files in docs/architecture.md, from the code
	$(BIN)/python docs/generate.py

# -- proof ---------------------------------------------------------------------------------------------------------------

lint: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: $(READY) ## the fast tier
	$(PYTEST) -m "not ($(SLOWER) or $(APART))"

check: test check-rest ## everything that needs no GPU

check-rest: $(READY) chromium ## what `check` adds to `test`: notebooks, browser, kills, demo
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 --output-sync=target check-first-half check-second-half
	$(PYTEST) -m "($(SLOWER)) and not ($(APART))" tests/benchmarks
	@$(MAKE) --no-print-directory demo

# The slower tests in two processes of one thread each. The benchmarks measure time and follow alone.
check-first-half: $(READY)
	$(PYTEST) -m "($(SLOWER)) and not ($(APART))" $(FIRST_HALF)

check-second-half: $(READY)
	$(PYTEST) -m "($(SLOWER)) and not ($(APART))" tests $(addprefix --ignore ,$(FIRST_HALF) tests/benchmarks)

long: $(READY) ## whole files of the benchmarks, from ../shared/data; a Ray cluster; pairs of workers; experiment trackers
	$(PIP_INSTALL) --no-build-isolation -c requirements.lock -e '.[cluster,tracking]'
	$(PYTEST) -m "long and not gpu" -s

soak: $(READY) ## runs under power cuts, damage and faults, in large numbers
	$(PYTEST) -m soak

gpu-proof: $(READY) ## what a CPU can prove about the GPU path; takes hours
	$(PYTEST) -m triton_interpreter
	$(BIN)/python -m benchmarks.aot --json $(RESULTS)/aot.json
	$(BIN)/python -m benchmarks.fake_gpu --model DeltaNet-1.3B --length 16384 --phase midtrain --json $(RESULTS)/fake_gpu.json

chromium:
	@if test -n "$$CHROMIUM" || command -v chromium > /dev/null; then \
	  exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "Installing Debian's chromium for the browser tests"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium > /dev/null; \
	else \
	  echo "The browser tests need Chromium: apt-get install chromium, or name one with make check CHROMIUM=..." >&2; exit 1; \
	fi
