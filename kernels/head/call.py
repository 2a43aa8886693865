"""One call of a head op: from its options to rows, chunks and a back-end; and the autograd function of the losses.

    head_loss        what a loss calls; HeadLoss keeps the gradients that the forward made, its backward scales them
    compute          one call, outside autograd: builds a HeadCall and hands it to the op's own `run`
    HeadCall         the arguments of a call, and what follows from them

Letters: M rows (tokens), D model width, V vocabulary rows of this rank.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels.backend import launch
from phimini.kernels.head.chunked import ChunkedHead
from phimini.kernels.head.deferred_checks import check_later, pending, raise_pending
from phimini.kernels.head.options import ConstantOptions, HeadOptions
from phimini.kernels.head.rows import (
    HeadRows,
    chunk_rows,
    move_counting_rows_first,
    rows_at,
)
from phimini.kernels.head.torch_backend import TorchHead
from phimini.kernels.head.triton_backend import TritonHead


# --- one call ------------------------------------------------------------------------------------
@dataclass(slots=True, kw_only=True)
class HeadCall:
    """Arguments of a call, and what follows from them. `hidden_MD` has the rows of all ranks."""

    options: HeadOptions
    hidden_MD: Tensor
    weight_VD: Tensor
    targets_M: Tensor
    temperature: float | Tensor
    needs_dx: bool
    dw_VD: Tensor | None
    """Buffer that dW is added to; None where it is not wanted."""
    needs_gradient: bool
    """Whether dX or dW is wanted."""
    group: dist.ProcessGroup | None
    """Ranks that share the vocabulary; None for a group of one, too, which needs no communication."""
    dtype: torch.dtype
    """Dtype of statistics, losses and dW."""
    runs_triton: bool
    on_gpu: bool
    """True for tensors on a GPU, or a stand-in for one, which the host must not wait for."""
    host_knows: bool
    """True if the host can read values: the tensors are on a CPU, and neither traced nor fake."""
    is_counted_on_device: bool
    """Whether the host does not learn how many rows count: it would have to wait for the GPU."""
    chunk_rows: int
    """The most rows of a chunk, see `chunk_rows` in head/rows.py."""

    def counts(self, weights_M: Tensor | None) -> Tensor:
        """Return (M,) bool: rows whose target is not `ignore_index` and whose weight is not 0.

        Raises ValueError for a target, a temperature or a `max_rows` that does not fit.
        """
        op, targets_M, max_rows = self.options.op, self.targets_M, self.options.max_rows
        counts_M = targets_M != self.options.ignore_index
        if weights_M is not None:
            counts_M &= weights_M != 0
        num_classes = self.weight_VD.shape[0] * (1 if self.group is None else self.group.size())
        bad_M = (targets_M < 0) | (targets_M >= num_classes)
        message = (
            f"targets_M[{{}}] is {{:.0f}}, expected a class in [0, {num_classes}) or ignore_index"
        )
        checks = [(bad_M & counts_M, targets_M, message)]
        if isinstance(self.temperature, Tensor):
            bad_M = ~((self.temperature > 0) & self.temperature.isfinite()) & counts_M
            message = "temperature[{}] is {:g}, expected a finite number above 0"
            checks.append((bad_M, self.temperature, message))
        for bad_M, value_M, message in checks:
            if not self.host_knows:
                check_later(bad_M, value_M, f"{op}: {message}")
            elif bool(bad_M.any()):
                at = int(bad_M.nonzero()[0])
                raise ValueError(f"{op}: {message.format(at, float(value_M[at]))}")
        if max_rows is not None and self.host_knows and counts_M.sum() > max_rows:
            raise ValueError(f"{op}: max_rows is {max_rows}, but {int(counts_M.sum())} rows count")
        return counts_M

    def counting_rows(self, weights_M: Tensor | None) -> HeadRows:
        """Return the rows that count, see `counts`."""
        counts_M = self.counts(weights_M)
        if not self.is_counted_on_device:
            kept_M = None if bool(counts_M.all()) else counts_M.nonzero()[:, 0]
            return rows_at(self.hidden_MD, self.targets_M, kept_M)
        return move_counting_rows_first(
            self.hidden_MD, self.targets_M, counts_M, None, self.options.max_rows
        )

    def open(
        self,
        rows: HeadRows,
        *,
        statistics_only: bool = False,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
        with_mean_logit: bool = False,
    ) -> ChunkedHead:
        """Return the back-end for `rows`, with the gradients of this call or, `statistics_only`, without."""
        with_gradient = self.needs_gradient and not statistics_only
        temperature, num_rows = self.temperature, len(rows.targets_M)
        if isinstance(temperature, Tensor):
            selected_M = rows.select(temperature, self.dtype)
            assert selected_M is not None, "selected from a tensor"
            temperature = (
                selected_M if rows.active_M is None else selected_M.where(rows.active_M, 1)
            )
        # The fused forward-only kernel keeps no logits, so it takes all rows at once.
        keeps_logits = with_gradient or not self.runs_triton
        return (TritonHead if self.runs_triton else TorchHead)(
            rows,
            self.weight_VD,
            max(1, min(self.chunk_rows if keeps_logits else num_rows, num_rows)),
            temperature=temperature,
            group=self.group,
            needs_dx=self.needs_dx and with_gradient,
            dw_VD=self.dw_VD if with_gradient else None,
            with_entropy=with_entropy,
            entropy_gradient=entropy_gradient,
            with_mean_logit=with_mean_logit,
            sequence_parallel=self.options.sequence_parallel,
            on_gpu=self.on_gpu,
        )


@dataclass(frozen=True, kw_only=True)
class HeadOp(HeadOptions):
    """Options of one op, and its computation."""

    def run(self, call: HeadCall, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Compute the op. `values`: its further tensors; None in the result: a gradient that is not wanted."""
        raise NotImplementedError

    def fake(
        self, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, num_values: int, needs_dx: bool
    ) -> list[Tensor]:  # fmt: skip
        """Return empty tensors of the shapes and dtypes of `run`'s results, (0,) for None."""
        raise NotImplementedError


def compute(
    options: HeadOp,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    temperature: float | Tensor,
    values: Sequence[Tensor | None],
    needs_dx: bool,
    needs_dw: bool,
    main_grad: Tensor | None = None,
) -> Sequence[Tensor | None]:
    """Run one call and return the results of the op's `run`, and dW (fp32; `main_grad` with dW added, if given).

    Gradients that are not wanted are None, or empty where torch.compile traces: the graph then holds one operation.
    """
    if torch.compiler.is_compiling():
        if main_grad is not None:
            raise ValueError(f"{options.op}: main_grad cannot be compiled by torch.compile")
        is_row_wise = isinstance(temperature, Tensor)
        return compute_compiled(
            ConstantOptions.of(options), hidden_MD, weight_VD, targets_M, temperature if is_row_wise else None,
            1.0 if is_row_wise else temperature, values, needs_dx, needs_dw,
        )  # fmt: skip
    if pending:
        raise_pending()
    group, kind = options.group, weight_VD.device.type
    if group is not None and group.size() == 1:
        group = None
    if options.sequence_parallel and group is not None:
        own_MD = hidden_MD.contiguous()
        hidden_MD = own_MD.new_empty(own_MD.shape[0] * group.size(), own_MD.shape[1])
        dist.all_gather_into_tensor(hidden_MD, own_MD, group=group)
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    on_gpu = weight_VD.is_cuda if launch.stand_in is None else launch.stand_in(weight_VD)
    is_real = type(hidden_MD) is Tensor and type(targets_M) is Tensor
    host_knows = is_real and kind == "cpu" and not on_gpu
    runs_triton = on_gpu and weight_VD.dtype == torch.bfloat16
    if options._backend is not None:
        runs_triton = options._backend == "triton"
    element_bytes = weight_VD.itemsize if runs_triton else wide.itemsize
    row_bytes = weight_VD.shape[0] * element_bytes
    dw_VD = main_grad if needs_dw else None
    if needs_dw and main_grad is None:
        dw_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)
    call = HeadCall(
        options=options, hidden_MD=hidden_MD, weight_VD=weight_VD, targets_M=targets_M, temperature=temperature,
        needs_dx=needs_dx, dw_VD=dw_VD, needs_gradient=needs_dx or needs_dw, group=group, dtype=wide, runs_triton=runs_triton,
        on_gpu=on_gpu, host_knows=host_knows, is_counted_on_device=runs_triton or not host_knows,
        chunk_rows=chunk_rows("cuda" if on_gpu else kind, runs_triton, row_bytes, options.chunk_bytes),
    )  # fmt: skip
    has_autocast = torch.amp.is_autocast_available(kind)  # a meta device has none
    # The op decides what is fp32; autocast would narrow the products inside it.
    with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
        return *options.run(call, values), dw_VD


@torch.library.custom_op("phimini::head", mutates_args=())
def compute_compiled(
    constant: ConstantOptions, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature_M: Tensor | None,
    temperature: float, values: Sequence[Tensor | None], needs_dx: bool, needs_dw: bool,
) -> list[Tensor]:  # fmt: skip
    """`compute` as one operation of a compiled graph; None becomes an empty tensor."""
    results = compute(
        constant.options(), hidden_MD, weight_VD, targets_M,
        temperature if temperature_M is None else temperature_M, values, needs_dx, needs_dw,
    )  # fmt: skip
    return [weight_VD.new_empty(0) if result is None else result for result in results]


@compute_compiled.register_fake
def _(
    constant, hidden_MD, weight_VD, targets_M, temperature_M, temperature, values, needs_dx, needs_dw
) -> list[Tensor]:  # fmt: skip
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    dw_VD = weight_VD.new_empty(weight_VD.shape, dtype=wide) if needs_dw else weight_VD.new_empty(0)
    options = constant.options()
    return [*options.fake(hidden_MD, weight_VD, targets_M, len(values), needs_dx), dw_VD]


# --- losses --------------------------------------------------------------------------------------
class LossResult(NamedTuple):
    """Results of a loss's `run`."""

    loss: Tensor
    metrics: Tensor
    """(num_metrics,)"""
    dx_MD: Tensor | None
    logp_M: Tensor | None
    """Log-probs of all rows, 0 where they do not count; None from a loss that does not give them."""


@dataclass(frozen=True, kw_only=True)
class LossOptions(HeadOp):
    """Options of a loss whose `run` returns a LossResult."""

    num_metrics: ClassVar[int]
    gives_logp: ClassVar[bool] = False

    def fake(
        self, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, num_values: int, needs_dx: bool
    ) -> list[Tensor]:  # fmt: skip
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        return [
            hidden_MD.new_empty((), dtype=wide),
            hidden_MD.new_empty(self.num_metrics, dtype=wide),
            hidden_MD.new_empty(hidden_MD.shape if needs_dx else 0),
            hidden_MD.new_empty(targets_M.shape if self.gives_logp else 0, dtype=wide),
        ]


def head_loss(
    options: LossOptions,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    values: Sequence[Tensor | None],
    *,
    temperature: float | Tensor = 1.0,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, metrics, logp_M), the loss with gradients for hidden_MD and weight_VD.

    `main_grad`: dW is added to it during the forward, and weight_VD gets no gradient.
    """
    needs_dx = torch.is_grad_enabled() and hidden_MD.requires_grad
    needs_dw = torch.is_grad_enabled() and weight_VD.requires_grad
    if main_grad is not None and needs_dx:
        # without hidden's gradient the weight stays, so that the loss can be backpropagated like any other
        weight_VD = weight_VD.detach()
    return HeadLoss.apply(
        options, hidden_MD, weight_VD, targets_M, temperature, main_grad, needs_dx, needs_dw, *values
    )  # pyright: ignore[reportReturnType]  # fmt: skip


class HeadLoss(torch.autograd.Function):
    """A loss that makes its gradients in the forward, out of the same logits."""

    @staticmethod
    def forward(
        ctx, options: LossOptions, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor,
        temperature: float | Tensor, main_grad: Tensor | None, needs_dx: bool, needs_dw: bool,
        *values: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        loss, metrics, dx_MD, logp_M, dw_VD = compute(
            options, hidden_MD, weight_VD, targets_M, temperature, values, needs_dx, needs_dw, main_grad
        )  # fmt: skip
        assert loss is not None and metrics is not None, "a loss gives both"
        logp_M = logp_M if options.gives_logp else None
        ctx.mark_non_differentiable(metrics)
        if logp_M is not None:
            ctx.mark_non_differentiable(logp_M)
        ctx.set_materialize_grads(False)
        ctx.in_main_grad = needs_dw and main_grad is not None
        ctx.save_for_backward(
            dx_MD if needs_dx else None, dw_VD if needs_dw and main_grad is None else None
        )
        ctx.weight_dtype, ctx.num_values = weight_VD.dtype, len(values)
        return loss, metrics, logp_M

    @staticmethod
    def backward(ctx, dloss: Tensor | None, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        if pending:
            raise_pending()
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused head loss has no second derivative: its gradients are made in the forward"
            )
        dx_MD, dw_VD = ctx.saved_tensors
        # The host can read a CPU's value, but for one that is traced, and a 1 saves a pass over V * D.
        is_read = type(dloss) is Tensor and dloss.device.type == "cpu" and launch.stand_in is None
        if dloss is None:
            dx_MD = dw_VD = None
        elif ctx.in_main_grad:
            _check_is_one(dloss, is_read)
        elif torch.compiler.is_compiling() or not is_read or dloss.item() != 1:
            dx_MD = None if dx_MD is None else dx_MD * dloss
            dw_VD = None if dw_VD is None else dw_VD * dloss
        if dw_VD is not None:
            dw_VD = dw_VD.to(ctx.weight_dtype)
        return None, dx_MD, dw_VD, *(None,) * (5 + ctx.num_values)


def _check_is_one(dloss: Tensor, is_read: bool) -> None:
    """Raise ValueError where the loss is not backpropagated with gradient 1; on CUDA checked on the device."""
    message = (
        "main_grad holds the gradient of the loss itself, so the loss must be backpropagated with gradient 1: "
        "put every factor (1 / tokens, loss scale) into row weights"
    )
    if dloss.is_cuda if launch.stand_in is None else launch.stand_in(dloss):
        torch.ops.aten._assert_async.msg(dloss == 1, message)
    elif is_read and dloss != 1:
        raise ValueError(f"{message}; got {float(dloss)}")
