"""The common part of the four head ops' bench files: inputs, least bytes and FLOPs, and the kernels' arguments."""

import torch
from torch import Tensor

from phimini.bench.ops.cases import StaticCase
from phimini.bench.ops.harness import Case
from phimini.kernels.head.block_sizes import (
    GRADIENT_ROWS,
    GRADIENT_WARPS,
    MATMUL,
    MERGE_ROWS,
    MERGE_SPLITS,
    MERGE_WARPS,
)
from phimini.kernels.head.triton_kernels import (
    _head_fwd_kernel,
    _head_gradient_kernel,
    _head_logits_kernel,
    _head_merge_kernel,
)

# (M, D, V): Phi-4-Mini's head at 16,384 tokens; on a CPU the demo's model, one with a large vocabulary, and two chunks of
# Phi-4-Mini's own vocabulary
GPU_SHAPES = [(16384, 3072, 200064), (4096, 3072, 200064)]
CPU_SHAPES = [(1536, 128, 256), (2048, 256, 32000), (512, 128, 200064)]

# Not confirmed on an H100; at 800 TFLOP/s three GEMMs of the first shape take 75.5 ms. The expectation is
# arithmetic: logits at 540 to 600 TFLOP/s, the two gradient products at 700 to 800, 5 ms of row kernels.
_PER_GEMM = "H100, fwd+bwd: within 10 % of linear_cross_entropy's ms"
GPU_TARGETS = {
    "linear_logprob": "H100, fwd: at most 30 ms",
    "linear_cross_entropy": "H100, fwd+bwd: at most 83 ms (floor 75.5 at 800 TFLOP/s); expected of today's code: 88 to 100",
    "linear_dpo": _PER_GEMM,
    "linear_policy_loss": _PER_GEMM,
}
_CPU_LOSS = "fwd+bwd: at most {} of eager's CPU seconds, 0.15 of its memory"
CPU_TARGETS = {
    "linear_cross_entropy": _CPU_LOSS.format(0.95) + "; at most 0.5 of torch's CPU seconds",
    "linear_dpo": _CPU_LOSS.format(0.85),
    "linear_policy_loss": _CPU_LOSS.format(0.85),
    "linear_policy_loss_entropy_metric": _CPU_LOSS.format(0.6),
    "linear_policy_loss_entropy_bonus": _CPU_LOSS.format(0.6),
}


def shapes(device: str, quick: bool) -> list[tuple[int, int, int]]:
    listed = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    return listed[:1] if quick else listed


def head_inputs(M: int, D: int, V: int, device: str) -> dict[str, Tensor]:
    """Return hidden and weight, scaled so that the logits have unit variance."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {
        "hidden": torch.randn(M, D, device=device, dtype=dtype),
        "weight": torch.randn(V, D, device=device, dtype=dtype) * D**-0.5,
    }


def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return eager torch's (log-softmax (M, V), log-probs of the targets (M,))."""
    log_p = torch.log_softmax(
        (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)), -1
    )
    return log_p, log_p.gather(1, targets[:, None])[:, 0]


def head_case(
    op: str, shape: tuple[int, int, int], inputs: dict[str, Tensor], eager, ours, passes: tuple[str, ...], **others
) -> Case:  # fmt: skip
    """Return a case whose least work is: x and W read, dX and dW written once; one GEMM forward, three with gradients."""
    M, D, V = shape
    is_cuda = inputs["hidden"].is_cuda
    target = (GPU_TARGETS if is_cuda else CPU_TARGETS).get(op, "")
    is_meant = shape == (GPU_SHAPES[0] if is_cuda else CPU_SHAPES[1])
    element = inputs["hidden"].element_size()
    once = (M * D + V * D) * element
    min_bytes = {"fwd": once, "fwd+bwd": 2 * once}
    min_flops = {"fwd": 2 * M * V * D, "fwd+bwd": 6 * M * V * D}
    return Case(
        op=op,
        shape={"M": M, "D": D, "V": V},
        inputs=inputs,
        providers={
            "phimini": ours,
            "eager": eager,
            "torch.compile": torch.compile(eager),
            **others,
        },
        reference=eager,
        min_bytes={name: min_bytes[name] for name in passes},
        min_flops={name: min_flops[name] for name in passes},
        target=target if is_meant else "",
    )


# --- compiled --------------------------------------------------------------------------------------
# Ceilings are the counts of triton 3.7.1 rounded up to a multiple of 8; 255 is the hardware's.
_FWD_CEILING = {80: 240, 90: 255, 100: 192}
_LOGITS_CEILING = {80: 240, 90: 255, 100: 200}


def matmul_static_cases(kernel: str) -> list[StaticCase]:
    """Return the kernel `fwd` or `logits` for each GPU generation, with and without entropy and temperature."""
    return [
        _matmul_case(kernel, target, entropy, temperature)
        for target in MATMUL
        for entropy in (False, True)
        for temperature in (False, True)
    ]


def _matmul_case(kernel: str, target: int, entropy: bool, temperature: bool) -> StaticCase:
    b = MATMUL[target]

    def operand(rows: int, cols: int) -> str:
        return f"tensordesc<bf16[{rows}, {cols}]>" if b.use_tma else "*bf16"

    signature = {
        "x": operand(b.block_m, b.block_k), "w": operand(b.block_n, b.block_k), "targets_ptr": "*i64",
        "num_rows_ptr": "*i32", "max_ptr": "*fp32", "sum_ptr": "*fp32", "target_logit_ptr": "*fp32",
        "M": "i32", "V": "i32:16", "D": "i32:16", "stride_s": "i32:16",
    }  # fmt: skip
    optional = {"inverse_temperature_ptr": temperature, "weighted_ptr": entropy}
    signature |= {name: "*fp32" for name, is_given in optional.items() if is_given}
    if kernel == "logits":
        signature |= {
            "e": operand(b.block_m, b.block_n // (1 + b.persistent)),
            "stride_e_m": "i32:16",
        }
    else:
        signature |= {"tiles_per_split": "i32"}
    return StaticCase(
        kernel=f"head_{kernel}",
        function=_head_logits_kernel if kernel == "logits" else _head_fwd_kernel,
        signature=signature,
        constexprs={
            "USE_TMA": b.use_tma, "WITH_ENTROPY": entropy, "PRECISION": "tf32",
            "BLOCK_M": b.block_m, "BLOCK_N": b.block_n, "BLOCK_K": b.block_k,
        } | ({"PERSISTENT": b.persistent} if kernel == "logits" else {}) | {name: None for name, is_given in optional.items() if not is_given},
        num_warps=b.num_warps,
        num_stages=b.num_stages,
        targets=(target,),
        is_matmul=True,
        max_registers=_LOGITS_CEILING if kernel == "logits" else _FWD_CEILING,
    )  # fmt: skip


def row_static_cases() -> list[StaticCase]:
    """Return the merge and gradient kernels."""
    cases = []
    for entropy in (False, True):
        names = ["max_ptr", "sum_ptr", "weighted_ptr"]
        pointers = [prefix + name for prefix in ("", "row_") for name in names]
        is_none = [name for name in pointers if "weighted" in name and not entropy]
        cases.append(
            StaticCase(
                kernel="head_merge",
                function=_head_merge_kernel,
                signature={name: "*fp32" for name in pointers if name not in is_none}
                | {"S": "i32", "stride_s": "i32:16"},
                constexprs={name: None for name in is_none}
                | {"WITH_ENTROPY": entropy, "BLOCK_S": MERGE_SPLITS, "BLOCK_M": MERGE_ROWS},
                num_warps=MERGE_WARPS,
                max_registers={80: 56, 90: 56, 100: 56},
            )
        )
        optional = ["entropy_ptr", "shift_ptr"]
        pointers = ["tile_max_ptr", "max_ptr", "scale_ptr", "softmax_ptr", "at_target_ptr"]
        pointers += optional if entropy else []
        for targets, block_n in (((80,), MATMUL[80].block_n), ((90, 100), MATMUL[90].block_n)):
            cases.append(
                StaticCase(
                    kernel="head_gradient",
                    function=_head_gradient_kernel,
                    signature={"e_ptr": "*bf16", "targets_ptr": "*i64", "num_rows_ptr": "*i32"}
                    | {name: "*fp32" for name in pointers}
                    | {"M": "i32", "V": "i32:16", "stride_e_m": "i32:16", "stride_s": "i32:16"}
                    | {"tiles_per_program": "i32"},
                    constexprs={"BLOCK_M": GRADIENT_ROWS, "BLOCK_N": block_n}
                    | ({} if entropy else dict.fromkeys(optional)),
                    num_warps=GRADIENT_WARPS,
                    targets=targets,
                    max_registers={80: 48, 90: 80, 100: 80},
                )
            )
    return cases
