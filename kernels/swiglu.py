"""SwiGLU on the fused projection: the first half of the last dimension is the gate, the second half the value.

    y     = silu(gate) * up                            silu(g) = g * sigmoid(g)
    dgate = dy * up * s * (1 + gate * (1 - s))         s = sigmoid(gate)
    dup   = dy * silu(gate)

One program computes a block of one row; nothing is reduced, so the result is deterministic.

Bound: memory. Forward moves 3*M*F elements (gate, up in; y out), backward 5*M*F (gate, up, dy in; dgate, dup
out). Only gate_up is kept for backward.

Letters: M rows (all leading dims), F MLP hidden size (half of gate_up's last dim).
"""

# triton types constexpr parameters as tl.constexpr, not int
# pyright: reportArgumentType=false, reportReturnType=false
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from phimini.kernels.backend.launch import (
    Backend,
    compute_dtype,
    runs_triton,
)


# --- reference -----------------------------------------------------------------------------------
def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition. Computes in fp32 (fp64 for fp64 input) and casts at the end."""
    gate, up = gate_up.to(compute_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


# --- triton --------------------------------------------------------------------------------------
@triton.jit
def _swiglu_fwd_kernel(
    gate_up_ptr, y_ptr,  # (M, 2F) (M, F)
    stride_gate_up_m,
    F,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = cols < F
    gate_ptr = gate_up_ptr + row * stride_gate_up_m + cols
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + cols, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, gate_up_ptr, dgate_up_ptr,  # (M, F) (M, 2F) (M, 2F)
    stride_dy_m, stride_gate_up_m,
    F,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = cols < F
    gate_ptr = gate_up_ptr + row * stride_gate_up_m + cols
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy_m + cols, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate_ptr = dgate_up_ptr + row * 2 * F + cols
    tl.store(dgate_ptr, dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=inside)
    tl.store(dgate_ptr + F, dy * gate * sigmoid, mask=inside)


# --- launch + autograd ---------------------------------------------------------------------------
def launch_config(F: int) -> dict[str, int]:
    """Return block size and warps for F columns.

    8 elements per thread are one 128-bit access per tensor in bf16. They need few enough registers that an SM holds
    its 64 warps, which hide the latency of a kernel that only streams.
    """
    BLOCK_F = min(1024, max(32, triton.next_power_of_2(F)))
    return {"BLOCK_F": BLOCK_F, "num_warps": max(1, BLOCK_F // (32 * 8))}


def _rows(x: Tensor) -> Tensor:
    """Return x as (M, last dim) with unit stride in a row; a copy only where that is impossible."""
    x_2d = x.reshape(-1, x.shape[-1])
    return x_2d if x_2d.stride(-1) == 1 else x_2d.contiguous()


def _fwd(gate_up: Tensor) -> Tensor:
    gate_up_M2F = _rows(gate_up)
    M, F = gate_up_M2F.shape[0], gate_up.shape[-1] // 2
    y_MF = torch.empty(M, F, dtype=gate_up.dtype, device=gate_up.device)
    if M > 0:
        config = launch_config(F)
        _swiglu_fwd_kernel[(M, triton.cdiv(F, config["BLOCK_F"]))](
            gate_up_M2F, y_MF, gate_up_M2F.stride(0), F, **config
        )
    return y_MF.view(*gate_up.shape[:-1], F)


def _bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate_up_M2F, dy_MF = _rows(gate_up), _rows(dy)
    M, F = dy_MF.shape
    dgate_up_M2F = torch.empty(M, 2 * F, dtype=gate_up.dtype, device=gate_up.device)
    if M > 0:
        config = launch_config(F)
        _swiglu_bwd_kernel[(M, triton.cdiv(F, config["BLOCK_F"]))](
            dy_MF, gate_up_M2F, dgate_up_M2F, dy_MF.stride(0), gate_up_M2F.stride(0), F, **config
        )
    return dgate_up_M2F.view(gate_up.shape)


# What torch.compile sees. Eager calls the functions above: the dispatch of a custom op takes longer than their launch.
_fwd_op = torch.library.custom_op("phimini::swiglu_fwd", _fwd, mutates_args=())
_bwd_op = torch.library.custom_op("phimini::swiglu_bwd", _bwd, mutates_args=())


@_fwd_op.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_bwd_op.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> Tensor:
    return _bwd_op(dy, *ctx.saved_tensors)


_fwd_op.register_autograd(_backward, setup_context=_save)


class _Swiglu(torch.autograd.Function):
    """The kernels outside torch.compile."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _fwd(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _bwd(dy, *ctx.saved_tensors)


class _TorchSwiglu(torch.autograd.Function):
    """SwiGLU on a CPU: keeps only gate_up and writes both halves of its gradient in place."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.to(compute_dtype(gate_up.dtype)).chunk(2, dim=-1)
        return silu(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        wide = gate_up.to(compute_dtype(gate_up.dtype))
        gate, up = wide.chunk(2, dim=-1)
        dy = dy.to(wide.dtype)
        dgate_up = torch.empty_like(wide)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(silu(gate), dy, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dgate_up.to(gate_up.dtype)


# --- public op -----------------------------------------------------------------------------------
def swiglu(gate_up: Tensor, *, _backend: Backend | None = None) -> Tensor:
    """Return silu(gate_up[..., :F]) * gate_up[..., F:], (..., 2F) -> (..., F); fp32 inside.

    Raises ValueError where the last dimension is not even and positive.
    """
    if gate_up.ndim == 0 or not gate_up.is_floating_point():
        raise ValueError(
            f"swiglu: gate_up: expected floating-point (..., 2F), got {tuple(gate_up.shape)} {gate_up.dtype}"
        )
    if gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
        raise ValueError(
            f"swiglu: gate_up: expected an even last dim (gate, then up), got {gate_up.shape[-1]}"
        )
    triton_runs = runs_triton(gate_up, _backend)
    if (
        torch.compiler.is_compiling()
    ):  # which fuses the definition, and cannot trace writes into a half
        return _fwd_op(gate_up) if triton_runs else swiglu_reference(gate_up)
    return (_Swiglu if triton_runs else _TorchSwiglu).apply(gate_up)
