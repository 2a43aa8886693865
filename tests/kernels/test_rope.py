from typing import Any

import pytest
import torch
from interpreter import observe
from numerics import DEVICE, check_against_reference
from torch import Tensor

from phimini.kernels.backend.launch import Backend
from phimini.kernels.rope import rope, rope_reference
from phimini.model.config import preset
from phimini.model.rope import apply_rope, rope_table

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS: list[Backend] = ["triton", "torch"]
PACKED = [0, 1, 2, 0, 1, 5, 4, 3, 2, 1, 0, 6]  # documents restart; order is free


def tables(num_positions: int, R: int, factor: float = 1.19) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(num_positions), 10000.0 ** (-torch.arange(0, R, 2) / R))
    return (angle.cos() * factor).to(DEVICE), (angle.sin() * factor).to(DEVICE)


def case(
    shape: tuple[int, ...], R: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = torch.tensor(PACKED, device=DEVICE)[: shape[0]]
    return torch.randn(shape, device=DEVICE, dtype=dtype), *tables(8, R), positions


def joined(qkv: Tensor, *args: Any, backend: Backend | None = None) -> Tensor:
    """Return the results side by side, so that one gradient reaches all three."""
    function = rope_reference if backend is None else rope
    return torch.cat(function(qkv, *args, **({} if backend is None else {"_backend": backend})), 1)


# (L, G, N, K), R
CASES = {
    "one token": ((1, 1, 3, 8), 6),
    "groups, partial": ((12, 2, 4, 32), 24),
    "whole heads, a group": ((12, 1, 7, 16), 16),
    "no power of two": ((5, 3, 5, 20), 12),
    "Phi-4-Mini": ((3, 8, 5, 128), 96),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rope(name: str, dtype: torch.dtype, backend: Backend) -> None:
    shape, R = CASES[name]
    qkv, *rest = case(shape, R, dtype)
    check_against_reference(
        lambda x: joined(x, *rest, backend=backend),
        lambda x: joined(x, *rest),
        {"x": qkv},
        torch.randn(shape[0], shape[1] * shape[2], shape[3], device=DEVICE, dtype=dtype),
    )


def test_the_reference_is_hugging_faces() -> None:
    modeling = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    qkv, cos, sin, positions = case((12, 2, 4, 32), 24, torch.float32)
    q, k, v = rope_reference(qkv, cos, sin, positions)
    c, s = (torch.cat([t[positions], t[positions]], -1)[None] for t in (cos, sin))
    before = qkv[:, :, :2].flatten(1, 2), qkv[:, :, 2]
    expected = modeling.apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in before), c, s)
    for got, want in zip((q, k), expected, strict=True):
        torch.testing.assert_close(got, want[0].transpose(0, 1))
    assert torch.equal(v, qkv[:, :, 3])


def test_it_is_the_model_s_rotation() -> None:
    """The tables of the model, with LongRoPE's attention factor, at positions that restart."""
    config = preset("phi-4-mini")
    cos, sin = rope_table(config, 8)
    qkv, positions = torch.randn(12, 8, 5, 128), torch.tensor(PACKED)
    q, k, _ = rope(qkv, cos, sin, positions)
    c, s = (t[positions][:, None] for t in (cos, sin))
    torch.testing.assert_close(q, apply_rope(qkv[:, :, :3].flatten(1, 2), c, s))
    torch.testing.assert_close(k, apply_rope(qkv[:, :, 3], c, s))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_projection_is_not_written_and_not_kept(backend: Backend) -> None:
    qkv, *rest = case((12, 2, 4, 32), 24, torch.float32)
    before = qkv.clone()
    results = rope(qkv.requires_grad_(), *rest, _backend=backend)
    assert torch.equal(qkv, before)
    storages = {x.untyped_storage().data_ptr() for x in results}
    assert len(storages) == 3 and qkv.untyped_storage().data_ptr() not in storages
    assert all(x.is_contiguous() for x in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_positions_may_have_any_strides(backend: Backend) -> None:
    qkv, cos, sin, positions = case((12, 2, 4, 32), 24, torch.float32)
    positions = positions.repeat_interleave(2)[::2]
    dys = [torch.randn(12, heads, 64, device=DEVICE)[..., ::2] for heads in (4, 2, 2)]
    results = []
    for some in (dys, [dy.contiguous() for dy in dys]):
        leaf = qkv.clone().requires_grad_()
        outs = rope(leaf, cos, sin, positions, _backend=backend)
        results.append(torch.autograd.grad(outs, leaf, some)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_value_stays_in_its_head(backend: Backend) -> None:
    qkv, *rest = case((2, 2, 4, 32), 24, torch.float32)
    qkv[0, 0, 3] = torch.inf
    q, k, v = rope(qkv, *rest, _backend=backend)
    assert q.isfinite().all() and k.isfinite().all()
    assert v[0, 0].eq(torch.inf).all() and v[1:].isfinite().all() and v[0, 1].isfinite().all()


@pytest.mark.parametrize("broken", ["table", "attention factor", "documents", "off by one", "sin"])
def test_mistakes_are_noticed(broken: str) -> None:
    qkv, cos, sin, positions = case((12, 2, 4, 16), 12, torch.float32)
    wrong = [cos, sin, positions]
    if broken == "table":
        wrong[:2] = [t[1:] for t in tables(9, 12)]
    elif broken == "attention factor":
        wrong[:2] = tables(8, 12, 1.0)
    elif broken == "documents":
        wrong[2] = torch.arange(12, device=DEVICE) % 8
    elif broken == "off by one":
        wrong[2] = torch.where(positions == 0, 1, positions)
    else:
        wrong[1] = -sin
    for backend in BACKENDS:
        with pytest.raises(AssertionError, match="limit"):
            check_against_reference(
                lambda x, backend=backend: joined(x, *wrong, backend=backend),  # pyright: ignore[reportArgumentType]
                lambda x: joined(x, cos, sin, positions),
                {"x": qkv},
                torch.randn(12, 8, 16, device=DEVICE),
            )


def test_the_order_of_the_programs_does_not_matter() -> None:
    qkv, *rest = case((12, 2, 4, 16), 12, torch.float32)
    ys = []
    for seed in (None, 1):
        with observe(shuffle_seed=seed):
            ys.append(joined(qkv, *rest, backend="triton"))
    assert torch.equal(*ys)


def test_no_tokens() -> None:
    positions = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for backend in BACKENDS:
        qkv = torch.randn(0, 2, 5, 16, device=DEVICE)
        q, k, v = rope(qkv, *tables(8, 12), positions, _backend=backend)
        assert (q.shape, k.shape, v.shape) == ((0, 6, 16), (0, 2, 16), (0, 2, 16))


def test_a_bad_argument_is_named() -> None:
    qkv, cos, sin, positions = case((12, 2, 4, 16), 12, torch.float32)
    bad: dict[str, Any] = {
        "rope: qkv_LGNK: expected floating-point": (qkv[:, 0], cos, sin, positions),
        "rope: qkv_LGNK: .* at least q, k and v": (qkv[:, :, :2], cos, sin, positions),
        "rope: positions_L: expected int32 or int64": (qkv, cos, sin, positions.float()),
        r"rope: positions_L: .* of shape \(12,\)": (qkv, cos, sin, positions[:11]),
        "rope: positions_L: expected 0 to 7 .* got 2 to 8": (qkv, cos, sin, positions + 2),
        "rope: positions_L: .* got -1 to 5": (qkv, cos, sin, positions - 1),
        "rope: cos, sin: expected both": (qkv, cos, sin[:, :5], positions),
        "rope: cos, sin: expected both .* at most K = 16": (qkv, *tables(8, 18), positions),
        "rope: cos, sin: expected rows": (qkv, cos.T.contiguous().T, sin, positions),
        "rope: sin: expected on": (qkv, cos, sin.to("meta"), positions),
        "rope: cos: gets no gradient": (qkv, cos.clone().requires_grad_(), sin, positions),
    }
    for message, args in bad.items():
        if DEVICE == "cuda" and "got" in message and "positions_L" in message:
            continue  # the host does not know the positions
        with pytest.raises(ValueError, match=message):
            rope(*args)


def test_the_ops_are_registered_correctly() -> None:
    qkv, *rest = case((12, 2, 4, 16), 12, torch.float32)
    torch.library.opcheck(torch.ops.phimini.rope_fwd, (qkv.requires_grad_(), *rest))
    dq, dk, dv = (torch.randn(12, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    torch.library.opcheck(torch.ops.phimini.rope_bwd, (dq, dk, dv, *rest))
