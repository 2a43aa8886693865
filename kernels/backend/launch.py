"""Choice of the back-end that computes an op, and the size of the GPU."""

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]
"""Type of the public ops' private `_backend` argument. Tests pass "triton" to run the kernels in the interpreter."""


def runs_triton(x: Tensor, backend: Backend | None) -> bool:
    """Return `backend == "triton"`; for None, whether x is on CUDA and not fp64 (the kernels compute in fp32)."""
    if backend is None:
        return x.is_cuda and x.dtype != torch.float64
    return backend == "triton"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that an op computes in: fp64 for fp64, fp32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def num_sms(device: torch.device) -> int:
    """Return the GPU's number of streaming multiprocessors, or 1 on a CPU (the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
