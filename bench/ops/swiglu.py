"""Bench cases of SwiGLU on the fused gate_up: timed, compiled and counted at the presets' widths."""

import torch
from torch import Tensor
from torch.nn import functional

from phimini.bench.ops.cases import StaticCase, TrafficCase, liger_is_installed
from phimini.bench.ops.harness import Case
from phimini.kernels import swiglu, swiglu_reference
from phimini.kernels.swiglu import _swiglu_bwd_kernel, _swiglu_fwd_kernel, launch_config


# --- timed -----------------------------------------------------------------------------------------
def timed_cases(device: str, quick: bool) -> list[Case]:
    if device == "cuda":
        shapes = [(16384, 8192)] if quick else [(2048, 8192), (16384, 8192), (65536, 8192)]
        return [_case(M, F, device, torch.bfloat16) for M, F in shapes]
    shapes = [(2048, 256)] if quick else [(2048, 256), (8192, 256), (2048, 3072)]
    return [_case(M, F, device, torch.float32) for M, F in shapes]


def _eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _contiguous_halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.contiguous(), up.contiguous()


def _case(M: int, F: int, device: str, dtype: torch.dtype) -> Case:
    gate_up = torch.randn(M, 2 * F, device=device, dtype=dtype)
    providers = {"phimini": swiglu, "eager": _eager, "torch.compile": torch.compile(_eager)}
    if device == "cuda" and liger_is_installed():
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        providers["liger"] = lambda gate_up: LigerSiLUMulFunction.apply(
            *_contiguous_halves(gate_up)
        )
    element = M * F * gate_up.element_size()
    return Case(
        op="swiglu",
        shape={"M": M, "F": F},
        inputs={"gate_up": gate_up},
        providers=providers,
        reference=swiglu_reference,
        min_bytes={"fwd": 3 * element, "bwd": 5 * element},
        min_flops={"fwd": 5 * M * F, "bwd": 10 * M * F},
    )


# --- compiled --------------------------------------------------------------------------------------
def static_cases() -> list[StaticCase]:
    """Return the kernels with the block size of every width from 1,024 on, which both GPU presets have."""
    blocks = launch_config(8192)
    num_warps = blocks.pop("num_warps")
    sizes = {"stride_gate_up_m": "i32:16", "F": "i32:16"}
    cases = [
        StaticCase(
            kernel="swiglu_fwd",
            function=_swiglu_fwd_kernel,
            signature=sizes | {"gate_up_ptr": "*bf16", "y_ptr": "*bf16"},
            constexprs=blocks,
            num_warps=num_warps,
            max_registers={80: 32, 90: 32, 100: 32},
        ),
        StaticCase(
            kernel="swiglu_bwd",
            function=_swiglu_bwd_kernel,
            signature=sizes
            | {"dy_ptr": "*bf16", "gate_up_ptr": "*bf16", "dgate_up_ptr": "*bf16"}
            | {"stride_dy_m": "i32:16"},
            constexprs=blocks,
            num_warps=num_warps,
            max_registers={80: 32, 90: 32, 100: 40},
        ),
    ]
    return cases


def peer_static_cases() -> list[StaticCase]:
    """Return Liger 0.8.5 at F = 8192, as its launch code sets it."""
    if not liger_is_installed():
        return []
    from liger_kernel.ops import swiglu as liger

    common = {"a_ptr": "*bf16", "b_ptr": "*bf16", "stride": "i32:16", "gate_multiplier": "fp32"}
    constexprs = {"n_cols": 8192, "BLOCK_SIZE": 8192}
    return [
        StaticCase(
            kernel="swiglu_fwd",
            provider="liger",
            function=liger._swiglu_forward_kernel,
            signature=common | {"c_ptr": "*bf16"},
            constexprs=constexprs,
            num_warps=16,
        ),
        StaticCase(
            kernel="swiglu_bwd",
            provider="liger",
            function=liger._swiglu_backward_kernel,
            signature=common | {"dc_ptr": "*bf16"},
            constexprs=constexprs,
            num_warps=16,
        ),
    ]


# --- counted ---------------------------------------------------------------------------------------
def traffic_cases() -> list[TrafficCase]:
    """Return one width. Liger's kernel takes gate and up apart: its own Phi-3 layer copies both halves of the fused projection
    first, and joins the two gradients (liger_kernel/transformers/swiglu.py, `ensure_contiguous`)."""
    M, F = 8, 8192
    gate_up, dy = torch.randn(M, 2 * F).bfloat16(), torch.randn(M, F).bfloat16()
    element = M * F * 2
    cases = [
        TrafficCase(
            kernel="swiglu_fwd",
            run=lambda: torch.ops.phimini.swiglu_fwd(gate_up),
            minimum_bytes=3 * element,
        ),
        TrafficCase(
            kernel="swiglu_bwd",
            run=lambda: torch.ops.phimini.swiglu_bwd(dy, gate_up),
            minimum_bytes=5 * element,
        ),
    ]
    if liger_is_installed():
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

        gate, up = _contiguous_halves(gate_up)
        cases += [
            TrafficCase(
                kernel="swiglu_fwd",
                provider="liger",
                run=lambda: swiglu_forward(*_contiguous_halves(gate_up), 1.0),
                minimum_bytes=3 * element,
            ),
            TrafficCase(
                kernel="swiglu_bwd",
                provider="liger",
                run=lambda: torch.cat(swiglu_backward(gate, up, dy, 1.0), dim=-1),
                minimum_bytes=5 * element,
            ),
        ]
    return cases
