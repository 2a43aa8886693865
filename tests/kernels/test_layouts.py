"""Every op takes tensors of any strides, as input and as gradient, and is compiled without a graph break on a CPU."""

from collections.abc import Callable

import interpreter  # noqa: F401  repairs Triton's interpreter
import pytest
import torch
from torch import Tensor

from phimini.kernels import (
    checksum,
    linear,
    linear_cross_entropy,
    linear_dpo,
    linear_logprob,
    linear_policy_loss,
    rms_norm,
    rms_norm_add,
    rope,
    swiglu,
)
from phimini.kernels.backend.launch import Backend

B, T, D, V = 4, 6, 16, 40
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns-first": lambda x: x.mT.contiguous().mT,
    "expanded-rows": lambda x: x[:1].expand_as(x),
    "expanded-columns": lambda x: x[..., :1].expand_as(x),
    "sliced-rows": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "sliced-columns": lambda x: torch.cat([x + 1, x], -1)[..., x.shape[-1] :],
}


def _angles() -> Tensor:
    return torch.arange(T, dtype=torch.float32)[:, None] / 7 ** torch.arange(4)


def _policy(x: Tensor, w: Tensor, targets: Tensor, backend: Backend) -> Tensor:
    old_M = torch.linspace(-5, -3, len(x))
    return linear_policy_loss(x, w, targets, old_M, old_M.flip(0), _backend=backend)[0]


def _dpo(x: Tensor, w: Tensor, targets: Tensor, backend: Backend) -> Tensor:
    sequence_M = torch.arange(len(x)) * 4 // len(x)
    return linear_dpo(x, w, targets, sequence_M, -torch.arange(4.0), _backend=backend)[0]


def ops(backend: Backend) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return each op as a function of one (B, T, D) tensor, its other inputs fixed."""
    generator = torch.Generator().manual_seed(1)
    weight_VD = torch.randn(V, D, generator=generator)
    targets_M = torch.randint(0, V, (B * T,), generator=generator)
    other = torch.randn(B, T, D, generator=generator)
    scale_D = torch.linspace(0.5, 2, D)

    def head(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: loss(x.reshape(-1, D), weight_VD, targets_M, backend)

    return {
        "rms_norm": lambda x: rms_norm(x, scale_D, _backend=backend),
        "rms_norm_add": lambda x: torch.cat(rms_norm_add(x, other, scale_D, _backend=backend)),
        "rms_norm_add-residual": lambda x: rms_norm_add(other, x, scale_D, _backend=backend)[0],
        "swiglu": lambda x: swiglu(x, _backend=backend),
        "linear": lambda x: linear(x, weight_VD),
        "linear-weight": lambda x: linear(weight_VD, x[0]),
        "rope": lambda x: torch.cat(
            rope(
                x.transpose(0, 1).view(T, 1, B, D),
                _angles().cos(),
                _angles().sin(),
                torch.arange(T),
                _backend=backend,
            ),
            1,
        ),
        "cross_entropy": head(lambda x, w, t, b: linear_cross_entropy(x, w, t, _backend=b)[0]),
        "policy_loss": head(_policy),
        "dpo": head(_dpo),
        "logprob": head(lambda x, w, t, b: torch.stack(linear_logprob(x, w, t, _backend=b))),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ops("torch"))
def test_strides_change_nothing(name: str, backend: Backend, layout: str) -> None:
    """The op on a strided tensor with a strided gradient equals the op on their contiguous copies, but for rounding."""
    fn = ops(backend)[name]
    strided = LAYOUTS[layout](torch.randn(B, T, D))
    assert not strided.is_contiguous()
    results = []
    for x, is_dense in ((strided, False), (strided.contiguous(), True)):
        leaf = x.detach().requires_grad_()
        y = fn(leaf)
        generator = torch.Generator().manual_seed(2)
        dy = torch.randn(y.shape, generator=generator)
        if y.ndim > 1:
            dy = LAYOUTS[layout](dy)
        (dx,) = torch.autograd.grad(y, leaf, dy.contiguous() if is_dense else dy)
        results.append((y.detach(), dx))
    (y, dx), (want_y, want_dx) = results
    torch.testing.assert_close((y, dx), (want_y, want_dx), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_takes_strided_rows_without_a_copy_of_the_caller(layout: str) -> None:
    """hidden (M, D) itself in each layout: the reshape above makes some of them contiguous."""
    hidden = LAYOUTS[layout](torch.randn(B * T, D))
    weight_VD, targets_M = torch.randn(V, D), torch.randint(0, V, (B * T,))
    got, want = (
        linear_cross_entropy(x.detach().requires_grad_(), weight_VD, targets_M)[0]
        for x in (hidden, hidden.contiguous())
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checksum_is_of_the_values_in_order(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(B, T, D))
    assert checksum(x) == checksum(x.contiguous())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ops("torch"))
def test_compiles_without_a_graph_break_on_a_cpu(
    name: str, backend: str, each_library: str
) -> None:
    torch._dynamo.reset()
    fn = ops("torch")[name]
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    x = torch.randn(B, T, D, requires_grad=True)
    results = []
    for f in (compiled, fn):
        y = f(x)
        results.append((y.detach(), torch.autograd.grad((y**3).sum(), x)[0]))
    (y, dx), (want_y, want_dx) = results
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, want_dx, rtol=1e-4, atol=1e-4)
