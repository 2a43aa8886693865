"""Cross-entropy of a linear head, forward and backward in three GEMMs, without the full logits.

    ce = (1 - s) (lse - z[target]) + s (lse - mean z) + z_loss * lse^2        s = label_smoothing
    loss = sum over rows of row_weight * ce

The coefficient of a row's gradient is known as soon as its chunk's logit GEMM is done, so dX and dW are made
there and then out of the same logits; the backward only scales them. Rows that do not count are dropped first.

Deterministic. Bound: compute, 6 * M * V * D FLOPs. Memory: chunk_bytes of logits, dW in fp32, dX.

Letters: M rows (tokens), D model width, V vocabulary (this rank's V/TP rows of it where a group is given).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels._launch import Backend, compute_dtype
from phimini.kernels.head.chunked import RowGrads
from phimini.kernels.head.custom_op import HeadLoss, LossCall, LossResult
from phimini.kernels.head.rows import check_head, check_main_grad, check_rows


class CrossEntropyMetrics(NamedTuple):
    """Sums over the rows that count, without their weights; scalars, detached."""

    nll_sum: Tensor
    """-log p of the target: no smoothing, no z-loss"""
    accuracy_sum: Tensor
    """rows where no class has a larger logit than the target"""
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


# --- forward with gradients, custom op ------------------------------------------------------------
def _run(call: LossCall) -> LossResult:
    (row_weight_M,) = call.row_values
    smoothing, z_loss, with_entropy = call.numbers
    rows = call.counting_rows(row_weight_M)
    weight_M = rows.weights(row_weight_M, call.dtype)
    head = call.open_for_loss(rows, with_entropy=with_entropy != 0, with_mean_logit=smoothing != 0)
    sums_5 = weight_M.new_zeros(5)
    for chunk in call.chunks(rows, call.needs_gradient):
        stats, w_M = head.forward(chunk), weight_M[chunk]
        nll_M = ce_M = -stats.logp_M
        dlogp_M, dlse_M, dmean_M = -w_M, None, None
        if stats.mean_logit_M is not None:
            ce_M = (1 - smoothing) * nll_M + smoothing * (stats.lse_M - stats.mean_logit_M)
            dlogp_M, dlse_M, dmean_M = (smoothing - 1) * w_M, smoothing * w_M, -smoothing * w_M
        if z_loss:
            ce_M = ce_M + z_loss * stats.lse_M.square()
            dz_M = 2 * z_loss * w_M * stats.lse_M
            dlse_M = dz_M if dlse_M is None else dlse_M + dz_M
        if call.needs_gradient:
            head.backward(chunk, RowGrads(dlogp_M, dlse_M, mean_logit_M=dmean_M))
        entropy_M = torch.zeros_like(nll_M) if stats.entropy_M is None else stats.entropy_M
        values = [
            w_M * ce_M,
            nll_M,
            stats.is_top_M.to(nll_M.dtype),
            entropy_M,
            torch.ones_like(nll_M),
        ]
        sums_5 += rows.sum(torch.stack(values), chunk)
    return LossResult(
        sums_5[0].clone(), sums_5[1:].clone(), call.close(head, rows), sums_5.new_empty(0)
    )


_cross_entropy = HeadLoss("linear_cross_entropy", len(CrossEntropyMetrics._fields), _run)


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
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    main_grad: Tensor | None = None,
    with_entropy: bool = True,
    chunk_bytes: int | None = None,
    max_rows: int | None = None,
    _backend: Backend | None = None,
) -> tuple[Tensor, CrossEntropyMetrics]:
    """(sum over rows of row_weight * cross-entropy, metrics); fp32 scalars (fp64 for fp64 input).

    hidden_MD (M, D) and weight_VD (V, D) share a dtype; targets_M (M,) int64 in [0, V) or `ignore_index`.
    row_weight_M (M,): put normalisers here (1 / tokens of the global batch); rows of weight 0 are not computed.
    main_grad (V, D) fp32: dW is added to it during the forward and weight_VD gets no gradient. Then the loss
    must be backpropagated with gradient 1 (checked), once, and not recomputed by activation checkpointing.
    temperature, group, sequence_parallel, chunk_bytes, max_rows: as in `linear_logprob`. with_entropy: False saves work.
    Raises ValueError for shapes, dtypes, strides and targets that do not fit.
    """
    op = "linear_cross_entropy"
    check_head(
        op,
        hidden_MD,
        weight_VD,
        targets_M,
        temperature,
        group,
        sequence_parallel,
        chunk_bytes,
        max_rows,
        ignore_index,
    )
    check_rows(op, "row_weight_M", row_weight_M, targets_M.shape[0], weight_VD.device)
    check_main_grad(op, main_grad, weight_VD)
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")
    loss, metrics_4, _ = _cross_entropy(
        hidden_MD, weight_VD, targets_M, row_values=[row_weight_M],
        numbers=[label_smoothing, z_loss, float(with_entropy)], words="",
        temperature=temperature, ignore_index=ignore_index, group=group, sequence_parallel=sequence_parallel,
        main_grad=main_grad, chunk_bytes=chunk_bytes, max_rows=max_rows, backend=_backend,
    )  # fmt: skip
    return loss, CrossEntropyMetrics(*metrics_4.unbind())
