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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_s_gradient_goes_into_main_grad(each_library: str, dtype: torch.dtype) -> None:
    """It is added to what is there, in fp32, and Megatron's DDP is told so."""
    x = torch.randn(2, 40, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    dy, before = torch.randn(2, 40, 5, dtype=dtype), torch.randn(5, 8)
    main_grad = before.clone()
    dx, dummy = torch.autograd.grad(linear(x, w, main_grad=main_grad), (x, w), dy)
    want = torch.autograd.grad(linear(x, w), x, dy)[0]
    torch.testing.assert_close(dx, want)
    exact = before.double() + dy.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    torch.testing.assert_close(main_grad.double(), exact, rtol=1e-5, atol=1e-5)
    assert w.grad_added_to_main_grad  # pyright: ignore[reportAttributeAccessIssue]
    assert dummy.shape == w.shape and dummy.dtype == dtype
