"""Rotary position embedding on the fused projection, half-split, of the first R of K dimensions; also splits q, k, v.

    (a, b) = (x[:R/2], x[R/2:R])       c, s = cos[position], sin[position], with the attention factor in them
    y[:R/2], y[R/2:R] = a * c - b * s, b * c + a * s
    backward: the rotation by -angle: da = dy_a * c + dy_b * s, db = dy_b * c - dy_a * s

The projection has one [q..., k, v] per group of heads (Megatron), (L, G, H/G + 2, K). Attention kernels take q, k and v
with one distance between heads, so q must be copied in any case; the rotation rides on that copy. Backward writes dq, dk
and dv, rotated back, into one gradient of the projection. So nothing of the projection is kept for backward, and autograd
concatenates nothing.

One program moves all heads of one token; nothing is reduced, so the result is deterministic.

Bound: memory. Both directions read and write every element once, 2*L*(H + 2G)*K elements, and R/2 of each table per token.

Letters: L tokens, H query heads, G groups (key/value heads), N = H/G + 2, K head size, R rotary size, P rows of the tables.
"""

# triton types constexpr parameters as tl.constexpr, not int
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimini.kernels.backend.launch import Backend, compute_dtype, host_knows, runs_triton


# --- reference -----------------------------------------------------------------------------------
def rope_reference(
    qkv_LGNK: Tensor, cos: Tensor, sin: Tensor, positions_L: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of (q, k, v). Computes in fp32 (fp64 for fp64 input) and casts at the end."""
    half = cos.shape[-1]
    c, s = (
        table.to(compute_dtype(qkv_LGNK.dtype))[positions_L][:, None, None] for table in (cos, sin)
    )
    a, b, rest = (
        qkv_LGNK[:, :, :-1].to(c.dtype).split([half, half, qkv_LGNK.shape[-1] - 2 * half], -1)
    )
    turned = torch.cat([a * c - b * s, b * c + a * s, rest], -1).to(qkv_LGNK.dtype)
    return turned[:, :, :-1].flatten(1, 2), turned[:, :, -1], qkv_LGNK[:, :, -1]


# --- triton --------------------------------------------------------------------------------------
@triton.jit
def _move_heads(
    together, apart, is_head, c, s,  # (HEADS, 1) pointers x 2, (HEADS, 1), (1, BLOCK_HALF) x 2
    K: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ROTATE: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    source, target = together, apart
    if JOIN:
        source, target = apart, together
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    inside = is_head & (cols < HALF)
    a = tl.load(source + cols, mask=inside, other=0.0)
    b = tl.load(source + HALF + cols, mask=inside, other=0.0)
    if ROTATE:
        a_f, b_f = a.to(tl.float32), b.to(tl.float32)
        a, b = a_f * c - b_f * s, b_f * c + a_f * s
    tl.store(target + cols, a, mask=inside)
    tl.store(target + HALF + cols, b, mask=inside)
    if 2 * HALF < K:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        inside = is_head & (rest < K)
        tl.store(target + rest, tl.load(source + rest, mask=inside, other=0.0), mask=inside)


@triton.jit
def _rope_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, positions_ptr,  # (L,G,N,K) (L,H,K) (L,G,K) x 2, (P,R/2) x 2, (L,)
    stride_q_l, stride_k_l, stride_v_l, stride_cos_p, stride_sin_p,
    G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    JOIN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = cols < HALF
    c = tl.load(cos_ptr + position * stride_cos_p + cols, mask=in_half, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + position * stride_sin_p + cols, mask=in_half, other=0.0).to(tl.float32)
    s = -s if JOIN else s
    qkv_ptr += token * (G * N * K)
    heads = tl.arange(0, BLOCK_H)[:, None]
    together = qkv_ptr + (heads // (N - 2)) * (N * K) + (heads % (N - 2)) * K
    apart = q_ptr + token * stride_q_l + heads * K
    _move_heads(together, apart, heads < G * (N - 2), c, s, K, HALF, BLOCK_HALF, BLOCK_REST, True, JOIN)  # fmt: skip
    groups = tl.arange(0, BLOCK_G)[:, None]
    together = qkv_ptr + groups * (N * K) + (N - 2) * K
    apart = k_ptr + token * stride_k_l + groups * K
    _move_heads(together, apart, groups < G, c, s, K, HALF, BLOCK_HALF, BLOCK_REST, True, JOIN)
    apart = v_ptr + token * stride_v_l + groups * K
    _move_heads(together + K, apart, groups < G, c, s, K, HALF, BLOCK_HALF, BLOCK_REST, False, JOIN)  # fmt: skip


# --- launch + autograd ---------------------------------------------------------------------------
def launch_config(G: int, N: int, K: int, R: int) -> dict[str, int]:
    """Return block sizes and warps.

    A thread holds 8 elements of each half, one 128-bit access in bf16.
    """
    block_h = triton.next_power_of_2(G * (N - 2))
    block_half = triton.next_power_of_2(R // 2)
    return {
        "G": G, "N": N, "K": K, "HALF": R // 2,
        "BLOCK_H": block_h, "BLOCK_G": triton.next_power_of_2(G), "BLOCK_HALF": block_half,
        "BLOCK_REST": triton.next_power_of_2(max(1, K - R)),
        "num_warps": min(16, max(1, block_h * block_half // (32 * 8))),
    }  # fmt: skip


def _launch(
    qkv_LGNK: Tensor, apart: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, positions_L: Tensor,
    *, join: bool,
) -> None:  # fmt: skip
    L, G, N, K = qkv_LGNK.shape
    if L == 0:
        return
    _rope_kernel[(L,)](
        qkv_LGNK, *apart, cos, sin, positions_L.contiguous(),
        *(x.stride(0) for x in apart), cos.stride(0), sin.stride(0),
        **launch_config(G, N, K, 2 * cos.shape[1]), JOIN=join,
    )  # fmt: skip


def _split(
    qkv_LGNK: Tensor, cos: Tensor, sin: Tensor, positions_L: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    L, G, N, K = qkv_LGNK.shape
    apart = (
        qkv_LGNK.new_empty(L, G * (N - 2), K),
        qkv_LGNK.new_empty(L, G, K),
        qkv_LGNK.new_empty(L, G, K),
    )
    _launch(qkv_LGNK.contiguous(), apart, cos, sin, positions_L, join=False)
    return apart


def _dense_heads(x_LHK: Tensor) -> Tensor:
    """Return x with heads one after the other in a token's row; a copy only where they are not."""
    is_dense = x_LHK.stride(2) == 1 and x_LHK.stride(1) == x_LHK.shape[2]
    return x_LHK if is_dense else x_LHK.contiguous()


def _join(
    dq_LHK: Tensor, dk_LGK: Tensor, dv_LGK: Tensor, cos: Tensor, sin: Tensor, positions_L: Tensor
) -> Tensor:
    (L, H, K), G = dq_LHK.shape, dk_LGK.shape[1]
    dqkv_LGNK = dq_LHK.new_empty(L, G, H // G + 2, K)
    apart = (_dense_heads(dq_LHK), _dense_heads(dk_LGK), _dense_heads(dv_LGK))
    _launch(dqkv_LGNK, apart, cos, sin, positions_L, join=True)
    return dqkv_LGNK


_split_op = torch.library.custom_op("phimini::rope_fwd", _split, mutates_args=())
_join_op = torch.library.custom_op("phimini::rope_bwd", _join, mutates_args=())


@_split_op.register_fake
def _(qkv_LGNK, cos, sin, positions_L) -> tuple[Tensor, Tensor, Tensor]:
    L, G, N, K = qkv_LGNK.shape
    k_LGK, v_LGK = (qkv_LGNK.new_empty(L, G, K) for _ in range(2))
    return qkv_LGNK.new_empty(L, G * (N - 2), K), k_LGK, v_LGK


@_join_op.register_fake
def _(dq_LHK, dk_LGK, dv_LGK, cos, sin, positions_L) -> Tensor:
    (L, H, K), G = dq_LHK.shape, dk_LGK.shape[1]
    return dq_LHK.new_empty(L, G, H // G + 2, K)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dq_LHK: Tensor, dk_LGK: Tensor, dv_LGK: Tensor):
    return _join_op(dq_LHK, dk_LGK, dv_LGK, *ctx.saved_tensors), None, None, None


_split_op.register_autograd(_backward, setup_context=_save)


def _turned(x_LGNK: Tensor, cos: Tensor, sin: Tensor, positions_L: Tensor, sign: int) -> Tensor:
    """Rotate all heads by +angle (sign 1) or -angle, in torch. Products are in fp32, with one rounding for bf16."""
    half = cos.shape[-1]
    c, s = (
        table.index_select(0, positions_L).to(compute_dtype(x_LGNK.dtype))[:, None, None]
        for table in (cos, sin)
    )
    # One product over whole rows: on a CPU strided halves take as long as the rows.
    y = x_LGNK * torch.cat([c, c, c.new_ones(*c.shape[:-1], x_LGNK.shape[-1] - 2 * half)], -1)
    a, b = x_LGNK[..., :half], x_LGNK[..., half : 2 * half]
    y[..., :half].addcmul_(b, s, value=-sign)
    y[..., half : 2 * half].addcmul_(a, s, value=sign)
    return y.to(x_LGNK.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkv_LGNK: Tensor, cos: Tensor, sin: Tensor, positions_L: Tensor, triton_runs: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions_L)
        ctx.triton_runs = triton_runs
        if triton_runs:
            return _split(qkv_LGNK, cos, sin, positions_L)
        turned = _turned(qkv_LGNK[:, :, :-1], cos, sin, positions_L, 1)
        q_LHK = turned[:, :, :-1].flatten(1, 2)
        # copies, so that the projection is not kept for backward
        return q_LHK, turned[:, :, -1].contiguous(), qkv_LGNK[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_LHK: Tensor, dk_LGK: Tensor, dv_LGK: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.triton_runs:
            dqkv_LGNK = _join(dq_LHK, dk_LGK, dv_LGK, *ctx.saved_tensors)
        else:
            (L, _, K), G = dq_LHK.shape, dk_LGK.shape[1]
            rotated = torch.cat([dq_LHK.reshape(L, G, -1, K), dk_LGK[:, :, None]], 2)
            turned = _turned(rotated, *ctx.saved_tensors, -1)
            dqkv_LGNK = torch.cat([turned, dv_LGK[:, :, None]], 2)
        return dqkv_LGNK, None, None, None, None


# --- public op -----------------------------------------------------------------------------------
def rope(
    qkv_LGNK: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_L: Tensor,
    *,
    _backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (L, H, K) and k (L, G, K), rotated, and v (L, G, K) of a fused projection (L, G, H/G + 2, K).

    cos, sin (P, R/2): tables with the attention factor in them, e.g. `model.rope.rope_table`. positions_L: integers in
    [0, P), rows of the tables; packed documents restart at 0. A position out of range is not checked on CUDA (it would
    wait for the device) nor under torch.compile. Tables that require a gradient are refused.

    Raises ValueError where shapes or dtypes do not fit or, on a CPU, a position is out of range.
    """
    _check(qkv_LGNK, cos, sin, positions_L)
    triton_runs = runs_triton(qkv_LGNK, _backend)
    if torch.compiler.is_compiling():  # which fuses the definition
        op = _split_op if triton_runs else rope_reference
        return op(qkv_LGNK, cos, sin, positions_L)
    return _Rope.apply(qkv_LGNK, cos, sin, positions_L, triton_runs)


def _check(qkv_LGNK: Tensor, cos: Tensor, sin: Tensor, positions_L: Tensor) -> None:
    shape = qkv_LGNK.shape
    if not qkv_LGNK.is_floating_point() or len(shape) != 4 or shape[2] < 3:
        raise ValueError(
            "rope: qkv_LGNK: expected floating-point (tokens, groups, at least q, k and v, head size), "
            f"got {tuple(shape)} {qkv_LGNK.dtype}"
        )
    if positions_L.dtype not in (torch.int32, torch.int64) or positions_L.shape != shape[:1]:
        raise ValueError(
            f"rope: positions_L: expected int32 or int64 of shape ({shape[0]},), one per token, "
            f"got {positions_L.dtype} {tuple(positions_L.shape)}"
        )
    if cos.ndim != 2 or cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= shape[3]:
        raise ValueError(
            f"rope: cos, sin: expected both (positions, R/2) with R at most K = {shape[3]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not cos.is_floating_point() or not sin.is_floating_point():
        raise ValueError(
            f"rope: cos, sin: expected floating-point, got {cos.dtype} and {sin.dtype}"
        )
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        raise ValueError("rope: cos, sin: expected rows with unit stride")
    for name, t in (("cos", cos), ("sin", sin), ("positions_L", positions_L)):
        if t.device != qkv_LGNK.device:
            raise ValueError(
                f"rope: {name}: expected on {qkv_LGNK.device} like qkv, got {t.device}"
            )
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"rope: {name}: gets no gradient from this op; pass {name}.detach()")
    if host_knows(positions_L) and positions_L.numel() > 0:
        first, last = (int(v) for v in positions_L.aminmax())
        if first < 0 or last >= cos.shape[0]:
            raise ValueError(
                f"rope: positions_L: expected 0 to {cos.shape[0] - 1} (the tables' rows), got {first} to {last}"
            )
