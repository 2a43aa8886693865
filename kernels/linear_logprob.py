"""Log-probability, entropy and log-sum-exp of a linear head's targets, without the logits.

    z = hidden W^T / temperature    lse = log sum exp z    logp = z[target] - lse    entropy = lse - sum p z

Forward: one GEMM, chunk by chunk (CPU) or tile by tile (CUDA: logits never leave the chip). The backward takes any
gradients of logp, entropy and lse. It costs three more GEMMs: the logits again, dX and dW. The losses
`linear_cross_entropy`, `linear_dpo` and `linear_policy_loss` are cheaper, with three GEMMs in all.

Deterministic. Bound: compute, 2 * M * V * D FLOPs forward, 6 * M * V * D backward.

Letters: M rows (tokens), D model width, V vocabulary (this rank's V/TP rows of it where a group is given).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from phimini.kernels.backend.launch import compute_dtype
from phimini.kernels.head.call import HeadCall, HeadOp, compute
from phimini.kernels.head.chunked import RowGrads
from phimini.kernels.head.options import HeadKeywords
from phimini.kernels.head.rows import HeadRows, check_head


class LinearLogprob(NamedTuple):
    """Log-probs, entropies and log-sum-exps, (M,) each, fp32 (fp64 for fp64 input); 0 for ignored rows."""

    logp_M: Tensor
    entropy_M: Tensor
    lse_M: Tensor


# --- reference -----------------------------------------------------------------------------------
def linear_logprob_reference(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> LinearLogprob:
    """The definition: full logits, plain torch, gradients by autograd."""
    dtype = compute_dtype(hidden_MD.dtype)
    z_MV = hidden_MD.to(dtype) @ weight_VD.to(dtype).T
    z_MV = z_MV / (
        temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature
    )
    counts_M = targets_M != ignore_index
    log_p_MV = torch.log_softmax(z_MV, -1)
    logp_M = log_p_MV.gather(1, targets_M.where(counts_M, 0)[:, None])[:, 0]
    entropy_M = -(log_p_MV.exp() * log_p_MV).sum(-1)
    lse_M = torch.logsumexp(z_MV, -1)
    return LinearLogprob(*(value_M.where(counts_M, 0) for value_M in (logp_M, entropy_M, lse_M)))


# --- autograd ------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Logprob(HeadOp):
    """Options of the op, and its computation, forward and backward."""

    op = "linear_logprob"

    def run(self, call: HeadCall, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return (logp, entropy, lse); with `values`, the gradients of the three, return (dX,)."""
        rows = call.counting_rows(None)
        return self._backward(call, rows, *values) if values else self._forward(call, rows)

    def _forward(self, call: HeadCall, rows: HeadRows) -> tuple[Tensor, ...]:
        head = call.open(rows, with_entropy=self.with_entropy)
        logp_M, entropy_M, lse_M = (
            torch.zeros_like(rows.targets_M, dtype=call.dtype) for _ in range(3)
        )
        for chunk in head.chunks:
            stats = head.forward(chunk)
            logp_M[chunk], lse_M[chunk] = stats.logp_M, stats.max_M + stats.log_sum_M
            if stats.entropy_M is not None:
                entropy_M[chunk] = stats.entropy_M
        return rows.expand(logp_M), rows.expand(entropy_M), rows.expand(lse_M)

    def _backward(
        self, call: HeadCall, rows: HeadRows, dlogp: Tensor | None, dentropy: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None]:  # fmt: skip
        head = call.open(rows, entropy_gradient=dentropy is not None)
        dlogp_M, dlse_M, dentropy_M = (rows.select(d, call.dtype) for d in (dlogp, dlse, dentropy))
        if dlogp_M is None:
            dlogp_M = torch.zeros_like(rows.targets_M, dtype=call.dtype)
        for chunk in head.chunks:
            head.forward(chunk)
            grads = (None if d_M is None else d_M[chunk] for d_M in (dlse_M, dentropy_M))
            head.backward(chunk, RowGrads(dlogp_M[chunk], *grads))
        return (head.finish(),)

    def fake(
        self, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, num_values: int, needs_dx: bool
    ) -> list[Tensor]:  # fmt: skip
        if num_values:
            return [hidden_MD.new_empty(hidden_MD.shape if needs_dx else 0)]
        wide = compute_dtype(weight_VD.dtype)
        return [targets_M.new_empty(targets_M.shape, dtype=wide) for _ in range(3)]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, options: Logprob, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float | Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        is_row_wise = isinstance(temperature, Tensor)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.temperature = options, None if is_row_wise else temperature
        ctx.save_for_backward(hidden_MD, weight_VD, targets_M, temperature if is_row_wise else None)
        logp_M, entropy_M, lse_M, _dw_VD = compute(
            options, hidden_MD, weight_VD, targets_M, temperature, [], False, False
        )  # fmt: skip
        assert logp_M is not None and entropy_M is not None and lse_M is not None, "all are given"
        if not options.with_entropy:
            ctx.mark_non_differentiable(entropy_M)
        return logp_M, entropy_M, lse_M

    @staticmethod
    def backward(ctx, dlogp: Tensor | None, dentropy: Tensor | None, dlse: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logprob has no second derivative")
        hidden_MD, weight_VD, targets_M, temperature_M = ctx.saved_tensors
        temperature = ctx.temperature if temperature_M is None else temperature_M
        needs_dx, needs_dw = ctx.needs_input_grad[1:3]
        dx_MD, dw_VD = compute(
            ctx.options, hidden_MD, weight_VD, targets_M, temperature, [dlogp, dentropy, dlse], needs_dx, needs_dw
        )  # fmt: skip
        if dw_VD is not None:
            dw_VD = dw_VD.to(weight_VD.dtype)
        return None, dx_MD if needs_dx else None, dw_VD if needs_dw else None, None, None


# --- public op -----------------------------------------------------------------------------------
def linear_logprob(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = True,
    **head: Unpack[HeadKeywords],
) -> LinearLogprob:
    """Return logp, entropy and lse of each row's target, fp32; differentiable in all three; ignored rows give 0.

    hidden_MD (M, D) and weight_VD (V, D) share a dtype; targets_M (M,) int64 in [0, V) or `ignore_index`.
    temperature: one number, or (M,), one per row (not differentiated).
    with_entropy: False saves work; entropy_M is then 0. The other arguments: `HeadKeywords`.
    Raises ValueError for shapes, dtypes, strides and targets that do not fit, and for a temperature that requires a
    gradient.
    """
    options = Logprob(with_entropy=with_entropy, **head)
    check_head(options, hidden_MD, weight_VD, targets_M, temperature)
    outputs = _LinearLogprob.apply(options, hidden_MD, weight_VD, targets_M, temperature)
    return LinearLogprob(*outputs)  # pyright: ignore[reportGeneralTypeIssues]
