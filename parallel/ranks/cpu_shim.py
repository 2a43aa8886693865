"""Run megatron-core 0.16 to 0.19 on a machine without CUDA (gloo), at no cost per operation.

Megatron writes the device into its code: `device="cuda"`, `param.type() == "torch.cuda.FloatTensor"`,
`torch.cuda.current_device()`. This module rewrites the string constants in the compiled code of `megatron.core`
modules, at their import or, if they are already imported, in place. It also replaces the few `torch.cuda` functions
that Megatron calls with their CPU counterparts. A `TorchFunctionMode` would reach the same places, but it slows down
every operation of the process and makes `Tensor.type()` return the wrong type.

Does nothing where CUDA is available.
"""

import gc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

_CPU_LITERAL = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_PACKAGE = "megatron.core"
_RANDOM = "megatron.core.tensor_parallel.random"
_installed = False


def _to_cpu(value: Any) -> Any:
    """Return `value` with every CUDA literal in it replaced: strings, tuples of them, code and its nested code."""
    if isinstance(value, str):
        return _CPU_LITERAL.get(value, value)
    if isinstance(value, tuple):
        return tuple(_to_cpu(v) for v in value)
    if isinstance(value, CodeType):
        return value.replace(co_consts=_to_cpu(value.co_consts))
    return value


def _rewrite_function(function: FunctionType) -> None:
    function.__code__ = _to_cpu(function.__code__)
    if function.__defaults__:
        function.__defaults__ = _to_cpu(function.__defaults__)
    if function.__kwdefaults__:
        function.__kwdefaults__ = {k: _to_cpu(v) for k, v in function.__kwdefaults__.items()}


def _use_cpu_generator(random: ModuleType) -> None:
    """Turn Megatron's per-rank random states into named states of the CPU generator."""
    random.__dict__["_get_cuda_rng_state"] = lambda *_, **__: torch.get_rng_state()
    random.__dict__["_set_cuda_rng_state"] = lambda state, *_, **__: torch.set_rng_state(state)


class _CpuLoader(importlib.machinery.SourceFileLoader):
    """Python's own loader, which rewrites in memory the code object that it read from source or .pyc."""

    def get_code(self, fullname: str) -> CodeType | None:
        return _to_cpu(super().get_code(fullname))

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == _RANDOM:
            _use_cpu_generator(module)


class _CpuFinder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _PACKAGE and not name.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _CpuLoader(spec.loader.name, spec.loader.path)
        return spec


class _NoStream:
    """A stand-in for a CUDA stream with empty methods: the CPU runs in order."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def is_installed() -> bool:
    """Return True if `install` has changed this process."""
    return _installed


def install() -> None:
    """Make this process's megatron-core run on the CPU, once, where CUDA is not available."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.current_stream = lambda *_, **__: _NoStream()
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    tensor: Any = torch.Tensor
    # The copy of a tied embedding on the last pipeline stage.
    tensor.cuda = lambda self, *_, **__: self
    sys.meta_path.insert(0, _CpuFinder)  # pyright: ignore[reportArgumentType]
    if _PACKAGE in sys.modules:
        for thing in gc.get_objects():
            if type(thing) is FunctionType and str(thing.__module__).startswith(_PACKAGE):
                _rewrite_function(thing)
    if _RANDOM in sys.modules:
        _use_cpu_generator(sys.modules[_RANDOM])
