"""Log-probability, entropy and log-sum-exp of a linear head's targets, without the logits.

    z = hidden W^T / temperature    lse = log sum exp z    logp = z[target] - lse    entropy = lse - sum p z

Forward: one GEMM, chunk by chunk (CPU) or tile by tile (CUDA: logits never leave the chip). Gradients with
respect to logp, entropy and lse, whatever they are used for, cost three more GEMMs: the logits once again, dX and dW.
A loss that is known here is cheaper in `linear_cross_entropy`, `linear_dpo`, `linear_policy_loss`: three in all.

Deterministic. Bound: compute, 2 * M * V * D FLOPs forward, 6 * M * V * D backward.

Letters: M rows (tokens), D model width, V vocabulary (this rank's V/TP rows of it where a group is given).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels._launch import Backend, compute_dtype
from phimini.kernels.head.call import HeadCall, name_of
from phimini.kernels.head.chunked import RowGrads
from phimini.kernels.head.rows import check_head


class LinearLogprob(NamedTuple):
    """fp32 (fp64 for fp64 input), (M,) each; ignored rows are 0."""

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
    """The definition: full logits, plain torch."""
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


# --- custom op + autograd ------------------------------------------------------------------------
def _call(hidden, weight, targets, temperature_M, temperature, ignore_index, group_name, sequence_parallel,
          chunk_bytes, max_rows, backend) -> HeadCall:  # fmt: skip
    return HeadCall(
        op="linear_logprob", hidden_MD=hidden, weight_VD=weight, targets_M=targets, temperature_M=temperature_M,
        temperature=temperature, ignore_index=ignore_index, group_name=group_name,
        sequence_parallel=sequence_parallel, chunk_bytes=chunk_bytes, max_rows=max_rows,
        backend=backend,
    )  # fmt: skip


@torch.library.custom_op("phimini::linear_logprob", mutates_args=())
def _logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature_M: Tensor | None, temperature: float,
    ignore_index: int, group_name: str, sequence_parallel: bool, chunk_bytes: int, max_rows: int, backend: str,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(hidden, weight, targets, temperature_M, temperature, ignore_index, group_name, sequence_parallel,
                 chunk_bytes, max_rows, backend)  # fmt: skip
    rows = call.counting_rows(None)
    head = call.open(rows, with_entropy=with_entropy)
    logp_M, entropy_M, lse_M = (
        torch.zeros_like(rows.targets_M, dtype=call.dtype) for _ in range(3)
    )
    with call.without_autocast():
        for chunk in call.chunks(rows, with_gradient=False):
            stats = head.forward(chunk)
            logp_M[chunk], lse_M[chunk] = stats.logp_M, stats.lse_M
            if stats.entropy_M is not None:
                entropy_M[chunk] = stats.entropy_M
    return rows.expand(logp_M), rows.expand(entropy_M), rows.expand(lse_M)


@_logprob.register_fake
def _(hidden, weight, targets, *_) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy, lse = (
        targets.new_empty(targets.shape, dtype=compute_dtype(weight.dtype)) for _ in range(3)
    )
    return logp, entropy, lse


@torch.library.custom_op("phimini::linear_logprob_bwd", mutates_args=())
def _logprob_bwd(
    dlogp: Tensor | None, dentropy: Tensor | None, dlse: Tensor | None, hidden: Tensor, weight: Tensor,
    targets: Tensor, temperature_M: Tensor | None, temperature: float, ignore_index: int, group_name: str,
    sequence_parallel: bool, chunk_bytes: int, max_rows: int, backend: str, needs_dx: bool, needs_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _call(hidden, weight, targets, temperature_M, temperature, ignore_index, group_name, sequence_parallel,
                 chunk_bytes, max_rows, backend)  # fmt: skip
    rows = call.counting_rows(None)
    dw_VD = call.new_weight_gradient(needs_dw)
    head = call.open(rows, needs_dx=needs_dx, dw_VD=dw_VD, entropy_gradient=dentropy is not None)
    dlogp_M, dlse_M, dentropy_M = (rows.select(d, call.dtype) for d in (dlogp, dlse, dentropy))
    if dlogp_M is None:
        dlogp_M = torch.zeros_like(rows.targets_M, dtype=call.dtype)
    with call.without_autocast():
        for chunk in call.chunks(rows, with_gradient=True):
            head.forward(chunk)
            grads = (None if d_M is None else d_M[chunk] for d_M in (dlse_M, dentropy_M))
            head.backward(chunk, RowGrads(dlogp_M[chunk], *grads))
    return call.close(head, rows), weight.new_empty(0) if dw_VD is None else dw_VD.to(weight.dtype)


@_logprob_bwd.register_fake
def _(dlogp, dentropy, dlse, hidden, weight, targets, temperature_M, temperature, ignore_index, group_name,
      sequence_parallel, chunk_bytes, max_rows, backend, needs_dx, needs_dw):  # fmt: skip
    return hidden.new_empty(hidden.shape if needs_dx else 0), weight.new_empty(
        weight.shape if needs_dw else 0
    )


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    if not inputs[-1]:  # with_entropy
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers, ctx.num_inputs = inputs[4:11], len(inputs)


def _backward(ctx, dlogp: Tensor | None, dentropy: Tensor | None, dlse: Tensor | None):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_logprob has no second derivative")
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    dx, dw = _logprob_bwd(
        dlogp, dentropy, dlse, *ctx.saved_tensors, *ctx.numbers, needs_dx, needs_dw
    )
    return dx if needs_dx else None, dw if needs_dw else None, *(None,) * (ctx.num_inputs - 2)


_logprob.register_autograd(_backward, setup_context=_setup)


# --- public op -----------------------------------------------------------------------------------
def linear_logprob(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    with_entropy: bool = True,
    chunk_bytes: int | None = None,
    max_rows: int | None = None,
    _backend: Backend | None = None,
) -> LinearLogprob:
    """logp, entropy and lse of each row's target, fp32; differentiable in all three; ignored rows give 0.

    hidden_MD (M, D) and weight_VD (V, D) share a dtype; targets_M (M,) int64 in [0, V) or `ignore_index`.
    temperature: one number, or one per row (not differentiated).
    group: weight_VD is this rank's V/TP rows of the vocabulary, targets stay global, hidden is the same on all
    ranks; its gradient is summed over them. sequence_parallel: hidden_MD is instead this rank's M/TP rows.
    with_entropy: False saves work; entropy_M is then 0. chunk_bytes: logits held at a time.
    max_rows: on a GPU, how many rows count at most, if the host knows; the others are then not even padding.
    Raises ValueError for shapes, dtypes, strides and targets that do not fit.
    """
    check_head(
        "linear_logprob",
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
    is_row_wise = isinstance(temperature, Tensor)
    return LinearLogprob(
        *_logprob(
            hidden_MD, weight_VD, targets_M,
            temperature if is_row_wise else None, 1.0 if is_row_wise else float(temperature), ignore_index,
            name_of(group), sequence_parallel, chunk_bytes or 0, -1 if max_rows is None else max_rows,
            _backend or "", with_entropy,
        )
    )  # fmt: skip
