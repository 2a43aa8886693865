"""Choice of the back-end that computes an op, and the size of the GPU."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]
"""Type of the public ops' private `_backend` argument. Tests pass "triton" to run the kernels in the interpreter."""


stand_in: Callable[[Tensor], bool] | None = None
"""Answers `on_gpu` instead of the tensor's device, where a bench or a test counts on a CPU what a GPU would be given."""


def on_gpu(x: Tensor) -> bool:
    """Return whether x is on a GPU, which the host must not wait for. Every such choice asks here."""
    return x.is_cuda if stand_in is None else stand_in(x)


def host_knows(x: Tensor) -> bool:
    """Return whether the host can read x's values without waiting: they are on the CPU, and x is not traced or fake."""
    if torch.compiler.is_compiling():
        return False
    return type(x) is Tensor and x.device.type == "cpu" and not on_gpu(x)


def runs_triton(x: Tensor, backend: Backend | None) -> bool:
    """Return `backend == "triton"`; for None, whether x is on CUDA and not fp64 (the kernels compute in fp32)."""
    if backend is None:
        return on_gpu(x) and x.dtype != torch.float64
    return backend == "triton"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that an op computes in: fp64 for fp64, fp32 for all others."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the GPU's number of streaming multiprocessors, or 1 on a CPU (the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
