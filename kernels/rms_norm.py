"""RMSNorm over the last dimension, alone or fused with the residual add before it.

    h  = x + residual                      (`rms_norm_add`; rounded to x's dtype, as it is stored)
    y  = h * rstd * w                      rstd = 1 / sqrt(mean(h^2) + eps)
    dh = rstd * (g - h * rstd^2 * mean(g * h)) + dh_out      g = dy * w
    dw = sum over rows of dy * h * rstd

One program normalises every P-th tile of rows and reads the weight once. dw is summed in two steps: each
program keeps a partial sum of its rows in fp32 registers, torch adds the P partials; the order is fixed on
a given GPU, so dw is deterministic.

Bound: memory. Elements moved: forward 2*M*D (x in, y out), with the add 4*M*D (x, residual in; h, y out);
backward 3*M*D (h, dy in; dh out), with the add 4*M*D. Weight and partials: (P + 1)*D and 2*P*D.

Letters: M rows (all leading dims), D normalised dim, P programs.
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
    num_sms,
    runs_triton,
)

MAX_D = 16384  # one row must fit one program's registers
# Bytes that must be in flight per SM = bandwidth * latency / SMs = 3.35 TB/s * 600 ns / 132 = 15 KB on an H100.
# A program holds a tile of at least 2 KB, for Phi-4-Mini a row of 6 KB: 4 programs forward, and backward, where
# a program holds x and dy and needs twice the registers, 2.
_FWD_PROGRAMS_PER_SM, _BWD_PROGRAMS_PER_SM = 4, 2


# --- reference -----------------------------------------------------------------------------------
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition. Computes in fp32 (fp64 for fp64 input) and casts at the end."""
    x_f = x.to(compute_dtype(x.dtype))
    rstd = torch.rsqrt(x_f.square().mean(-1, keepdim=True) + eps)
    return (x_f * rstd * weight.to(x_f.dtype)).to(x.dtype)


def rms_norm_add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The definition of (y, h): h = x + residual, the next residual, and y, its norm."""
    h = x + residual
    return rms_norm_reference(h, weight, eps), h


# --- triton --------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["M"])
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr,  # (M,D) (M,D) (D,) (M,D) (M,D) (M,)
    stride_x_m, stride_residual_m,
    M, D, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    in_row = cols < D
    w = tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (rows < M) & in_row
        x = tl.load(x_ptr + rows * stride_x_m + cols, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(
                residual_ptr + rows * stride_residual_m + cols, mask=inside, other=0.0
            )
            # backward reads the rounded sum, so the norm is of the rounded sum
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + rows * D + cols, x, mask=inside)
        x = x.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)
        tl.store(y_ptr + rows * D + cols, x * rstd * w, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_bwd_kernel(
    dy_ptr, dh_out_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dw_partial_ptr,  # (M,D) x 3, (D,) (M,) (M,D) (P,D)
    stride_dy_m, stride_dh_out_m, stride_h_m,
    M, D,
    HAS_DH_OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)[None, :]
    in_row = cols < D
    w = tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for first in range(program * ROWS, M, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (rows < M) & in_row
        h = tl.load(h_ptr + rows * stride_h_m + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * stride_dy_m + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        g = dy * w
        dh = rstd * (g - h * rstd * rstd * (tl.sum(g * h, axis=1, keep_dims=True) / D))
        if HAS_DH_OUT:
            dh += tl.load(
                dh_out_ptr + rows * stride_dh_out_m + cols, mask=inside, other=0.0
            ).to(tl.float32)  # fmt: skip
        tl.store(dh_ptr + rows * D + cols, dh, mask=inside)
        dw += dy * h * rstd
    out = dw_partial_ptr + program.to(tl.int64) * D + cols
    tl.store(out, tl.sum(dw, axis=0, keep_dims=True), mask=in_row)


# --- launch + autograd ---------------------------------------------------------------------------
def launch_config(D: int) -> dict[str, int]:
    """Return block sizes and warps for rows of D elements.

    16 elements per thread are two 128-bit accesses in bf16 and leave registers for x, w and dw in fp32. Rows
    shorter than 1,024 share a tile, so that even those are read 128 bits at a time.
    """
    BLOCK_D = triton.next_power_of_2(D)
    rows = max(1, 1024 // BLOCK_D)
    num_warps = min(16, max(4, rows * BLOCK_D // (32 * 16)))
    return {"ROWS": rows, "BLOCK_D": BLOCK_D, "num_warps": num_warps}


def _rows(x: Tensor) -> Tensor:
    """Return x as (M, D) with unit stride in a row; a copy only where that is impossible."""
    x_MD = x.reshape(-1, x.shape[-1])
    return x_MD if x_MD.stride(-1) == 1 else x_MD.contiguous()


def _num_programs(M: int, rows: int, device: torch.device, per_sm: int) -> int:
    return min(triton.cdiv(M, rows), per_sm * num_sms(device))


def _launch_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    D, x_MD = x.shape[-1], _rows(x)
    M = x_MD.shape[0]
    residual_MD = x_MD if residual is None else _rows(residual)
    y_MD = torch.empty(M, D, dtype=x.dtype, device=x.device)
    h_MD = x_MD if residual is None else torch.empty_like(y_MD)
    rstd_M = torch.empty(M, dtype=torch.float32, device=x.device)
    if M > 0:
        config = launch_config(D)
        num_programs = _num_programs(M, config["ROWS"], x.device, _FWD_PROGRAMS_PER_SM)
        _rms_norm_fwd_kernel[(num_programs,)](
            x_MD, residual_MD, weight.contiguous(), y_MD, h_MD, rstd_M,
            x_MD.stride(0), residual_MD.stride(0),
            M, D, eps,
            HAS_RESIDUAL=residual is not None, **config,
        )  # fmt: skip
    return y_MD.view(x.shape), h_MD, rstd_M


def _fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _x_MD, rstd_M = _launch_fwd(x, None, weight, eps)
    return y, rstd_M


def _add_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, h_MD, rstd_M = _launch_fwd(x, residual, weight, eps)
    return y, h_MD.view(x.shape), rstd_M


def _launch_bwd(
    dy: Tensor, dh_out: Tensor | None, h: Tensor, weight: Tensor, rstd_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dh and, in fp32, dw."""
    D, h_MD, dy_MD = h.shape[-1], _rows(h), _rows(dy)
    M = h_MD.shape[0]
    dh_MD = torch.empty(M, D, dtype=h.dtype, device=h.device)
    if M == 0:
        return dh_MD.view(h.shape), torch.zeros_like(weight, dtype=torch.float32)
    dh_out_MD = dy_MD if dh_out is None else _rows(dh_out)
    config = launch_config(D)
    num_programs = _num_programs(M, config["ROWS"], h.device, _BWD_PROGRAMS_PER_SM)
    dw_partial_PD = torch.empty(num_programs, D, dtype=torch.float32, device=h.device)
    _rms_norm_bwd_kernel[(num_programs,)](
        dy_MD, dh_out_MD, h_MD, weight.contiguous(), rstd_M, dh_MD, dw_partial_PD,
        dy_MD.stride(0), dh_out_MD.stride(0), h_MD.stride(0),
        M, D,
        HAS_DH_OUT=dh_out is not None, **config,
    )  # fmt: skip
    return dh_MD.view(h.shape), dw_partial_PD.sum(0)


def _bwd(
    dy: Tensor, dh_out: Tensor | None, h: Tensor, weight: Tensor, rstd_M: Tensor
) -> tuple[Tensor, Tensor]:
    dh, dw = _launch_bwd(dy, dh_out, h, weight, rstd_M)
    return dh, dw.to(weight.dtype)


# What torch.compile sees. Eager calls the functions above: the dispatch of a custom op takes longer than their launch.
_fwd_op = torch.library.custom_op("phimini::rms_norm_fwd", _fwd, mutates_args=())
_add_fwd_op = torch.library.custom_op("phimini::rms_norm_add_fwd", _add_fwd, mutates_args=())
_bwd_op = torch.library.custom_op("phimini::rms_norm_bwd", _bwd, mutates_args=())


@_fwd_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    M = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(M, dtype=torch.float32)


@_add_fwd_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    M = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(M, dtype=torch.float32)


@_bwd_op.register_fake
def _(dy, dh_out, h, weight, rstd_M) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    h, weight, rstd_M = (inputs[0], inputs[1], output[1])
    if len(output) == 3:
        _y, h, rstd_M = output
        weight = inputs[2]
    ctx.mark_non_differentiable(rstd_M)
    ctx.set_materialize_grads(False)  # the last norm of a model has no dh
    ctx.save_for_backward(h, weight, rstd_M)


def _backward(ctx, dy: Tensor, _drstd):
    dx, dw = _bwd_op(dy, None, *ctx.saved_tensors)
    return dx, dw, None


def _backward_add(ctx, dy: Tensor | None, dh_out: Tensor | None, _drstd):
    if dy is None:
        return dh_out, dh_out, None, None
    dh, dw = _bwd_op(dy, dh_out, *ctx.saved_tensors)
    return dh, dh, dw, None


_fwd_op.register_autograd(_backward, setup_context=_save)
_add_fwd_op.register_autograd(_backward_add, setup_context=_save)


class _RmsNorm(torch.autograd.Function):
    """The kernels outside torch.compile, with the residual add where there is a residual."""

    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, main_grad: Tensor | None
    ):  # fmt: skip
        ctx.added_to = None if main_grad is None else (weight, main_grad)
        y, h_MD, rstd_M = _launch_fwd(x, residual, weight, eps)
        ctx.set_materialize_grads(False)
        if residual is None:
            ctx.save_for_backward(x, weight, rstd_M)
            return y
        h = h_MD.view(x.shape)
        ctx.save_for_backward(h, weight, rstd_M)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dh_out: Tensor | None = None):  # pyright: ignore[reportIncompatibleMethodOverride]
        dh, dw = dh_out, None
        if dy is not None:
            dh, dw = _launch_bwd(dy, dh_out, *ctx.saved_tensors)
            if ctx.added_to is None:
                dw = dw.to(ctx.saved_tensors[1].dtype)
            else:
                parameter, main_grad = ctx.added_to
                main_grad.add_(dw)
                parameter.grad_added_to_main_grad = True
                dw = torch.empty_like(parameter)
        return dh, dh if ctx.needs_input_grad[1] else None, dw, None, None


class _TorchRmsNorm(torch.autograd.Function):
    """RMSNorm on a CPU: a third of the time of autograd's backward, because intermediates are reused."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_f = x.to(compute_dtype(x.dtype))
        mean_square = torch.linalg.vector_norm(x_f, dim=-1, keepdim=True).square_()
        rstd = mean_square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x_f * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        w = weight.to(rstd.dtype)
        dy = dy.to(rstd.dtype)
        x_hat = x * rstd
        dy_x_hat_MD = (dy * x_hat).reshape(-1, x.shape[-1])
        mean = torch.mv(dy_x_hat_MD, w).view(rstd.shape).div_(x.shape[-1])
        dx = (dy * w).addcmul_(x_hat, mean, value=-1).mul_(rstd)
        return dx.to(x.dtype), dy_x_hat_MD.sum(0).to(weight.dtype), None


def _in_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if (
        torch.compiler.is_compiling()
    ):  # fuses by itself, and torch 2.11 compiles the Function to wrong gradients
        return rms_norm_reference(x, weight, eps)
    return _TorchRmsNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


# --- public op -----------------------------------------------------------------------------------
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    main_grad: Tensor | None = None,
    _backend: Backend | None = None,
) -> Tensor:
    """Return x * rstd * weight, (..., D), (D,) -> (..., D) in x's dtype; statistics in fp32.

    main_grad (D,), fp32, with the kernels only: backward adds dw to it by the protocol that `linear` describes.
    Raises ValueError where the shapes do not fit or D is larger than 16,384.
    """
    _check("rms_norm", x, weight, eps)
    if not runs_triton(x, _backend):
        return _in_torch(x, weight, eps)
    if torch.compiler.is_compiling():
        return _fwd_op(x, weight, eps)[0]
    return _RmsNorm.apply(x, None, weight, eps, main_grad)


def rms_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    main_grad: Tensor | None = None,
    _backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, h), (..., D) each: h = x + residual, y = rms_norm(h); weight (D,); main_grad as in `rms_norm`.

    Raises ValueError where the shapes or the dtypes do not fit.
    """
    _check("rms_norm_add", x, weight, eps)
    expected, got = ((*t.shape, t.dtype, str(t.device)) for t in (x, residual))
    if got != expected:
        raise ValueError(f"rms_norm_add: residual: expected {expected} like x, got {got}")
    if not runs_triton(x, _backend):
        h = x + residual
        return _in_torch(h, weight, eps), h
    if torch.compiler.is_compiling():
        y, h, _rstd_M = _add_fwd_op(x, residual, weight, eps)
        return y, h
    return _RmsNorm.apply(x, residual, weight, eps, main_grad)


def _check(op: str, x: Tensor, weight: Tensor, eps: float) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(
            f"{op}: x: expected floating-point (..., D), got {tuple(x.shape)} {x.dtype}"
        )
    if not eps >= 0:
        raise ValueError(f"{op}: eps: expected 0 or more, got {eps}")
    D = x.shape[-1]
    if weight.shape != (D,) or not weight.is_floating_point():
        raise ValueError(
            f"{op}: weight: expected shape ({D},) like x's last dim, floating-point, "
            f"got {tuple(weight.shape)} {weight.dtype}"
        )
    if not 0 < D <= MAX_D:
        raise ValueError(
            f"{op}: x: expected a last dim of 1 to {MAX_D} (one row per program), got {D}"
        )
    if weight.device != x.device:
        raise ValueError(f"{op}: weight: expected on {x.device} like x, got {weight.device}")
