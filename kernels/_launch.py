"""What the launch code of several kernels needs: which backend runs, and how wide the GPU is."""

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]
"""A private argument of the public ops: tests run the Triton kernels on a CPU, in the interpreter."""


def runs_triton(x: Tensor, backend: Backend | None) -> bool:
    """Triton on CUDA, plain torch elsewhere and for fp64 (the kernels compute in fp32); or what the caller says."""
    if backend is None:
        return x.is_cuda and x.dtype != torch.float64
    return backend == "triton"


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; 1 in the CPU interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 inside, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(n: int, d: int) -> int:
    return -(-n // d)
