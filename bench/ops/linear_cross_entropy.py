"""Bench cases of the head's cross-entropy: timed, compiled and counted."""

import importlib
import importlib.util
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from phimini.bench.ops._head import (
    head_case,
    head_inputs,
    matmul_static_cases,
    row_static_cases,
    shapes,
)
from phimini.bench.ops.cases import StaticCase, TrafficCase, liger_is_installed
from phimini.bench.ops.harness import Case
from phimini.kernels import linear_cross_entropy
from phimini.kernels.head.chunked import LogitGrads
from phimini.kernels.head.rows import HeadRows
from phimini.kernels.head.triton_backend import TritonHead


# --- timed -----------------------------------------------------------------------------------------
def timed_cases(device: str, quick: bool) -> list[Case]:
    """Return the loss summed over rows; ours includes all its metrics, such as the entropy."""
    cases = []
    for shape in shapes(device, quick):
        targets = torch.randint(0, shape[2], shape[:1], device=device)

        def eager(hidden: Tensor, weight: Tensor, targets: Tensor = targets) -> Tensor:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            return F.cross_entropy((hidden @ weight.T).to(wide), targets, reduction="sum")

        def ours(hidden: Tensor, weight: Tensor, targets: Tensor = targets) -> Tensor:
            return linear_cross_entropy(hidden, weight, targets)[0]

        inputs = head_inputs(*shape, device)
        peers = _peers(targets, device)
        cases.append(
            head_case(
                "linear_cross_entropy", shape, inputs, eager, ours, ("fwd", "fwd+bwd"), **peers
            )
        )
    return cases


def _peers(targets: Tensor, device: str) -> dict:
    """Return the installed ones of torch's fused op, Liger, QuACK and Apple's CCE."""
    peers = {}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.11 has none
        peers["torch"] = lambda hidden, weight: F.linear_cross_entropy(
            hidden, weight, targets, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
        )
    if device != "cuda":
        return peers
    if liger_is_installed():
        liger = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        peers["liger"] = lambda hidden, weight: liger.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum"
        )[0]
    if importlib.util.find_spec("quack") is not None:
        quack = importlib.import_module("quack.linear_cross_entropy")
        peers["quack"] = lambda hidden, weight: quack.chunked_linear_cross_entropy(
            hidden, weight, targets, reduction="sum"
        )
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        cce = importlib.import_module("cut_cross_entropy")
        peers["cce"] = lambda hidden, weight: cce.linear_cross_entropy(
            hidden, weight, targets, reduction="sum"
        )
    return peers


# --- compiled --------------------------------------------------------------------------------------
def static_cases() -> list[StaticCase]:
    """Return the kernels that every loss uses: logits with statistics, merge, gradient."""
    return matmul_static_cases("logits") + row_static_cases()


def peer_static_cases() -> list[StaticCase]:
    """Return Liger 0.8.5's row kernel at V = 200,064 in bf16, as its launch code sets it on sm_80 and sm_90."""
    if not liger_is_installed():
        return []
    liger = importlib.import_module("liger_kernel.ops.cross_entropy")
    pointers = {"X_ptr": "*bf16", "Y_ptr": "*i64", "loss_ptr": "*fp32", "n_non_ignore": "i32"}
    sizes = {"X_stride": "i32:16", "n_cols": "i32:16", "ignore_index": "i32"}
    unused = ["weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "token_accuracy_stride", "softcap",
              "predicted_tokens_ptr", "predicted_tokens_stride"]  # fmt: skip
    return [
        StaticCase(
            kernel="head_gradient",
            provider="liger",
            function=liger.liger_cross_entropy_kernel,
            signature=pointers | sizes | {"sum_non_ignore_weight": "fp32", "weight_sum": "fp32"},
            constexprs=dict.fromkeys(unused)
            | {"Y_stride": 1, "loss_stride": 1, "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "sum"}
            | {"RETURN_Z_LOSS": False, "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False}
            | {"BLOCK_SIZE": 32768, "HAS_WEIGHT": False, "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True},
            num_warps=32,
            targets=(80, 90),
        )
    ]  # fmt: skip


# --- counted ---------------------------------------------------------------------------------------
def traffic_cases() -> list[TrafficCase]:
    """Return the row pass alone (one read and one write of the logits), and the whole op at Phi-4-Mini's V / D = 65."""
    cases = [_row_pass()]
    M, D, V = 256, 64, 4160
    hidden, weight = torch.randn(M, D).bfloat16(), torch.randn(V, D).bfloat16()
    targets = torch.randint(0, V, (M,))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    minimum = 2 * (M * D + V * D) * 2 + M * 12
    cases.append(
        TrafficCase(
            kernel="linear_cross_entropy",
            run=lambda: linear_cross_entropy(*leaves, targets, _backend="triton"),
            minimum_bytes=minimum,
        )
    )
    if liger_is_installed():
        fused = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        rows = importlib.import_module("liger_kernel.ops.cross_entropy")
        logits, classes = torch.randn(128, 16384).bfloat16(), torch.randint(0, 16384, (128,))
        cases += [
            TrafficCase(
                kernel="cross_entropy_row_pass",
                provider="liger",
                run=lambda: rows.cross_entropy_forward(
                    logits.detach().requires_grad_(),
                    classes,
                    None,
                    -100,
                    0.0,
                    0.0,
                    "sum",
                    None,
                    False,
                ),
                minimum_bytes=2 * logits.numel() * 2,
            ),
            TrafficCase(
                kernel="linear_cross_entropy",
                provider="liger",
                run=lambda: _liger_as_on_cuda(fused, hidden, weight, targets),
                minimum_bytes=minimum,
            ),
        ]
    return cases


class _OnCuda(Tensor):
    """A CPU tensor that Liger takes for one on a GPU."""

    device = property(lambda _: torch.device("cuda"))  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def _liger_as_on_cuda(fused, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Run Liger with the branches of a GPU: on a CPU it makes a copy of dW in fp32 for every chunk."""
    with (
        torch.no_grad(),
        patch.object(fused, "_can_use_mm_out", lambda *_: True),
        patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
    ):
        fused.fused_linear_cross_entropy_forward(
            hidden, weight.as_subclass(_OnCuda), targets, reduction="sum"
        )


def _row_pass() -> TrafficCase:
    M, D, V = 128, 8, 16384
    hidden, weight = torch.randn(M, D).bfloat16(), torch.randn(V, D).bfloat16()
    rows = HeadRows(x_MD=hidden, targets_M=torch.randint(0, V, (M,)), kept_M=None, num_total=M)
    head = TritonHead(rows, weight, M, needs_dx=True, with_entropy=False)
    chunk = slice(0, M)
    head.forward(chunk)
    stats_KM = torch.empty(3, M)
    ones_M = torch.ones(M)
    grads = LogitGrads(ones_M, ones_M, -ones_M, None, None)
    return TrafficCase(
        kernel="cross_entropy_row_pass",
        run=lambda: (head.merge(stats_KM), head.row_pass(chunk, grads)),
        minimum_bytes=2 * M * V * 2,
    )
