import pytest
import torch
from interpreter import observe
from numerics import DEVICE, check_against_reference
from torch import Tensor

from phimini.kernels.backend.launch import Backend
from phimini.kernels.rms_norm import (
    rms_norm,
    rms_norm_add,
    rms_norm_add_reference,
    rms_norm_reference,
)

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS: list[Backend] = ["triton", "torch"]
# one row; odd; 3-D; more tiles than programs; rows that share a tile; a row of Phi-4-Mini
SHAPES = [(1, 8), (33, 123), (2, 7, 128), (40, 700), (5, 3), (3, 3072)]


def both_outputs(y: Tensor, h: Tensor) -> Tensor:
    return torch.cat([y, h], dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> None:
    inputs = {
        "x": torch.randn(shape, device=DEVICE, dtype=dtype),
        "weight": torch.randn(shape[-1], device=DEVICE, dtype=dtype),
    }
    dy = torch.randn(shape, device=DEVICE, dtype=dtype)
    op = lambda x, weight: rms_norm(x, weight, _backend=backend)
    check_against_reference(op, rms_norm_reference, inputs, dy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (33, 123), (2, 7, 128)], ids=str)
def test_rms_norm_add(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> None:
    inputs = {
        "x": torch.randn(shape, device=DEVICE, dtype=dtype),
        "residual": torch.randn(shape, device=DEVICE, dtype=dtype),
        "weight": torch.randn(shape[-1], device=DEVICE, dtype=dtype),
    }
    dy = torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE, dtype=dtype)
    check_against_reference(
        lambda x, residual, weight: both_outputs(
            *rms_norm_add(x, residual, weight, _backend=backend)
        ),
        lambda x, residual, weight: both_outputs(*rms_norm_add_reference(x, residual, weight)),
        inputs,
        dy,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_fused_add_is_the_add_and_then_the_norm(backend: Backend) -> None:
    x, residual = torch.randn(2, 33, 123, device=DEVICE).bfloat16()
    weight = torch.randn(123, device=DEVICE).bfloat16()
    y, h = rms_norm_add(x, residual, weight, _backend=backend)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, weight, _backend=backend))  # of the rounded sum


@pytest.mark.parametrize("used", [0, 1], ids=["only y is used", "only h is used"])
def test_rms_norm_add_with_one_output_unused(used: int) -> None:
    inputs = {name: torch.randn(6, 16, device=DEVICE) for name in ("x", "residual")}
    inputs["weight"] = torch.randn(16, device=DEVICE)
    check_against_reference(
        lambda **i: rms_norm_add(**i, _backend="triton")[used] + 0 * i["weight"],
        lambda **i: rms_norm_add_reference(**i)[used] + 0 * i["weight"],
        inputs,
        torch.randn(6, 16, device=DEVICE),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_input_needs_eps(backend: Backend) -> None:
    inputs = {
        "x": 1e-3 * torch.randn(4, 64, device=DEVICE),
        "weight": torch.ones(64, device=DEVICE),
    }
    dy = torch.randn(4, 64, device=DEVICE)
    op = lambda x, weight: rms_norm(x, weight, eps=1e-3, _backend=backend)
    check_against_reference(op, lambda **i: rms_norm_reference(**i, eps=1e-3), inputs, dy)
    with pytest.raises(AssertionError, match="limit"):
        check_against_reference(op, lambda **i: rms_norm_reference(**i, eps=0.0), inputs, dy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_input_is_read_in_place_of_a_copy(backend: Backend) -> None:
    wide = torch.randn(5, 64, device=DEVICE)
    weight = torch.randn(32, device=DEVICE)
    y = rms_norm(wide[:, :32], weight, _backend=backend)
    torch.testing.assert_close(y, rms_norm_reference(wide[:, :32], weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_weight_is_read_by_its_strides(backend: Backend) -> None:
    check_against_reference(
        lambda x, wide: rms_norm(x, wide[::2], _backend=backend),
        lambda x, wide: rms_norm_reference(x, wide[::2]),
        {"x": torch.randn(5, 32, device=DEVICE), "wide": torch.randn(64, device=DEVICE)},
        torch.randn(5, 32, device=DEVICE),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: Backend) -> None:
    x = torch.randn(0, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(16, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, _backend=backend).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() == 0


def test_the_order_of_the_programs_does_not_matter() -> None:
    x = torch.randn(70, 96, device=DEVICE, requires_grad=True)
    weight = torch.randn(96, device=DEVICE, requires_grad=True)
    grads = []
    for seed in (None, 1):
        with observe(shuffle_seed=seed):
            y = rms_norm(x, weight, _backend="triton")
            grads.append(torch.autograd.grad(y.sin().sum(), (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_bad_argument_is_named() -> None:
    x = torch.randn(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"rms_norm: weight: expected shape \(8,\).*got \(7,\)"):
        rms_norm(x, torch.randn(7, device=DEVICE))
    with pytest.raises(ValueError, match="rms_norm: eps: expected 0 or more, got -1"):
        rms_norm(x, torch.randn(8, device=DEVICE), eps=-1)
    with pytest.raises(
        ValueError, match="rms_norm: weight: .*floating-point, got .8,. torch.int64"
    ):
        rms_norm(x, torch.ones(8, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="rms_norm: x: expected floating-point"):
        rms_norm(x.int(), torch.randn(8, device=DEVICE))
    with pytest.raises(ValueError, match="rms_norm: x: expected a last dim of 1 to 16384"):
        rms_norm(torch.randn(1, 16385, device=DEVICE), torch.randn(16385, device=DEVICE))
    with pytest.raises(
        ValueError, match="rms_norm_add: residual: expected .2, 8, torch.float32, .* got .1, 8,"
    ):
        rms_norm_add(x, x[:1], torch.randn(8, device=DEVICE))
    with pytest.raises(ValueError, match="rms_norm_add: residual: .* got .2, 8, torch.bfloat16"):
        rms_norm_add(x, x.bfloat16(), torch.randn(8, device=DEVICE))
    with pytest.raises(ValueError, match="rms_norm: weight: expected on"):
        rms_norm(x, torch.randn(8, device="meta"))


def test_the_ops_are_registered_correctly() -> None:
    x, residual = torch.randn(2, 4, 8, device=DEVICE, requires_grad=True).unbind()
    weight = torch.randn(8, device=DEVICE, requires_grad=True)
    ops = torch.ops.phimini
    torch.library.opcheck(ops.rms_norm_fwd, (x, weight, 1e-6))
    torch.library.opcheck(ops.rms_norm_add_fwd, (x, residual, weight, 1e-6))
    rstd, dy = torch.rand(4, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    torch.library.opcheck(ops.rms_norm_bwd, (dy, dy, x.detach(), weight.detach(), rstd))
