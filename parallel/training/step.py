"""Forward and backward of one step over any layout, through Megatron's schedules.

M tokens of a micro-batch, D model width, V vocabulary rows of this tensor-parallel rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor
from torch.utils._pytree import tree_map_only

from phimini.model.config import training_flops
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.timing import count as count_work
from phimini.parallel.ranks.timing import phase, recording
from phimini.parallel.training.batch import PackedBatch
from phimini.parallel.training.nonfinite import raise_for_loss
from phimini.parallel.training.schedule import Prepared, from_last_stage, run_schedule


class Head(Protocol):
    """Function from hidden states to a loss, called on the last pipeline stage for each micro-batch.

    hidden_MD: all M tokens of the batch.
    weight_VD: this rank's rows of the vocabulary, in the order of the ranks of `group`.
    group: the tensor-parallel group; size 1 without tensor parallelism.

    Returns (loss_sum, count, metrics): the sum to differentiate, its divisor (summed over all micro-batches and data
    ranks first), and sums for the log. All are scalars, equal on every rank of `group`.

    Under context parallelism M are this rank's tokens (see PackedBatch.rows), and the results are summed over the
    context ranks; pass a value that every rank computes in full through `batch.share_of_rank`.
    The gradient for hidden_MD must be complete on every rank: the head sums the parts of its rows over `group`.
    """

    def __call__(
        self, hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...


_HeadResult = tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Sums over all micro-batches and data-parallel ranks, the same on every rank."""

    loss_sum: float
    count: float
    metrics: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean loss, loss_sum / count."""
        return self.loss_sum / self.count


class RunningStep:
    """A step whose forward and backward are launched. On a GPU they run on, and the host is free until `metrics`."""

    def __init__(
        self, model: Model, microbatches: Sequence[PackedBatch], collected: list[_HeadResult], sums: Tensor
    ) -> None:  # fmt: skip
        self._model, self._microbatches = model, microbatches
        self._collected, self._sums = collected, sums

    def metrics(self) -> StepMetrics:
        """Wait for the step and return its sums. Collective; before the optimizer's update.

        Raises NonFiniteError on every rank if any micro-batch's loss is not finite, and ValueError if the count is 0.
        """
        model, collected = self._model, self._collected
        names = sorted(collected[0][2]) if collected else []
        with phase("communication"):
            names, (count, *sums) = from_last_stage(model, (names, self._sums.tolist()))
        result = StepMetrics(
            loss_sum=sums[0], count=count, metrics=dict(zip(names, sums[1:], strict=True))
        )
        if not math.isfinite(result.loss_sum):
            raise_for_loss(model, self._microbatches, [loss for loss, _, _ in collected])
        if result.count <= 0:
            raise ValueError(
                f"step {model.num_updates}: nothing to train on: the heads' counts sum to {result.count} over "
                f"{len(self._microbatches)} micro-batches and {model.world.data_size} data ranks"
            )
        return result


def start_step(model: Model, microbatches: Sequence[PackedBatch], head: Head) -> RunningStep:
    """Launch forward and backward of a step, whose gradients are reduced and scaled as `forward_backward` says.

    Nothing between the first launch and `metrics` waits for a GPU.
    """
    collected: list[_HeadResult] = []

    def loss(index: int, prepared: Prepared, hidden_TD: Tensor) -> tuple[Tensor, Tensor, dict]:
        hidden_MD = hidden_TD[prepared.head_rows]
        loss_sum, count, metrics = head(
            hidden_MD, model.head_weight_VD, prepared.batch, group=model.world.tensor_group
        )
        collected.append((loss_sum.detach(), count.detach(), metrics))
        return loss_sum, torch.zeros((), dtype=torch.int32, device=loss_sum.device), {}

    count = torch.zeros((), dtype=torch.float64, device=model.world.device)

    def finalize(chunks: Any, num_tokens: Any = None, **kwargs: Any) -> None:
        # Megatron counts tokens in int32, and asks the host whether there are any; `count` may be any number, e.g. of
        # documents or weights, and stays on the GPU. A count of 0 is refused before the update.
        with phase("communication"):
            for _, c, _ in collected:
                count.add_(c.to(count))
            finalize_model_grads(chunks, None, **kwargs)
            _sum_over_replicas(model, count)
            for chunk in chunks:
                chunk.scale_gradients(1.0 / count)

    model.transformer_config.finalize_model_grads_func = finalize
    model.latest_step = microbatches, loss
    with phase("backward"):  # without the phases inside it
        run_schedule(model, microbatches, loss, forward_only=False)
    _count_work(model, microbatches)
    return RunningStep(model, microbatches, collected, _summed(model, collected, count))


def forward_backward(model: Model, microbatches: Sequence[PackedBatch], head: Head) -> StepMetrics:
    """Accumulate gradients: d(sum of loss_sum over micro-batches and data ranks) / (global sum of count).

    Every rank of a replica (same data_rank) must pass the same micro-batches. Replicas pass different ones, equal in
    number. Afterwards the gradients are reduced, scaled and ready for `Optimizer.step`.
    Raises as `RunningStep.metrics`.
    """
    return start_step(model, microbatches, head).metrics()


@torch.no_grad()
def forward_only(
    model: Model,
    microbatches: Sequence[PackedBatch],
    fn: Callable[..., Any],
    *,
    summed: bool = False,
) -> list[Any]:
    """Return `fn(hidden_MD, weight_VD, batch, group=...)` of each micro-batch, in order, on every rank of a replica.

    fn runs on the last pipeline stage and returns tensors, or dicts, lists and tuples of them. Under context
    parallelism fn sees this rank's tokens. Results have one row per token, and the rows of the ranks are merged.
    Scalars are summed over the ranks; with `summed` all results are, such as sums by document. Results from another
    rank are on the CPU.
    """
    results: list[Any] = []
    rows: list[Tensor | None] = []

    def collect(index: int, prepared: Prepared, hidden_TD: Tensor, non_loss_data: bool) -> None:
        hidden_MD = hidden_TD[prepared.head_rows]
        batch = prepared.batch
        result = fn(hidden_MD, model.head_weight_VD, batch, group=model.world.tensor_group)
        results.append(result)
        rows.append(batch.rows)

    with phase("forward"):
        run_schedule(model, microbatches, collect, forward_only=True)
    if model.world.layout.context > 1 or model.world.layout.pipeline > 1:
        # Unpickling would put a tensor on the GPU of the rank that sent it.
        results = tree_map_only(Tensor, Tensor.cpu, results)
    if model.world.layout.context > 1:
        results = _over_context_ranks(model, microbatches, rows, results, summed)
    return from_last_stage(model, results)


def _count_work(model: Model, microbatches: Sequence[PackedBatch]) -> None:
    if recording():
        for batch in microbatches:
            trained = int((batch.targets_T >= 0).sum())
            count_work("tokens", batch.num_tokens)
            count_work("trained_tokens", trained)
            count_work("flops", training_flops(model.config, batch.cu_seqlens, trained))


def _over_context_ranks(
    model: Model,
    microbatches: Sequence[PackedBatch],
    rows: list[Tensor | None],
    results: list[Any],
    summed: bool,
) -> list[Any]:
    """Merge the results of the context ranks; earlier pipeline stages have no results."""
    group = model.world.context_group
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, (rows, results), group=group)

    def merge(index: int, values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {k: merge(index, [v[k] for v in values]) for k in values[0]}
        if isinstance(values[0], tuple | list):
            merged = [merge(index, list(v)) for v in zip(*values, strict=True)]
            named = hasattr(values[0], "_fields")
            return type(values[0])(*merged) if named else type(values[0])(merged)
        if summed or not values[0].ndim:
            return torch.stack([v.to(values[0].device) for v in values]).sum(0)
        whole = values[0].new_empty(microbatches[index].num_tokens, *values[0].shape[1:])
        for value, (part_rows, _) in zip(values, parts, strict=True):
            owned = part_rows[index]
            assert len(value) == len(owned), f"{len(value)} rows of {len(owned)} tokens: summed?"
            whole[owned] = value.to(whole.device)
        return whole

    return [merge(i, [part[i] for _, part in parts]) for i in range(len(results))]


def _sum_over_replicas(model: Model, count: Tensor) -> None:
    """Sum the last stage's count over the data and context ranks, in place, on every rank."""
    world = model.world
    if world.layout.pipeline > 1:
        group = world.pipeline_group
        dist.broadcast(count, src=dist.get_global_rank(group, group.size() - 1), group=group)
    if world.data_context_group.size() > 1:
        dist.all_reduce(count, group=world.data_context_group)


@phase("communication")
def _summed(model: Model, collected: list[_HeadResult], count: Tensor) -> Tensor:
    """Return count, loss and metrics, in the order of their names, summed over micro-batches and data ranks.

    On earlier pipeline stages only the count.
    """
    if not collected:
        return count[None]
    names = sorted(collected[0][2])
    columns = [[loss for loss, _, _ in collected]]
    columns += [[metrics[name] for _, _, metrics in collected] for name in names]
    total = torch.stack([torch.stack([v.double() for v in column]).sum() for column in columns])
    if model.world.data_context_group.size() > 1:
        dist.all_reduce(total, group=model.world.data_context_group)
    return torch.cat([count[None], total])
