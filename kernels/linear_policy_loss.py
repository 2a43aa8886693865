"""Policy-gradient loss (PPO, GRPO, DAPO) of a linear head, forward and backward in three GEMMs.

    r = exp(logp - old_logp)
    pg = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) * importance_weight
    loss = sum over rows of row_weight * (pg + kl_coef * KL - entropy_coef * H)

Variants of pg, before the importance weight; those of r and of the limits combine:
    dual_clip c    where A < 0: -max(min(...), c A), so that a large r of a bad answer is bounded (arXiv 1912.09729)
    cispo          -stop_gradient(clip(r, ...)) A logp: every token keeps a gradient (MiniMax-M1, arXiv 2506.13585)
    GSPO           r is one number per sequence, exp(mean over its tokens of logp - old_logp), given as
                   sequence_log_ratio_M; a token's derivative by its logp is that of a factor r (arXiv 2507.18071, eq. 14)

KL to a reference, with d = logp - reference_logp, per sampled token (Schulman, "Approximating KL divergence"):
    k1 = d               unbiased value; as a loss its gradient has mean zero on-policy and only adds noise
    k2 = d^2 / 2         biased value; its gradient is, on-policy, the gradient of the reverse KL
    k3 = e^-d + d - 1    unbiased value, never negative; its gradient is biased (TRL, GRPO paper)
kl_gradient "estimator" differentiates the formula as written; "reverse" keeps the value and takes the gradient
d * dlogp of the reverse KL (verl's "k1+", "k3+"). Use it where the KL is meant as a penalty.

A row's coefficient depends on that row's statistics only. They are known once its chunk's logit GEMM is done, so dX and
dW come from the same logits. Normalisers go into row_weight: 1 / tokens of the global batch (DAPO), or
1 / (sequences * tokens of its sequence) (GRPO). Exponents are clamped at 20 (e^20 = 4.9e8) to avoid infinities.

Deterministic. Bound: compute, 6 * M * V * D FLOPs. Letters: M rows, D model width, V vocabulary (or this rank's V/TP).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from phimini.kernels.backend.launch import compute_dtype
from phimini.kernels.head.call import HeadCall, LossOptions, LossResult, head_loss
from phimini.kernels.head.chunked import RowGrads, RowStats
from phimini.kernels.head.options import HeadKeywords
from phimini.kernels.head.rows import check_head, check_tensor
from phimini.kernels.linear_logprob import linear_logprob_reference

MAX_EXPONENT = 20.0


class PolicyMetrics(NamedTuple):
    """Unweighted sums over the rows that count, scalars, and the log-probs, (M,); detached."""

    policy_loss_sum: Tensor
    """The clipped term alone, importance weight included."""
    kl_sum: Tensor
    """The chosen estimator; 0 without reference_logp_M."""
    entropy_sum: Tensor
    ratio_sum: Tensor
    clipped_sum: Tensor
    """Rows where a limit holds: no gradient of the policy term or, in CISPO, a bounded factor."""
    logp_diff_sum: Tensor
    """logp - old_logp. Its negative is the k1 estimate of KL(old, new)."""
    logp_sum: Tensor
    accuracy_sum: Tensor
    num_rows: Tensor
    logp_M: Tensor
    """Log-prob of each row's target, as a recomputation of old_logp_M would give it; 0 for ignored rows."""


# --- reference -----------------------------------------------------------------------------------
def linear_policy_loss_reference(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    *,
    row_weight_M: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    reference_logp_M: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k3",
    kl_gradient: Literal["estimator", "reverse"] = "estimator",
    entropy_coef: float = 0.0,
    importance_weight_M: Tensor | None = None,
    objective: Literal["clip", "cispo"] = "clip",
    dual_clip: float | None = None,
    sequence_log_ratio_M: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, PolicyMetrics]:
    """The definition: full log-softmax, plain torch, gradients by autograd."""
    dtype = compute_dtype(hidden_MD.dtype)
    counts_M = targets_M != ignore_index
    if row_weight_M is not None:
        counts_M = counts_M & (row_weight_M != 0)
    logp_M, entropy_M, _ = linear_logprob_reference(
        hidden_MD, weight_VD, targets_M, temperature=temperature, ignore_index=ignore_index
    )
    log_ratio_M = logp_M - old_logp_M.to(dtype)
    if sequence_log_ratio_M is not None:  # its value, and a token's own derivative
        log_ratio_M = sequence_log_ratio_M.to(dtype) + logp_M - logp_M.detach()
    ratio_M = log_ratio_M.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    advantage_M = advantage_M.to(dtype)
    unclipped_M = ratio_M * advantage_M
    bounded_M = ratio_M.clamp(1 - clip_low, 1 + clip_high)
    objective_M = torch.minimum(unclipped_M, bounded_M * advantage_M)
    if dual_clip is not None:
        objective_M = objective_M.maximum(dual_clip * advantage_M).where(
            advantage_M < 0, objective_M
        )
    is_limited_M = objective_M != unclipped_M
    if objective == "cispo":
        objective_M = bounded_M.detach() * advantage_M * logp_M
        is_limited_M = bounded_M != ratio_M
    policy_M = -objective_M
    if importance_weight_M is not None:
        policy_M = policy_M * importance_weight_M.to(dtype)
    kl_M = torch.zeros_like(logp_M)
    if reference_logp_M is not None:
        d_M = (logp_M - reference_logp_M.to(dtype)).clamp(-MAX_EXPONENT, MAX_EXPONENT)
        kl_M = {"k1": d_M, "k2": d_M.square() / 2, "k3": (-d_M).exp() + d_M - 1}[kl]
        if kl_gradient == "reverse":
            kl_M = kl_M.detach() + d_M.square() / 2 - (d_M.square() / 2).detach()
    loss_M = policy_M + kl_coef * kl_M - entropy_coef * entropy_M
    if row_weight_M is not None:
        loss_M = loss_M * row_weight_M.to(dtype)
    with torch.no_grad():
        z_MV = hidden_MD.to(dtype) @ weight_VD.to(dtype).T
        is_top_M = z_MV.gather(1, targets_M.where(counts_M, 0)[:, None])[:, 0] >= z_MV.amax(-1)
        rows = (policy_M, kl_M, entropy_M, ratio_M, is_limited_M.to(dtype), logp_M - old_logp_M.to(dtype),
                logp_M, is_top_M.to(dtype), torch.ones_like(logp_M))  # fmt: skip
        sums = (value_M.where(counts_M, 0).sum() for value_M in rows)
        metrics = PolicyMetrics(*sums, logp_M=logp_M.where(counts_M, 0))
    return loss_M.where(counts_M, 0).sum(), metrics


# --- the coefficient of a row ---------------------------------------------------------------------
class _RowInputs(NamedTuple):
    weight_M: Tensor
    old_logp_M: Tensor
    advantage_M: Tensor
    reference_logp_M: Tensor | None
    importance_weight_M: Tensor | None
    sequence_log_ratio_M: Tensor | None


def _clamped(d_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return d within +-20, and its derivative: 1 inside, 0 outside."""
    clamped_M = d_M.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return clamped_M, (clamped_M == d_M).to(d_M.dtype)


def _policy_rows(
    stats: RowStats, inputs: _RowInputs, options: "PolicyLoss"
) -> tuple[Tensor, RowGrads]:
    """Return (10, M), the weighted loss and then the metrics, and the gradients of the weighted loss."""
    difference_M = stats.logp_M - inputs.old_logp_M
    ratio_M, policy_M, dlogp_M, is_limited_M = _policy_term(difference_M, stats, inputs, options)
    if inputs.importance_weight_M is not None:
        policy_M, dlogp_M = (
            policy_M * inputs.importance_weight_M,
            dlogp_M * inputs.importance_weight_M,
        )
    loss_M, kl_M = policy_M, torch.zeros_like(policy_M)
    if inputs.reference_logp_M is not None:
        d_M, inside_M = _clamped(stats.logp_M - inputs.reference_logp_M)
        kl_M = _kl_value(d_M, options.kl)
        dkl_M = _kl_derivative(d_M, "k2" if options.kl_gradient == "reverse" else options.kl)
        loss_M = loss_M + options.kl_coef * kl_M
        dlogp_M = dlogp_M + options.kl_coef * dkl_M * inside_M
    entropy_M, dentropy_M = (
        torch.zeros_like(policy_M) if stats.entropy_M is None else stats.entropy_M,
        None,
    )
    if options.entropy_coef:
        loss_M, dentropy_M = (
            loss_M - options.entropy_coef * entropy_M,
            -options.entropy_coef * inputs.weight_M,
        )
    values_10M = torch.stack(
        [loss_M * inputs.weight_M, policy_M, kl_M, entropy_M, ratio_M, is_limited_M, difference_M, stats.logp_M,
         stats.is_top_M.to(policy_M.dtype), torch.ones_like(policy_M)]
    )  # fmt: skip
    return values_10M, RowGrads(dlogp_M * inputs.weight_M, entropy_M=dentropy_M)


def _policy_term(
    difference_M: Tensor, stats: RowStats, inputs: _RowInputs, options: "PolicyLoss"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the ratio, the policy term, its derivative by logp, and 1 where a limit holds; (M,) each."""
    if inputs.sequence_log_ratio_M is not None:
        difference_M = inputs.sequence_log_ratio_M.to(stats.logp_M.dtype)
    log_ratio_M, inside_M = _clamped(difference_M)
    ratio_M, advantage_M = log_ratio_M.exp(), inputs.advantage_M
    bounded_M = ratio_M.clamp(1 - options.clip_low, 1 + options.clip_high)
    if options.objective == "cispo":
        dlogp_M = -bounded_M * advantage_M
        return ratio_M, dlogp_M * stats.logp_M, dlogp_M, (bounded_M != ratio_M).to(ratio_M.dtype)
    unclipped_M = ratio_M * advantage_M
    objective_M = torch.minimum(unclipped_M, bounded_M * advantage_M)
    if options.dual_clip is not None:
        least_M = (options.dual_clip * advantage_M).where(advantage_M < 0, -math.inf)
        objective_M = torch.maximum(objective_M, least_M)
    is_limited_M = (objective_M != unclipped_M).to(ratio_M.dtype)
    return ratio_M, -objective_M, -unclipped_M * inside_M * (1 - is_limited_M), is_limited_M


def _kl_value(d_M: Tensor, kl: str) -> Tensor:
    if kl == "k1":
        return d_M
    return d_M.square() / 2 if kl == "k2" else torch.expm1(-d_M) + d_M


def _kl_derivative(d_M: Tensor, kl: str) -> Tensor:
    if kl == "k1":
        return torch.ones_like(d_M)
    return d_M if kl == "k2" else -torch.expm1(-d_M)


# --- forward with gradients ----------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class PolicyLoss(LossOptions):
    """Options of the loss, and its computation chunk by chunk."""

    op = "linear_policy_loss"
    num_metrics = len(PolicyMetrics._fields) - 1
    gives_logp = True

    clip_low: float
    clip_high: float
    kl_coef: float
    kl: Literal["k1", "k2", "k3"]
    kl_gradient: Literal["estimator", "reverse"]
    entropy_coef: float
    objective: Literal["clip", "cispo"]
    dual_clip: float | None

    def run(self, call: HeadCall, values: Sequence[Tensor | None]) -> LossResult:
        """`values`: the fields of `_RowInputs`, in order, of all rows."""
        row_weight_M = values[0]
        rows = call.counting_rows(row_weight_M)
        inputs = [rows.weights(row_weight_M, call.dtype)]
        inputs += [rows.select(value_M, call.dtype) for value_M in values[1:]]
        head = call.open(
            rows,
            with_entropy=self.with_entropy or self.entropy_coef != 0,
            entropy_gradient=self.entropy_coef != 0 and call.needs_gradient,
        )
        sums_10 = torch.zeros(10, dtype=call.dtype, device=call.weight_VD.device)
        logp_M = torch.zeros_like(rows.targets_M, dtype=call.dtype)
        for chunk in head.chunks:
            stats = head.forward(chunk)
            of_chunk = (None if value_M is None else value_M[chunk] for value_M in inputs)
            values_10M, grads = _policy_rows(stats, _RowInputs(*of_chunk), self)  # pyright: ignore[reportArgumentType]
            if call.needs_gradient:
                head.backward(chunk, grads)
            sums_10 += rows.sum(values_10M, chunk)
            logp_M[chunk] = stats.logp_M
        if rows.active_M is not None:
            logp_M = logp_M.where(rows.active_M, 0)
        return LossResult(
            sums_10[0].clone(), sums_10[1:].clone(), head.finish(), rows.expand(logp_M)
        )


# --- public op -----------------------------------------------------------------------------------
def linear_policy_loss(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    *,
    row_weight_M: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    reference_logp_M: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k3",
    kl_gradient: Literal["estimator", "reverse"] = "estimator",
    entropy_coef: float = 0.0,
    importance_weight_M: Tensor | None = None,
    objective: Literal["clip", "cispo"] = "clip",
    dual_clip: float | None = None,
    sequence_log_ratio_M: Tensor | None = None,
    main_grad: Tensor | None = None,
    with_entropy: bool = True,
    **head: Unpack[HeadKeywords],
) -> tuple[Tensor, PolicyMetrics]:
    """Return (sum over rows of row_weight * token loss, metrics); fp32 scalars (fp64 for fp64 input).

    old_logp_M, advantage_M, reference_logp_M, importance_weight_M, sequence_log_ratio_M: (M,), one per row, constants of
    the loss.
    importance_weight_M: min(exp(trainer's old_logp - rollout engine's logp), cap); multiplies the policy term only.
    objective, dual_clip, sequence_log_ratio_M: the variants CISPO, dual clip and GSPO of the file's docstring.
    The other arguments, and the errors raised: as in `linear_cross_entropy`.
    """
    options = PolicyLoss(
        clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef, kl=kl, kl_gradient=kl_gradient,
        entropy_coef=entropy_coef, objective=objective, dual_clip=dual_clip, with_entropy=with_entropy, **head,
    )  # fmt: skip
    op = options.op
    row_values = {
        "row_weight_M": row_weight_M, "old_logp_M": old_logp_M, "advantage_M": advantage_M,
        "reference_logp_M": reference_logp_M, "importance_weight_M": importance_weight_M,
        "sequence_log_ratio_M": sequence_log_ratio_M,
    }  # fmt: skip
    check_head(options, hidden_MD, weight_VD, targets_M, temperature, main_grad, row_values)
    for name in ("old_logp_M", "advantage_M"):
        check_tensor(op, name, row_values[name], weight_VD.device)
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            f"{op}: expected clip_low in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}"
        )
    if kl not in ("k1", "k2", "k3") or kl_gradient not in ("estimator", "reverse"):
        raise ValueError(
            f"{op}: expected kl in k1, k2, k3 and kl_gradient in estimator, reverse, got {kl!r} and {kl_gradient!r}"
        )
    if not (abs(kl_coef) < math.inf and abs(entropy_coef) < math.inf):
        raise ValueError(
            f"{op}: kl_coef and entropy_coef must be finite, got {kl_coef} and {entropy_coef}"
        )
    if objective not in ("clip", "cispo"):
        raise ValueError(f"{op}: expected objective in clip, cispo, got {objective!r}")
    if dual_clip is not None and (objective == "cispo" or not 1 < dual_clip < math.inf):
        raise ValueError(
            f"{op}: expected dual_clip above 1, with objective clip, got {dual_clip} with {objective}"
        )
    if kl_coef and reference_logp_M is None:
        raise ValueError(f"{op}: kl_coef {kl_coef} needs reference_logp_M, got None")
    loss, metrics_9, logp_M = head_loss(
        options, hidden_MD, weight_VD, targets_M, list(row_values.values()), temperature=temperature,
        main_grad=main_grad,
    )  # fmt: skip
    assert logp_M is not None, "gives_logp"
    return loss, PolicyMetrics(*metrics_9.unbind(), logp_M=logp_M)
