import pytest
import torch
from interpreter import observe
from numerics import DEVICE, check_against_reference

from phimini.kernels.backend.launch import Backend
from phimini.kernels.swiglu import swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS: list[Backend] = ["triton", "torch"]
SHAPES = [(1, 2), (7, 246), (2, 3, 128), (3, 4200)]  # one row; odd; 3-D; several blocks per row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> None:
    gate_up = 3 * torch.randn(shape, device=DEVICE, dtype=dtype)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=DEVICE, dtype=dtype)
    op = lambda gate_up: swiglu(gate_up, _backend=backend)
    check_against_reference(op, swiglu_reference, {"gate_up": gate_up}, dy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gates(backend: Backend) -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE)
    gate_up = torch.cat([gate, torch.ones(5, device=DEVICE)])[None].requires_grad_()
    y = swiglu(gate_up, _backend=backend)
    y.sum().backward()
    torch.testing.assert_close(y[0], torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4], device=DEVICE))
    assert gate_up.grad is not None
    expected = torch.tensor([0, 0, 0.5, 1, 1, 0, 0, 0, 100, 1e4], device=DEVICE)
    torch.testing.assert_close(gate_up.grad[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_input_and_gradient(backend: Backend) -> None:
    wide = torch.randn(5, 64, device=DEVICE)
    gate_up = wide[:, :32].requires_grad_()
    y = swiglu(gate_up, _backend=backend)
    torch.testing.assert_close(y, swiglu_reference(gate_up))
    dy = torch.randn(16, 5, device=DEVICE).T
    got = torch.autograd.grad(y, gate_up, dy)[0]
    want = torch.autograd.grad(swiglu_reference(gate_up), gate_up, dy)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: Backend) -> None:
    gate_up = torch.randn(0, 16, device=DEVICE, requires_grad=True)
    swiglu(gate_up, _backend=backend).sum().backward()
    assert gate_up.grad is not None and gate_up.grad.shape == (0, 16)


def test_swapped_halves_are_noticed() -> None:
    gate_up, dy = torch.randn(4, 32, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    swapped = lambda gate_up: swiglu(gate_up.roll(16, dims=-1), _backend="triton")
    with pytest.raises(AssertionError, match="limit"):
        check_against_reference(swapped, swiglu_reference, {"gate_up": gate_up}, dy)


def test_the_order_of_the_programs_does_not_matter() -> None:
    gate_up = torch.randn(6, 3000, device=DEVICE)
    ys = []
    for seed in (None, 1):
        with observe(shuffle_seed=seed):
            ys.append(swiglu(gate_up, _backend="triton"))
    assert torch.equal(*ys)


def test_a_bad_argument_is_named() -> None:
    with pytest.raises(ValueError, match="swiglu: gate_up: expected an even last dim.*got 7"):
        swiglu(torch.randn(2, 7, device=DEVICE))
    with pytest.raises(ValueError, match="swiglu: gate_up: expected floating-point"):
        swiglu(torch.ones(2, 8, dtype=torch.int64, device=DEVICE))


def test_the_ops_are_registered_correctly() -> None:
    gate_up = torch.randn(4, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.phimini.swiglu_fwd, (gate_up,))
    dy = torch.randn(4, 8, device=DEVICE)
    torch.library.opcheck(torch.ops.phimini.swiglu_bwd, (dy, gate_up.detach()))
