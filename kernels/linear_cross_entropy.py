"""Cross-entropy of a linear head, forward and backward in three GEMMs, without the full logits.

    ce = (1 - s) (lse - z[target]) + s (lse - mean z) + z_loss * lse^2        s = label_smoothing
    loss = sum over rows of row_weight * ce

The coefficient of a row's gradient is known as soon as its chunk's logit GEMM is done. So the forward computes dX and dW
from the same logits, and the backward only scales them. Ignored rows are dropped before the first GEMM.

Deterministic. Bound: compute, 6 * M * V * D FLOPs. Memory: chunk_bytes of logits, dW in fp32, dX.

Letters: M rows (tokens), D model width, V vocabulary (this rank's V/TP rows of it where a group is given).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from phimini.kernels.backend.launch import compute_dtype
from phimini.kernels.head.call import HeadCall, LossOptions, LossResult, head_loss
from phimini.kernels.head.chunked import RowGrads
from phimini.kernels.head.options import HeadKeywords
from phimini.kernels.head.rows import check_head


class CrossEntropyMetrics(NamedTuple):
    """Unweighted sums over the rows that count; scalars, detached."""

    nll_sum: Tensor
    """-log p of the target, without smoothing and z-loss."""
    accuracy_sum: Tensor
    """Rows whose target has the largest logit; a tie counts."""
    entropy_sum: Tensor
    num_rows: Tensor


# --- reference -----------------------------------------------------------------------------------
def linear_cross_entropy_reference(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    row_weight_M: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, CrossEntropyMetrics]:
    """The definition: full logits, plain torch, gradients by autograd."""
    dtype = compute_dtype(hidden_MD.dtype)
    counts_M = targets_M != ignore_index
    if row_weight_M is not None:
        counts_M = counts_M & (row_weight_M != 0)
    z_MV = hidden_MD[counts_M].to(dtype) @ weight_VD.to(dtype).T
    z_MV = z_MV / (
        temperature.to(dtype)[counts_M, None] if isinstance(temperature, Tensor) else temperature
    )
    target_M = z_MV.gather(1, targets_M[counts_M, None])[:, 0]
    lse_M = torch.logsumexp(z_MV, -1)
    smooth_M = lse_M - z_MV.mean(-1)
    ce_M = (
        (1 - label_smoothing) * (lse_M - target_M)
        + label_smoothing * smooth_M
        + z_loss * lse_M.square()
    )
    loss = ce_M.sum() if row_weight_M is None else (row_weight_M[counts_M].to(dtype) * ce_M).sum()
    with torch.no_grad():
        log_p_MV = torch.log_softmax(z_MV, -1)
        metrics = CrossEntropyMetrics(
            nll_sum=(lse_M - target_M).sum(),
            accuracy_sum=(target_M >= z_MV.amax(-1)).sum().to(dtype),
            entropy_sum=-(log_p_MV.exp() * log_p_MV).sum(),
            num_rows=counts_M.sum().to(dtype),
        )
    return loss, metrics


# --- forward with gradients ----------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(LossOptions):
    """Options of the loss, and its computation chunk by chunk."""

    op = "linear_cross_entropy"
    num_metrics = len(CrossEntropyMetrics._fields)

    label_smoothing: float
    z_loss: float

    def run(self, call: HeadCall, values: Sequence[Tensor | None]) -> LossResult:
        (row_weight_M,) = values
        smoothing, z_loss = self.label_smoothing, self.z_loss
        rows = call.counting_rows(row_weight_M)
        weight_M = rows.weights(row_weight_M, call.dtype)
        head = call.open(rows, with_entropy=self.with_entropy, with_mean_logit=smoothing != 0)
        sums_5, ones_M = weight_M.new_zeros(5), torch.ones_like(weight_M)
        for chunk in head.chunks:
            stats, w_M = head.forward(chunk), weight_M[chunk]
            nll_M = ce_M = -stats.logp_M
            dlogp_M, dlse_M, dmean_M = -w_M, None, None
            if stats.mean_logit_M is not None:
                smooth_M = stats.max_M + stats.log_sum_M - stats.mean_logit_M
                ce_M = (1 - smoothing) * nll_M + smoothing * smooth_M
                dlogp_M, dlse_M, dmean_M = (smoothing - 1) * w_M, smoothing * w_M, -smoothing * w_M
            if z_loss:
                lse_M = stats.max_M + stats.log_sum_M
                ce_M = ce_M + z_loss * lse_M.square()
                dz_M = 2 * z_loss * w_M * lse_M
                dlse_M = dz_M if dlse_M is None else dlse_M + dz_M
            if call.needs_gradient:
                head.backward(chunk, RowGrads(dlogp_M, dlse_M, mean_logit_M=dmean_M))
            entropy_M = torch.zeros_like(nll_M) if stats.entropy_M is None else stats.entropy_M
            is_top_M = stats.is_top_M.to(nll_M.dtype)
            values_5M = torch.stack([w_M * ce_M, nll_M, is_top_M, entropy_M, ones_M[chunk]])
            sums_5 += rows.sum(values_5M, chunk)
        return LossResult(sums_5[0].clone(), sums_5[1:].clone(), head.finish(), None)


# --- public op -----------------------------------------------------------------------------------
def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    row_weight_M: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    main_grad: Tensor | None = None,
    with_entropy: bool = True,
    **head: Unpack[HeadKeywords],
) -> tuple[Tensor, CrossEntropyMetrics]:
    """Return (sum over rows of row_weight * cross-entropy, metrics); fp32 scalars (fp64 for fp64 input).

    hidden_MD (M, D) and weight_VD (V, D) share a dtype; targets_M (M,) int64 in [0, V) or `ignore_index`.
    row_weight_M (M,): put normalisers here (1 / tokens of the global batch); rows of weight 0 are not computed.
    temperature: one number, or (M,), one per row (not differentiated).
    main_grad (V, D) fp32: dW is added to it during the forward and weight_VD gets no gradient. Then the loss
    must be backpropagated with gradient 1 (checked), once, and not recomputed by activation checkpointing.
    with_entropy: False saves work. The other arguments: `HeadKeywords`.
    Raises ValueError for shapes, dtypes, strides and targets that do not fit, and for a tensor that requires a gradient
    and gets none (all but hidden_MD and weight_VD).
    """
    options = CrossEntropy(
        label_smoothing=label_smoothing, z_loss=z_loss, with_entropy=with_entropy, **head
    )
    check_head(
        options, hidden_MD, weight_VD, targets_M, temperature, main_grad, {"row_weight_M": row_weight_M}
    )  # fmt: skip
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        if not 0 <= value <= 1:
            raise ValueError(f"{options.op}: {name} must be in [0, 1], got {value}")
    loss, metrics_4, _ = head_loss(
        options, hidden_MD, weight_VD, targets_M, [row_weight_M], temperature=temperature, main_grad=main_grad
    )  # fmt: skip
    return loss, CrossEntropyMetrics(*metrics_4.unbind())
