from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import observe
from numerics import DEVICE, check_against_reference
from torch import Tensor

from phimini.kernels.backend.launch import Backend
from phimini.kernels.rope import rope, rope_reference

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS: list[Backend] = ["triton", "torch"]
PACKED = [0, 1, 2, 0, 1, 5, 4, 3, 2, 1, 0, 6]  # documents restart; order is free


def tables(num_positions: int, R: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(num_positions), 10000.0 ** (-torch.arange(0, R, 2) / R))
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def case(
    positions_shape: tuple[int, ...], rest: tuple[int, ...], R: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = torch.tensor(PACKED, device=DEVICE)[: int(torch.tensor(positions_shape).prod())]
    x = torch.randn(*positions_shape, *rest, device=DEVICE, dtype=dtype)
    return x, *tables(8, R), positions.view(positions_shape)


def in_place(backend: Backend, *args, **kwargs) -> Callable[[Tensor], Tensor]:
    return lambda x: rope(x * 1, *args, **kwargs, _backend=backend)


# (positions, groups + (N, K), R, rotated heads)
CASES = {
    "one token": ((1,), (3, 8), 6, 2),
    "fused qkv, partial": ((2, 6), (8, 32), 24, 6),
    "Megatron's groups": ((6, 2), (2, 4, 32), 24, 3),
    "whole heads, all": ((12,), (5, 16), 16, None),
    "Phi-4-Mini": ((3,), (40, 128), 96, 32),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rope(name: str, dtype: torch.dtype, backend: Backend) -> None:
    positions_shape, rest, R, heads = CASES[name]
    x, cos, sin, positions = case(positions_shape, rest, R, dtype)
    settings: dict[str, Any] = dict(num_rotated_heads=heads, attention_factor=1.19)
    check_against_reference(
        in_place(backend, cos, sin, positions, **settings),
        lambda x: rope_reference(x, cos, sin, positions, **settings),
        {"x": x},
        torch.randn_like(x),
    )


def test_the_reference_is_hugging_faces() -> None:
    modeling = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    x, cos, sin, positions = case((2, 6), (4, 32), 24, torch.float32)
    c, s = (torch.cat([t[positions], t[positions]], -1) for t in (cos, sin))
    q, k = (t.transpose(1, 2) for t in x.split([3, 1], dim=2))
    expected = torch.cat(modeling.apply_rotary_pos_emb(q, k, c, s), dim=1).transpose(1, 2)
    torch.testing.assert_close(rope_reference(x, cos, sin, positions), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_may_have_any_strides(backend: Backend) -> None:
    x, cos, sin, positions = case((2, 6), (5, 16), 12, torch.float32)
    positions = positions.view(6, 2).T  # the same memory, another order
    check_against_reference(
        in_place(backend, cos, sin, positions),
        lambda x: rope_reference(x, cos, sin, positions),
        {"x": x},
        torch.randn_like(x),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_rotated_part_changes_and_it_changes_in_place(backend: Backend) -> None:
    x, cos, sin, positions = case((2, 6), (8, 32), 24, torch.float32)
    before = x.clone()
    y = rope(x, cos, sin, positions, num_rotated_heads=6, attention_factor=2.0, _backend=backend)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(x[..., 6:, :], before[..., 6:, :])
    assert torch.equal(x[..., 24:], before[..., 24:])
    norms = lambda t: t[..., :6, :24].norm(dim=-1)
    torch.testing.assert_close(norms(x), 2 * norms(before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_autograd_still_owns_is_not_overwritten(backend: Backend) -> None:
    x, cos, sin, positions = case((12,), (5, 16), 12, torch.float32)
    x.requires_grad_()
    y = rope(x * 1, cos, sin, positions, _backend=backend)
    dy = torch.randn_like(y)
    kept = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, kept)


@pytest.mark.parametrize("broken", ["table", "attention factor", "documents", "heads", "sin"])
def test_mistakes_are_noticed(broken: str) -> None:
    x, cos, sin, positions = case((12,), (5, 16), 12, torch.float32)
    wrong: dict[str, Any] = dict(num_rotated_heads=4, attention_factor=1.19)
    right = dict(wrong)
    wrong_cos, wrong_sin, wrong_positions = cos, sin, positions
    if broken == "table":
        wrong_cos, wrong_sin = tables(9, 12)[0][1:], tables(9, 12)[1][1:]
    elif broken == "attention factor":
        wrong["attention_factor"] = 1.0
    elif broken == "documents":
        wrong_positions = torch.arange(12, device=DEVICE) % 8
    elif broken == "heads":
        wrong["num_rotated_heads"] = 5
    else:
        wrong_sin = -sin
    for backend in BACKENDS:
        with pytest.raises(AssertionError, match="limit"):
            check_against_reference(
                in_place(backend, wrong_cos, wrong_sin, wrong_positions, **wrong),
                lambda x: rope_reference(x, cos, sin, positions, **right),
                {"x": x},
                torch.randn_like(x),
            )


def test_the_order_of_the_programs_does_not_matter() -> None:
    x, cos, sin, positions = case((12,), (5, 16), 12, torch.float32)
    ys = []
    for seed in (None, 1):
        with observe(shuffle_seed=seed):
            ys.append(rope(x.clone(), cos, sin, positions, _backend="triton"))
    assert torch.equal(*ys)


def test_no_tokens() -> None:
    cos, sin = tables(8, 12)
    positions = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for backend in BACKENDS:
        x = torch.randn(0, 5, 16, device=DEVICE)
        assert rope(x, cos, sin, positions, _backend=backend).shape == (0, 5, 16)


def test_a_bad_argument_is_named() -> None:
    x, cos, sin, positions = case((12,), (5, 16), 12, torch.float32)
    bad = {
        r"rope: x: expected floating-point \(\*\(12,\)": (x[:11], cos, sin, positions),
        "rope: x: expected a contiguous": (x[..., :14], cos, sin, positions),
        "rope: positions: expected int32 or int64": (x, cos, sin, positions.float()),
        "rope: positions: expected 0 to 7 .* got 2 to 8": (x, cos, sin, positions + 2),
        "rope: positions: .* got -1 to 5": (x, cos, sin, positions - 1),
        "rope: cos, sin: expected both": (x, cos, sin[:, :5], positions),
        "rope: cos, sin: expected both .* at most K = 16": (x, *tables(8, 18), positions),
        "rope: cos, sin: expected rows": (x, cos.T.contiguous().T, sin, positions),
        "rope: sin: expected on": (x, cos, sin.to("meta"), positions),
        "rope: cos: gets no gradient": (x, cos.clone().requires_grad_(), sin, positions),
    }
    for message, args in bad.items():
        with pytest.raises(ValueError, match=message):
            rope(*args)
    with pytest.raises(ValueError, match="rope: num_rotated_heads: expected 1 to N = 5, got 6"):
        rope(x, cos, sin, positions, num_rotated_heads=6)


def test_the_ops_are_registered_correctly() -> None:
    x, cos, sin, positions = case((12,), (5, 16), 12, torch.float32)
    torch.library.opcheck(torch.ops.phimini.rope_, (x, cos, sin, positions, 4, 1.1))
    torch.library.opcheck(torch.ops.phimini.rope_bwd, (x, cos, sin, positions, 4, 1.1))
