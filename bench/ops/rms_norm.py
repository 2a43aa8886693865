"""Bench cases of RMSNorm, alone and after a residual add: timed, compiled and counted at the presets' widths."""

import importlib
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

from phimini.bench.ops.cases import StaticCase, TrafficCase, liger_is_installed
from phimini.bench.ops.harness import Case
from phimini.kernels import rms_norm, rms_norm_add, rms_norm_add_reference, rms_norm_reference
from phimini.kernels.rms_norm import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel, launch_config
from phimini.model.config import preset

GPU_WIDTHS = sorted({preset(name).model_dim for name in ("phi-4-mini", "phi-400m")})


# --- timed -----------------------------------------------------------------------------------------
def timed_cases(device: str, quick: bool) -> list[Case]:
    """Return bf16 at Phi-4-Mini's width on CUDA, fp32 at the tiny preset's and a larger width on a CPU."""
    if device == "cuda":
        shapes = [(16384, 3072)] if quick else [(2048, 3072), (16384, 3072), (65536, 3072)]
        return [
            make(M, D, device, torch.bfloat16) for M, D in shapes for make in (_norm, _norm_add)
        ]
    shapes = [(2048, 128)] if quick else [(2048, 128), (8192, 128), (2048, 1152)]
    return [make(M, D, device, torch.float32) for M, D in shapes for make in (_norm, _norm_add)]


def _norm(M: int, D: int, device: str, dtype: torch.dtype) -> Case:
    inputs = _inputs(M, D, device, dtype)
    del inputs["residual"]
    providers = {
        "phimini": rms_norm,
        "eager": rms_norm_reference,
        "torch": lambda x, weight: functional.rms_norm(x, (D,), weight, 1e-5),
        "torch.compile": torch.compile(rms_norm_reference),
    }
    if device == "cuda" and liger_is_installed():
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        providers["liger"] = lambda x, weight: LigerRMSNormFunction.apply(
            x, weight, 1e-5, 0.0, "gemma", False
        )
    if device == "cuda" and importlib.util.find_spec("quack") is not None:
        quack = importlib.import_module("quack")
        providers["quack"] = lambda x, weight: quack.rmsnorm(x, weight, eps=1e-5)
    row = M * D * inputs["x"].element_size()
    return Case(
        op="rms_norm",
        shape={"M": M, "D": D},
        inputs=inputs,
        providers=providers,
        reference=rms_norm_reference,
        min_bytes={"fwd": 2 * row, "bwd": 3 * row},
        min_flops={"fwd": 4 * M * D, "bwd": 8 * M * D},
    )


def _norm_add(M: int, D: int, device: str, dtype: torch.dtype) -> Case:
    inputs = _inputs(M, D, device, dtype)
    providers = {
        "phimini": rms_norm_add,
        "eager": rms_norm_add_reference,
        "torch.compile": torch.compile(rms_norm_add_reference),
    }
    if device == "cuda" and importlib.util.find_spec("quack") is not None:
        quack = importlib.import_module("quack")
        providers["quack"] = lambda x, residual, weight: quack.rmsnorm(
            x, weight, residual=residual, eps=1e-5, prenorm=True
        )
    row = M * D * inputs["x"].element_size()
    return Case(
        op="rms_norm_add",
        shape={"M": M, "D": D},
        inputs=inputs,
        providers=providers,
        reference=rms_norm_add_reference,
        min_bytes={"fwd": 4 * row, "bwd": 4 * row},
        min_flops={"fwd": 5 * M * D, "bwd": 9 * M * D},
    )


def _inputs(M: int, D: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": torch.randn(M, D, device=device, dtype=dtype),
        "residual": torch.randn(M, D, device=device, dtype=dtype),
        "weight": 1 + 0.1 * torch.randn(D, device=device, dtype=dtype),
    }


# --- compiled --------------------------------------------------------------------------------------
_FWD = {
    "x_ptr": "*bf16", "residual_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "h_ptr": "*bf16",
    "rstd_ptr": "*fp32", "stride_x_m": "i32:16", "stride_residual_m": "i32:16", "M": "i32", "D": "i32:16",
    "eps": "fp32",
}  # fmt: skip
_BWD = {
    "dy_ptr": "*bf16", "dh_out_ptr": "*bf16", "h_ptr": "*bf16", "w_ptr": "*bf16", "rstd_ptr": "*fp32",
    "dh_ptr": "*bf16", "dw_partial_ptr": "*fp32", "stride_dy_m": "i32:16", "stride_dh_out_m": "i32:16",
    "stride_h_m": "i32:16", "M": "i32", "D": "i32:16",
}  # fmt: skip


def static_cases() -> list[StaticCase]:
    cases = []
    for D in GPU_WIDTHS:
        blocks = launch_config(D)
        num_warps = blocks.pop("num_warps")
        for add in (False, True):
            name = "rms_norm_add" if add else "rms_norm"
            cases += [
                StaticCase(
                    kernel=f"{name}_fwd",
                    function=_rms_norm_fwd_kernel,
                    signature=_FWD,
                    constexprs={"HAS_RESIDUAL": add, **blocks},
                    num_warps=num_warps,
                    max_registers={80: 56, 90: 56, 100: 56},
                ),
                StaticCase(
                    kernel=f"{name}_bwd",
                    function=_rms_norm_bwd_kernel,
                    signature=_BWD,
                    constexprs={"HAS_DH_OUT": add, **blocks},
                    num_warps=num_warps,
                    max_registers={80: 120, 90: 120, 100: 112},
                ),
            ]
    return cases


def peer_static_cases() -> list[StaticCase]:
    """Return Liger 0.8.5 at Phi-4-Mini's width, as its launch code sets it (calculate_settings)."""
    if not liger_is_installed():
        return []
    import triton.language as tl
    from liger_kernel.ops import rms_norm as liger

    strides = {"X_row_stride": "i32:16", "n_cols": "i32:16", "offset": "fp32"}
    common = {"W_row_stride": 1, "casting_mode": 1, "elementwise_affine": True, "BLOCK_SIZE": 4096}
    return [
        StaticCase(
            kernel="rms_norm_fwd",
            provider="liger",
            function=liger._rms_norm_forward_kernel,
            signature=strides
            | {"Y_ptr": "*bf16", "X_ptr": "*bf16", "W_ptr": "*bf16", "RSTD_ptr": "*fp32"}
            | {"Y_row_stride": "i32:16", "eps": "fp32"},
            constexprs={**common, "RSTD_row_stride": 1},
            num_warps=8,
        ),
        StaticCase(
            kernel="rms_norm_bwd",
            provider="liger",
            function=liger._rms_norm_backward_kernel,
            signature=strides
            | {"dY_ptr": "*bf16", "dX_ptr": "*bf16", "X_ptr": "*bf16", "W_ptr": "*bf16"}
            | {"RSTD_ptr": "*fp32", "dW_ptr": "*fp32", "dY_row_stride": "i32:16"}
            | {"dX_row_stride": "i32:16", "dW_row_stride": "i32:16", "n_rows": "i32"}
            | {"rows_per_program": "i32"},
            constexprs={
                **common,
                "RSTD_row_stride": 1,
                "X_dtype": tl.bfloat16,
                "COMPUTE_DW": True,
            },
            num_warps=8,
        ),
    ]


# --- counted ---------------------------------------------------------------------------------------
def traffic_cases() -> list[TrafficCase]:
    """Return Phi-4-Mini's width with 16 rows per program forward and 32 backward, half of an H100's at 16,384 rows."""
    M, D = 64, 3072
    x, residual, dy = (torch.randn(M, D).bfloat16() for _ in range(3))
    weight = torch.rand(D).bfloat16()
    row, weight_bytes, rstd = M * D * 2, 2 * D, 4 * M
    forward = torch.ops.phimini.rms_norm_fwd
    cases = [
        TrafficCase(
            kernel="rms_norm_fwd",
            run=lambda: forward(x, weight, 1e-5),
            minimum_bytes=2 * row + weight_bytes + rstd,
        ),
        TrafficCase(
            kernel="rms_norm_bwd",
            run=lambda: torch.ops.phimini.rms_norm_bwd(dy, None, x, weight, torch.ones(M)),
            minimum_bytes=3 * row + 2 * weight_bytes + rstd,
        ),
        TrafficCase(
            kernel="rms_norm_add_fwd",
            run=lambda: torch.ops.phimini.rms_norm_add_fwd(x, residual, weight, 1e-5),
            minimum_bytes=4 * row + weight_bytes + rstd,
        ),
    ]
    if liger_is_installed():
        from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

        cases += [
            TrafficCase(
                kernel="rms_norm_fwd",
                provider="liger",
                run=lambda: rms_norm_forward(x, weight, 1e-5, 0.0, "gemma", None),
                minimum_bytes=2 * row + weight_bytes + rstd,
            ),
            TrafficCase(
                kernel="rms_norm_bwd",
                provider="liger",
                run=lambda: rms_norm_backward(
                    dy, x, weight, torch.ones(M), 0.0, 1, 4096, 8, False, None
                ),
                minimum_bytes=3 * row + 2 * weight_bytes + rstd,
            ),
        ]
    return cases
