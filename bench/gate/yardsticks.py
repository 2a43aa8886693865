"""Yardsticks of the machine, measured in the same run: a matrix product for arithmetic, a plain loop for Python."""

import time
from collections.abc import Callable

import torch

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
PYTHON_WORDS = [str(i % 997) for i in range(40_000)]


def seconds(fn: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: this process's CPU time on a CPU, wall time until the GPU is done on a GPU."""
    if device.type == "cpu":
        began = time.process_time()
        fn()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def gemm_factors(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two square matrices: fp32 on a CPU, bf16 on a GPU."""
    size = GEMM_SIZE[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    return a, b


def gemm_flops(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the FLOP/s of one a @ b."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / seconds(lambda: torch.mm(a, b), a.device)


def python_rate() -> float:
    """Return the words per second of a plain Python loop over a dictionary, the kind of work that packing is."""

    def work() -> None:
        counts: dict[str, int] = {}
        for word in PYTHON_WORDS:
            counts[word] = counts.get(word, 0) + len(word)

    return len(PYTHON_WORDS) / seconds(work, torch.device("cpu"))
