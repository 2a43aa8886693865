"""Makes a loss that computes its gradients in the forward into a pair of custom ops and one function.

`phimini::<name>` returns dX and dW beside the loss; autograd keeps them and the backward only scales them. Both return
metrics, and log-probs by row where the loss has use for them.
`phimini::<name>_into` adds dW to a given buffer instead. Both have one schema for all losses: numbers and words
are lists (words: one string), which the loss's own `run` unpacks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels._launch import Backend, compute_dtype
from phimini.kernels.head.call import HeadCall, name_of
from phimini.kernels.head.chunked import ChunkedHead
from phimini.kernels.head.deferred_checks import raise_pending
from phimini.kernels.head.rows import HeadRows


@dataclass(slots=True, kw_only=True)
class LossCall(HeadCall):
    row_values: Sequence[Tensor | None]
    numbers: Sequence[float]
    words: str
    needs_dx: bool
    dw_VD: Tensor | None

    @property
    def needs_gradient(self) -> bool:
        return self.needs_dx or self.dw_VD is not None

    def open_for_loss(self, rows: HeadRows, **options) -> ChunkedHead:
        return self.open(rows, needs_dx=self.needs_dx, dw_VD=self.dw_VD, **options)


class LossResult(NamedTuple):
    loss: Tensor
    metrics: Tensor
    """(num_metrics,)"""
    dx_MD: Tensor
    """empty if it was not wanted"""
    logp_M: Tensor
    """of all rows, 0 where they do not count; empty from a loss without `gives_logp`"""


Run = Callable[[LossCall], LossResult]
"""Adds dW to call.dw_VD."""


class HeadLoss:
    """The function made of a `run`."""

    def __init__(self, name: str, num_metrics: int, run: Run, *, gives_logp: bool = False) -> None:
        self.op = _functional_op(name, num_metrics, gives_logp, run)
        self.op_into = _into_op(name, num_metrics, gives_logp, run)

    def __call__(
        self, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, *,
        row_values: Sequence[Tensor | None], numbers: Sequence[float], words: str,
        temperature: float | Tensor, ignore_index: int, group: dist.ProcessGroup | None, sequence_parallel: bool,
        main_grad: Tensor | None, chunk_bytes: int | None, max_rows: int | None, backend: Backend | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(loss, metrics, logp_M), the loss with gradients for hidden_MD and, unless main_grad takes it, weight_VD."""
        needs_dx = torch.is_grad_enabled() and hidden_MD.requires_grad
        needs_dw = torch.is_grad_enabled() and weight_VD.requires_grad
        is_row_wise = isinstance(temperature, Tensor)
        common = (
            list(row_values), list(numbers), words,
            temperature if is_row_wise else None, 1.0 if is_row_wise else float(temperature), ignore_index,
            name_of(group), sequence_parallel, chunk_bytes or 0, -1 if max_rows is None else max_rows, backend or "",
            needs_dx,
        )  # fmt: skip
        if main_grad is None or not needs_dw:
            loss, metrics, _dx, logp_M, _dw = self.op(
                hidden_MD, weight_VD, targets_M, *common, needs_dw
            )
            return loss, metrics, logp_M
        loss, metrics, dx, logp_M = self.op_into(
            hidden_MD.detach(), weight_VD.detach(), targets_M, *common, main_grad
        )
        # a frozen trunk: the weight stands in, so that the loss can be backpropagated like any other
        leaf = hidden_MD if needs_dx else weight_VD
        return _AttachGradient.apply(leaf, loss, dx if needs_dx else None), metrics, logp_M


def _call(name: str, hidden, weight, targets, row_values, numbers, words, temperature_M, temperature, ignore_index,
          group_name, sequence_parallel, chunk_bytes, max_rows, backend, needs_dx, dw_VD) -> LossCall:  # fmt: skip
    return LossCall(
        op=name, hidden_MD=hidden, weight_VD=weight, targets_M=targets, row_values=row_values, numbers=numbers,
        words=words, temperature_M=temperature_M, temperature=temperature, ignore_index=ignore_index,
        group_name=group_name, sequence_parallel=sequence_parallel, chunk_bytes=chunk_bytes,
        max_rows=max_rows, backend=backend, needs_dx=needs_dx, dw_VD=dw_VD,
    )  # fmt: skip


def _functional_op(name: str, num_metrics: int, gives_logp: bool, run: Run):
    @torch.library.custom_op(f"phimini::{name}", mutates_args=())
    def op(
        hidden: Tensor, weight: Tensor, targets: Tensor, row_values: Sequence[Tensor | None],
        numbers: Sequence[float], words: str, temperature_M: Tensor | None, temperature: float,
        ignore_index: int, group_name: str, sequence_parallel: bool, chunk_bytes: int, max_rows: int, backend: str, needs_dx: bool,
        needs_dw: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        call = _call(name, hidden, weight, targets, row_values, numbers, words, temperature_M, temperature,
                     ignore_index, group_name, sequence_parallel, chunk_bytes, max_rows, backend, needs_dx, None)  # fmt: skip
        call.dw_VD = call.new_weight_gradient(needs_dw)
        with call.without_autocast():
            loss, metrics, dx, logp = run(call)
        return loss, metrics, dx, logp, weight.new_empty(0) if call.dw_VD is None else call.dw_VD

    @op.register_fake
    def _(hidden, weight, targets, row_values, numbers, words, temperature_M, temperature, ignore_index, group_name,
          sequence_parallel, chunk_bytes, max_rows, backend, needs_dx, needs_dw):  # fmt: skip
        dtype = compute_dtype(weight.dtype)
        dw = weight.new_empty(weight.shape, dtype=dtype) if needs_dw else weight.new_empty(0)
        return *_fake_outputs(hidden, targets, dtype, num_metrics, gives_logp, needs_dx), dw

    op.register_autograd(_backward, setup_context=_setup)
    return op


def _into_op(name: str, num_metrics: int, gives_logp: bool, run: Run):
    @torch.library.custom_op(f"phimini::{name}_into", mutates_args={"main_grad"})
    def op(
        hidden: Tensor, weight: Tensor, targets: Tensor, row_values: Sequence[Tensor | None],
        numbers: Sequence[float], words: str, temperature_M: Tensor | None, temperature: float,
        ignore_index: int, group_name: str, sequence_parallel: bool, chunk_bytes: int, max_rows: int, backend: str, needs_dx: bool,
        main_grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        call = _call(name, hidden, weight, targets, row_values, numbers, words, temperature_M, temperature,
                     ignore_index, group_name, sequence_parallel, chunk_bytes, max_rows, backend, needs_dx, main_grad)  # fmt: skip
        with call.without_autocast():
            return run(call)

    @op.register_fake
    def _(hidden, weight, targets, row_values, numbers, words, temperature_M, temperature, ignore_index, group_name,
          sequence_parallel, chunk_bytes, max_rows, backend, needs_dx, main_grad):  # fmt: skip
        dtype = compute_dtype(weight.dtype)
        return _fake_outputs(hidden, targets, dtype, num_metrics, gives_logp, needs_dx)

    return op


def _fake_outputs(
    hidden: Tensor, targets: Tensor, dtype: torch.dtype, num_metrics: int, gives_logp: bool, needs_dx: bool
) -> LossResult:  # fmt: skip
    return LossResult(
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(num_metrics, dtype=dtype),
        hidden.new_empty(hidden.shape if needs_dx else 0),
        hidden.new_empty(targets.shape if gives_logp else 0, dtype=dtype),
    )


def _setup(ctx, inputs, output) -> None:
    needs_dx, needs_dw = inputs[-2:]
    _loss, metrics, dx, logp, dw = output
    ctx.mark_non_differentiable(metrics, dx, logp, dw)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx if needs_dx else None, dw if needs_dw else None)
    ctx.weight_dtype = inputs[1].dtype
    # torch.library counts a list of tensors as a list, and a list with a None in it as one argument.
    ctx.no_row_gradients = (
        None if any(value is None for value in inputs[3]) else [None] * len(inputs[3])
    )


def _backward(ctx, dloss: Tensor | None, *_):
    raise_pending()
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a fused head loss has no second derivative: its gradients are made in the forward"
        )
    dx, dw = ctx.saved_tensors
    dw_dtype = ctx.weight_dtype
    return (
        _scaled(dx, dloss, None),
        _scaled(dw, dloss, dw_dtype),
        None,
        ctx.no_row_gradients,
        *(None,) * 12,
    )


def _scaled(
    gradient: Tensor | None, factor: Tensor | None, dtype: torch.dtype | None
) -> Tensor | None:
    if gradient is None or factor is None:
        return None
    dtype = dtype or gradient.dtype
    # On a CPU the value can be looked at, and a 1 saves a pass over V * D; not while tracing, where it is a subclass.
    if gradient.device.type == "cpu" and type(factor) is Tensor and factor.item() == 1:
        return gradient.to(dtype)
    return (gradient * factor).to(dtype)


class _AttachGradient(torch.autograd.Function):
    """Gives a loss whose dW already went into main_grad its gradient with respect to hidden, if it has one."""

    @staticmethod
    def forward(ctx, leaf: Tensor, loss: Tensor, dx_MD: Tensor | None) -> Tensor:
        ctx.save_for_backward(dx_MD)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        is_one = dloss == 1
        message = (
            "main_grad holds the gradient of the loss itself, so the loss must be backpropagated with gradient 1: "
            "put every factor (1 / tokens, loss scale) into row weights"
        )
        if dloss.is_cuda:
            torch.ops.aten._assert_async.msg(is_one, message)
        elif not is_one:
            raise ValueError(f"{message}; got {float(dloss)}")
        return ctx.saved_tensors[0], None, None
