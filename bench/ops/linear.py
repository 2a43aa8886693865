"""Bench cases of a linear layer: timed only, because the kernels are cuBLAS's, MKL's and oneDNN's."""

import torch
import torch.nn.functional as F

from phimini.bench.ops.harness import Case
from phimini.kernels.linear import linear, linear_reference


def timed_cases(device: str, quick: bool) -> list[Case]:
    """Return the fused gate_up of the GPU preset; on a CPU that of a small model, a square product, a sampler's step."""
    if device == "cuda":
        shapes = [(16384, 3072, 16384)]
        return [_case(*shape, device, torch.bfloat16) for shape in shapes]
    shapes = [(1536, 128, 512)] if quick else [(1536, 128, 512), (1024, 1024, 1024), (64, 128, 512)]
    return [_case(*shape, device, torch.float32) for shape in shapes]


def _case(M: int, K: int, N: int, device: str, dtype: torch.dtype) -> Case:
    x = torch.randn(M, K, device=device, dtype=dtype)
    w_NK = torch.randn(N, K, device=device, dtype=dtype) / K**0.5
    values, flops = (M * K + N * K + M * N) * x.element_size(), 2 * M * K * N
    return Case(
        op="linear",
        shape={"M": M, "K": K, "N": N},
        inputs={"x": x, "w_NK": w_NK},
        providers={"phimini": linear, "eager": lambda x, w_NK: F.linear(x, w_NK)},
        reference=linear_reference,
        min_bytes={"fwd": values, "fwd+bwd": 3 * values},
        min_flops={"fwd": flops, "fwd+bwd": 3 * flops},
    )
