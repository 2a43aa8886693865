"""Log-prob, entropy and log-sum-exp, and their gradients, against their definition."""

from typing import Any

import interpreter  # noqa: F401  repairs Triton's interpreter
import pytest
import torch
from head_cases import IGNORE, SHAPES, chunk_bytes, gemm_flops, make_head
from numerics import check_against_reference
from torch import Tensor

from phimini.kernels import linear_logprob, linear_logprob_reference
from phimini.kernels.backend.launch import Backend
from phimini.kernels.head.call import compute_compiled
from phimini.kernels.head.options import ConstantOptions
from phimini.kernels.linear_logprob import Logprob

TEMPERATURES = ["one", "number", "per-row"]
OUTPUTS = ["logp_M", "entropy_M", "lse_M"]


def temperature_of(kind: str, M: int) -> float | Tensor:
    return {"one": 1.0, "number": 0.6, "per-row": torch.rand(M) + 0.5}[kind]


@pytest.mark.parametrize("kind", TEMPERATURES)
@pytest.mark.parametrize(("M", "D", "V"), SHAPES)
def test_equals_the_definition_in_fp64(M: int, D: int, V: int, kind: str) -> None:
    hidden, weight, targets = make_head(M, D, V, torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    temperature = temperature_of(kind, M)
    budget = chunk_bytes(V, torch.float64)
    got = linear_logprob(*leaves, targets, temperature=temperature, chunk_bytes=budget)
    want = linear_logprob_reference(*leaves, targets, temperature=temperature)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-12, atol=1e-12)
    upstream = [torch.randn(M, dtype=torch.float64) for _ in OUTPUTS]
    for i, name in enumerate([*OUTPUTS, "all"]):
        chosen = range(3) if name == "all" else [i]
        grads = [
            torch.autograd.grad(
                torch.stack([(values[j] * upstream[j]).sum() for j in chosen]).sum(),
                leaves,
                retain_graph=True,
            )
            for values in (got, want)
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_is_as_precise_as_the_house_rule(name: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = make_head(37, 20, 101, dtype)
    options: dict[str, Any] = {"temperature": temperature_of("per-row", 37)}
    check_against_reference(
        lambda hidden, weight: getattr(
            linear_logprob(hidden, weight, targets, chunk_bytes=chunk_bytes(101), **options), name
        ),
        lambda hidden, weight: getattr(
            linear_logprob_reference(hidden, weight, targets, **options), name
        ),
        {"hidden": hidden, "weight": weight},
        torch.randn(37),
    )


def test_extreme_logits_stay_exact() -> None:
    hidden, weight, targets = make_head(12, 8, 40)
    hidden *= 4e3
    got = linear_logprob(hidden, weight, targets)
    want = linear_logprob_reference(hidden.double(), weight.double(), targets)
    assert want.lse_M.abs().max() > 1e4
    for name, value, expected in zip(OUTPUTS, got, want, strict=True):
        limit = 1e-5 * max(1.0, float(expected.abs().max()))
        assert float((value - expected).abs().max()) <= limit, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rounding", [0.0, 1e-7, 1e-20, 1e-35])
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_gradient_of_the_raw_target_logit(backend: Backend, rounding: float, size: float) -> None:
    """logp + lse is the target's logit: the softmax cancels, exactly or but for a rounding error."""
    hidden, weight, targets = make_head(20, 8, 33, ignored=False)
    hidden = (hidden * size).requires_grad_()
    weight.requires_grad_()
    out = linear_logprob(hidden, weight, targets, temperature=0.5, _backend=backend)
    upstream_M = torch.randn(20)
    loss = (out.logp_M * upstream_M + out.lse_M * (upstream_M + rounding)).sum()
    dx, dw = torch.autograd.grad(loss, (hidden, weight))
    want_dx = 2 * upstream_M[:, None] * weight[targets]
    want_dw = torch.zeros_like(weight).index_add(0, targets, 2 * upstream_M[:, None] * hidden)
    for got, want in ((dx, want_dx), (dw, want_dw)):
        assert float((got - want).abs().max()) <= 2e-6 * float(want.abs().max())


def test_ignored_rows_are_zero_and_not_computed() -> None:
    hidden, weight, targets = make_head(20, 8, 30)
    hidden[targets == IGNORE] = float("inf")
    out = linear_logprob(hidden, weight, targets)
    assert all(bool((value[targets == IGNORE] == 0).all()) for value in out)
    assert all(bool(value.isfinite().all()) for value in out)
    kept = int((targets != IGNORE).sum())
    assert gemm_flops(lambda: linear_logprob(hidden, weight, targets)) == 2 * kept * 8 * 30


def test_costs_four_gemms_with_gradients_and_fewer_where_frozen() -> None:
    hidden, weight, targets = make_head(10, 8, 30, ignored=False)

    def step(needs_dx: bool, needs_dw: bool) -> None:
        leaves = hidden.detach().requires_grad_(needs_dx), weight.detach().requires_grad_(needs_dw)
        linear_logprob(*leaves, targets).logp_M.sum().backward()

    for flags, num_gemms in (((True, True), 4), ((True, False), 3), ((False, True), 3)):
        flops = gemm_flops(lambda flags=flags: step(*flags))
        assert flops == num_gemms * 2 * 10 * 8 * 30, flags


def test_entropy_can_be_left_out() -> None:
    hidden, weight, targets = make_head(10, 8, 30)
    full, bare = (linear_logprob(hidden, weight, targets, with_entropy=e) for e in (True, False))
    assert bool((bare.entropy_M == 0).all()) and bool((full.entropy_M != 0).any())
    torch.testing.assert_close(bare.logp_M, full.logp_M)


def test_an_entropy_left_out_has_no_gradient() -> None:
    hidden, weight, targets = make_head(10, 8, 30)
    bare = linear_logprob(hidden.requires_grad_(), weight, targets, with_entropy=False)
    logp_only, both = (
        torch.autograd.grad(value_M.sum(), hidden, retain_graph=True)[0]
        for value_M in (bare.logp_M, bare.logp_M + bare.entropy_M)
    )
    assert torch.equal(both, logp_only)


@pytest.mark.usefixtures("each_library")
def test_autocast_changes_nothing() -> None:
    hidden, weight, targets = make_head(33, 8, 20)
    hidden.requires_grad_()

    def run() -> list[torch.Tensor]:
        out = linear_logprob(hidden, weight, targets)
        return [*out, *torch.autograd.grad(torch.stack(list(out)).sum(), hidden)]

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_second_derivative_is_refused() -> None:
    hidden, weight, targets = make_head(4, 8, 20)
    logp_M = linear_logprob(hidden.requires_grad_(), weight, targets).logp_M
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logp_M.sum(), hidden, create_graph=True)


def test_opcheck() -> None:
    hidden, weight, targets = make_head(9, 8, 20)
    options = ConstantOptions.of(Logprob())
    for temperature_M in (None, torch.rand(9) + 0.5):
        args = (options, hidden, weight, targets, temperature_M, 1.0)
        torch.library.opcheck(compute_compiled, (*args, [], False, False))
        upstream = [torch.rand(9), torch.rand(9), None]
        torch.library.opcheck(compute_compiled, (*args, upstream, True, True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_MD": torch.zeros(6, 8, 1)}, r"\(M, D\) and \(V, D\), got \(6, 8, 1\)"),
        ({"hidden_MD": torch.zeros(6, 8).half()}, "one floating dtype, got torch.float16"),
        (
            {"targets_M": torch.full((6,), 20)},
            r"targets_M\[0\] is 20, expected a class in \[0, 20\)",
        ),
        ({"temperature": torch.ones(6, requires_grad=True)}, "temperature gets no gradient"),
        ({"temperature": -1.0}, "temperature must be a finite number above 0.*got -1.0"),
    ],
    ids=["shape", "dtype", "target", "temperature-gradient", "temperature"],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    hidden, weight, targets = make_head(6, 8, 20, ignored=False)
    arguments: dict[str, Any] = {"hidden_MD": hidden, "weight_VD": weight, "targets_M": targets}
    with pytest.raises(ValueError, match=f"linear_logprob: .*{message}"):
        linear_logprob(**arguments | changes)
