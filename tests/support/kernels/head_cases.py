"""Inputs and comparisons that the tests of the head ops share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from phimini.kernels.backend.cpu_gemm import library

SHAPES = [
    pytest.param(64, 32, 128, id="aligned"),
    pytest.param(37, 20, 101, id="ragged"),
    pytest.param(1, 8, 33, id="one-row"),
    pytest.param(5, 8, 1, id="one-class"),
]
IGNORE = -100


def make_head(
    M: int, D: int, V: int, dtype: torch.dtype = torch.float32, ignored: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden (M, D), weight (V, D), targets (M,): every fifth row ignored, logits of a few units."""
    hidden = torch.randn(M, D, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, D, dtype=torch.float64) * 2 * D**-0.5).to(dtype)
    targets = torch.randint(0, V, (M,))
    if ignored and M > 1:
        targets[::5] = IGNORE
    return hidden, weight, targets


def chunk_bytes(V: int, dtype: torch.dtype = torch.float32) -> int:
    """Return a budget of 16 rows, the minimum, so that tests take several chunks."""
    return 16 * V * dtype.itemsize


def value_and_grads(
    fn: Callable[[Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]],
    hidden: Tensor,
    weight: Tensor,
) -> dict[str, Tensor]:
    """Return the loss, its metrics and its gradients by name."""
    leaves = [value.detach().clone().requires_grad_() for value in (hidden, weight)]
    loss, metrics = fn(*leaves)
    dx, dw = torch.autograd.grad(loss, leaves)
    named = metrics._asdict().items()  # pyright: ignore[reportAttributeAccessIssue]
    return {"loss": loss.detach(), "dx": dx, "dw": dw} | {
        name: value.detach() for name, value in named
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], limit: float) -> None:
    """Assert |got - want| <= limit * max(1, max|want|) for each name."""
    assert got.keys() == want.keys(), f"{got.keys()} vs {want.keys()}"
    for name, expected in want.items():
        error = (got[name].double() - expected.double()).abs().nan_to_num(torch.inf)
        bound = limit * max(1.0, float(expected.abs().max()))
        assert float(error.max()) <= bound, (
            f"{name}: |error| {float(error.max()):.3e} > {bound:.3e}, got {got[name].flatten()[error.argmax()]:.9g}, "
            f"want {expected.flatten()[error.argmax()]:.9g}"
        )


def gemm_flops(fn: Callable[[], object]) -> int:
    """Return 2 * m * k * n over all matrix products of `fn`, also in custom ops, without oneDNN's padding."""
    profile = torch.autograd.profiler.profile(record_shapes=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHIMINI_CPU_GEMM", "mkl")
        library.cache_clear()
        with profile:
            fn()
    library.cache_clear()
    total = 0
    events = profile.function_events
    assert events is not None, "the profiler ran"
    for event in events:
        shapes = [shape for shape in event.input_shapes if len(shape) == 2]
        if event.name in ("aten::mm", "aten::addmm_"):
            (m, k), (_, n) = shapes[-2:]
            total += 2 * m * k * n
    return total
