"""The linear layer against its definition, on both CPU libraries."""

import pytest
import torch
from numerics import DEVICE, check_against_reference

from phimini.kernels import linear, linear_reference
from phimini.kernels.backend import cpu_gemm


@pytest.mark.parametrize(
    "shape",
    [(1, 8, 4), (3, 7, 5), (65, 33, 1), (64, 128, 512), (2, 5, 9, 3), (512, 16, 24), (300, 16, 24)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients(each_library: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *rows, K, N = shape
    inputs = {
        "x": torch.randn(*rows, K, device=DEVICE, dtype=dtype),
        "w_NK": torch.randn(N, K, device=DEVICE, dtype=dtype),
    }
    dy = torch.randn(*rows, N, device=DEVICE, dtype=dtype)
    check_against_reference(linear, linear_reference, inputs, dy)


@pytest.mark.parametrize("each_library", ["onednn"], indirect=True)
def test_few_shapes_reach_onednn(each_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes code for each: a training run of many lengths grew by a gigabyte."""
    shapes: set[tuple[torch.Size, torch.Size]] = set()
    product = cpu_gemm._product

    def counted(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        shapes.add((a.shape, w.shape))
        return product(a, w)

    monkeypatch.setattr(cpu_gemm, "_product", counted)
    w = torch.randn(24, 16, requires_grad=True)
    for rows in range(4, 1000, 7):
        linear(torch.randn(rows, 16, requires_grad=True), w).sum().backward()
    assert len(shapes) <= 3 * (4 + 6 + 2)


def test_only_what_is_needed_gets_a_gradient(each_library: str) -> None:
    x, w = torch.randn(8, 6), torch.randn(5, 6, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is None and w.grad is not None
    with torch.no_grad():
        assert not linear(x, w).requires_grad


def test_no_rows_and_one_row(each_library: str) -> None:
    w = torch.randn(5, 6)
    assert linear(torch.randn(0, 6), w).shape == (0, 5)
    x = torch.randn(6)
    torch.testing.assert_close(linear(x, w), w @ x)


def test_shapes_under_a_fake_mode(each_library: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.zeros(4, 8, 16), torch.zeros(32, 16, requires_grad=True)
        y = linear(x, w)
        assert y.shape == (4, 8, 32)
        y.sum().backward()
        assert w.grad is not None and w.grad.shape == (32, 16)
