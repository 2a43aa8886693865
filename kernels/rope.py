"""Rotary position embedding of the first R of K dimensions of a head, half-split, written in place.

    (a, b) = (x[:R/2], x[R/2:R])       c, s = factor * cos[position], factor * sin[position]
    x[:R/2], x[R/2:R] = a * c - b * s, b * c + a * s
    backward: the rotation by -angle times the factor: da = dy_a * c + dy_b * s, db = dy_b * c - dy_a * s

x is the fused projection seen as heads, (..., N, K), of which the first `num_rotated_heads` are rotated: with
[q heads, k heads, v heads] in one row (Hugging Face) N = H + 2G and H + G are rotated; with one [q..., k, v]
per group (Megatron, (..., G, H/G + 2, K)) H/G + 1 of every group. The factor (LongRoPE's) touches the R
rotated dimensions alone.

One program rotates all heads of one token; nothing is reduced, so the result is deterministic.

Bound: memory. Forward moves the rotated part twice, 2*L*heads*R elements, and R/2 of each table per token;
backward moves all of x twice, because it may not write into a gradient that autograd still owns.

Letters: L tokens, N heads in a group, K head size, R rotary size, P rows of the tables; G groups here.
"""

# triton types constexpr parameters as tl.constexpr, not int
# pyright: reportArgumentType=false, reportReturnType=false
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimini.kernels.backend.launch import (
    Backend,
    compute_dtype,
    runs_triton,
)


# --- reference -----------------------------------------------------------------------------------
def rope_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    num_rotated_heads: int | None = None,
    attention_factor: float = 1.0,
) -> Tensor:
    """The definition, not in place. Computes in fp32 (fp64 for fp64 input) and casts at the end."""
    R = 2 * cos.shape[-1]
    rotated, rest = x[..., :num_rotated_heads, :], x[..., num_rotated_heads:, :]
    if num_rotated_heads is None:
        rest = x[..., :0, :]
    # (*positions, 1..., 1, R/2): the same for every group and head
    shape = (*positions.shape, *(1,) * (x.ndim - positions.ndim - 1), R // 2)
    c, s = (
        (attention_factor * table.to(compute_dtype(x.dtype))[positions]).view(shape)
        for table in (cos, sin)
    )
    a, b, tail = rotated.to(compute_dtype(x.dtype)).split([R // 2, R // 2, x.shape[-1] - R], dim=-1)
    turned = torch.cat([a * c - b * s, b * c + a * s, tail], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-2)


# --- triton --------------------------------------------------------------------------------------
@triton.jit
def _rope_kernel(
    x_ptr, out_ptr, cos_ptr, sin_ptr, positions_ptr,  # (L,G,N,K) (L,G,N,K) (P,R/2) (P,R/2) (L,)
    attention_factor, stride_cos_p, stride_sin_p,
    G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_REST: tl.constexpr,
    INVERSE: tl.constexpr, COPY_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * (G * N * K)
    out_ptr += token * (G * N * K)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    in_table = cols < HALF
    c = tl.load(cos_ptr + position * stride_cos_p + cols, mask=in_table, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + position * stride_sin_p + cols, mask=in_table, other=0.0).to(tl.float32)
    c *= attention_factor
    s *= attention_factor
    if INVERSE:
        s = -s
    # the rotated heads of all groups, numbered through
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    head_offset = (heads // ROTATED) * (N * K) + (heads % ROTATED) * K
    is_head = heads < G * ROTATED
    inside = is_head & in_table
    a = tl.load(x_ptr + head_offset + cols, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + head_offset + HALF + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + head_offset + cols, a * c - b * s, mask=inside)
    tl.store(out_ptr + head_offset + HALF + cols, b * c + a * s, mask=inside)
    if COPY_REST:
        if 2 * HALF < K:
            tail = 2 * HALF + tl.arange(0, BLOCK_TAIL)[None, :]
            inside = is_head & (tail < K)
            kept = tl.load(x_ptr + head_offset + tail, mask=inside, other=0.0)
            tl.store(out_ptr + head_offset + tail, kept, mask=inside)
        if ROTATED < N:
            rest = tl.arange(0, BLOCK_REST)[None, :]
            groups = tl.arange(0, BLOCK_G)[:, None]
            offset = groups * (N * K) + ROTATED * K + rest
            inside = (groups < G) & (rest < (N - ROTATED) * K)
            kept = tl.load(x_ptr + offset, mask=inside, other=0.0)
            tl.store(out_ptr + offset, kept, mask=inside)


# --- launch + autograd ---------------------------------------------------------------------------
def launch_config(G: int, N: int, K: int, R: int, num_rotated_heads: int) -> dict[str, int]:
    """Return block sizes and warps.

    A thread holds 8 elements of each half, one 128-bit access in bf16. With 16, the backward spills on sm_80.
    """
    block_heads = triton.next_power_of_2(G * num_rotated_heads)
    block_half = triton.next_power_of_2(R // 2)
    return {
        "G": G, "N": N, "K": K, "HALF": R // 2, "ROTATED": num_rotated_heads,
        "BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half,
        "BLOCK_TAIL": triton.next_power_of_2(max(1, K - R)),
        "BLOCK_G": triton.next_power_of_2(G),
        "BLOCK_REST": triton.next_power_of_2(max(1, (N - num_rotated_heads) * K)),
        "num_warps": min(16, max(1, block_heads * block_half // (32 * 8))),
    }  # fmt: skip


def _launch(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    num_rotated_heads: int, attention_factor: float, *, backward: bool,
) -> None:  # fmt: skip
    L, (N, K) = positions.numel(), x.shape[-2:]
    if L == 0:
        return
    config = launch_config(x.numel() // (L * N * K), N, K, 2 * cos.shape[-1], num_rotated_heads)
    _rope_kernel[(L,)](
        x, out, cos, sin, positions.contiguous(), attention_factor, cos.stride(0), sin.stride(0),
        **config, INVERSE=backward, COPY_REST=backward,
    )  # fmt: skip


@torch.library.custom_op("phimini::rope_", mutates_args={"x"})
def _rope_(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    num_rotated_heads: int, attention_factor: float,
) -> None:  # fmt: skip
    _launch(x, x, cos, sin, positions, num_rotated_heads, attention_factor, backward=False)


@torch.library.custom_op("phimini::rope_bwd", mutates_args=())
def _rope_bwd(
    dy: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    num_rotated_heads: int, attention_factor: float,
) -> Tensor:  # fmt: skip
    dy = dy.contiguous()
    dx = torch.empty_like(dy)
    _launch(dy, dx, cos, sin, positions, num_rotated_heads, attention_factor, backward=True)
    return dx


@_rope_.register_fake
def _(x, cos, sin, positions, num_rotated_heads, attention_factor) -> None:
    return None


@_rope_bwd.register_fake
def _(dy, cos, sin, positions, num_rotated_heads, attention_factor) -> Tensor:
    return dy.new_empty(dy.shape)


def _rotate_with_torch(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    num_rotated_heads: int, attention_factor: float, *, backward: bool,
) -> None:  # fmt: skip
    half = cos.shape[-1]
    x_LGNK = x.view(positions.numel(), x.shape[positions.ndim : -2].numel(), *x.shape[-2:])
    rotated_LGNK = x_LGNK[:, :, :num_rotated_heads]
    a, b = rotated_LGNK[..., :half], rotated_LGNK[..., half : 2 * half]
    c, s = (
        table.index_select(0, positions.reshape(-1))
        .to(compute_dtype(x.dtype))
        .mul_(factor)[:, None, None]
        for table, factor in (
            (cos, attention_factor),
            (sin, -attention_factor if backward else attention_factor),
        )
    )
    a_f, b_f = a.to(c.dtype), b.to(c.dtype)
    turned_a = (a_f * c).addcmul_(b_f, s, value=-1)
    b.copy_((b_f * c).addcmul_(a_f, s))
    a.copy_(turned_a)


class _Rope(torch.autograd.Function):
    """In place, so that autograd knows that x changed (a custom op that mutates has no autograd formula)."""

    @staticmethod
    def forward(
        ctx, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
        num_rotated_heads: int, attention_factor: float, triton_runs: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(cos, sin, positions)
        ctx.settings = num_rotated_heads, attention_factor
        ctx.triton_runs = triton_runs
        ctx.mark_dirty(x)
        if triton_runs:
            _rope_(x, cos, sin, positions, num_rotated_heads, attention_factor)
        else:
            _rotate_with_torch(
                x, cos, sin, positions, num_rotated_heads, attention_factor, backward=False
            )
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        if ctx.triton_runs:
            dx = _rope_bwd(dy, *ctx.saved_tensors, *ctx.settings)
        else:
            dx = dy.clone(memory_format=torch.contiguous_format)
            _rotate_with_torch(dx, *ctx.saved_tensors, *ctx.settings, backward=True)
        return dx, None, None, None, None, None, None


# --- public op -----------------------------------------------------------------------------------
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    num_rotated_heads: int | None = None,
    attention_factor: float = 1.0,
    _backend: Backend | None = None,
) -> Tensor:
    """Rotate the first `num_rotated_heads` (None: all) heads of every group of x, in place; returns x.

    x (*positions.shape, *groups, N, K), contiguous; cos, sin (P, R/2); positions, integers in [0, P), any
    shape: packed documents restart at 0. Tables that require a gradient are refused. A position out of range is not checked
    on CUDA (it would wait for the device) nor under torch.compile.

    Raises ValueError where shapes or dtypes do not fit, x is not contiguous, or, on a CPU, a position is out
    of range.
    """
    heads = x.shape[-2] if num_rotated_heads is None and x.ndim >= 2 else num_rotated_heads
    _check(x, cos, sin, positions, heads)
    return _Rope.apply(x, cos, sin, positions, heads, attention_factor, runs_triton(x, _backend))


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int | None) -> None:
    lead = positions.ndim
    if not x.is_floating_point() or x.ndim < lead + 2 or x.shape[:lead] != positions.shape:
        raise ValueError(
            f"rope: x: expected floating-point (*{tuple(positions.shape)}, *groups, N, K) as positions say, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    if not x.is_contiguous():
        raise ValueError(
            f"rope: x: expected a contiguous tensor (it is rotated in place), got strides {x.stride()}"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rope: positions: expected int32 or int64, got {positions.dtype}")
    if cos.ndim != 2 or cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= x.shape[-1]:
        raise ValueError(
            f"rope: cos, sin: expected both (positions, R/2) with R at most K = {x.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not cos.is_floating_point() or not sin.is_floating_point():
        raise ValueError(
            f"rope: cos, sin: expected floating-point, got {cos.dtype} and {sin.dtype}"
        )
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        raise ValueError("rope: cos, sin: expected rows with unit stride")
    if heads is None or not 0 < heads <= x.shape[-2]:
        raise ValueError(f"rope: num_rotated_heads: expected 1 to N = {x.shape[-2]}, got {heads}")
    for name, t in (("cos", cos), ("sin", sin), ("positions", positions)):
        if t.device != x.device:
            raise ValueError(f"rope: {name}: expected on {x.device} like x, got {t.device}")
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"rope: {name}: gets no gradient from this op; pass {name}.detach()")
    has_values = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if has_values and positions.numel() > 0:
        first, last = (int(v) for v in positions.aminmax())
        if first < 0 or last >= cos.shape[0]:
            raise ValueError(
                f"rope: positions: expected 0 to {cos.shape[0] - 1} (the tables' rows), got {first} to {last}"
            )
