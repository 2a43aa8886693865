"""One step's forward and backward over any layout, through Megatron's own schedules.

M tokens of a micro-batch, D model width, V vocabulary rows of this tensor-parallel rank.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from phimini.parallel.attention import PackedDocuments, packed_documents
from phimini.parallel.batch import PackedBatch
from phimini.parallel.builder import Model
from phimini.parallel.context import spans_of_rank


class NonFiniteError(RuntimeError):
    """A loss or a gradient is inf or NaN; raised on every rank, before any weight changed."""


class Head(Protocol):
    """Turns hidden states into a loss; called on the last pipeline stage, once per micro-batch.

    hidden_MD: all M tokens of the batch. weight_VD: this rank's rows of the vocabulary, in order of the ranks of
    `group` (the tensor-parallel group; size 1 when there is nothing to share).
    Returns (loss_sum, count, metrics): the sum whose gradient is wanted, what it is to be divided by (summed over all
    micro-batches and data ranks first), and sums for the log. All scalars, equal on every rank of `group`.
    Under context parallelism M are this rank's tokens (see PackedBatch.rows) and what is returned is summed over the
    context ranks; `batch.once` is for a value that is whole on each.
    The gradient for hidden_MD must be the whole one on every rank: the head sums its rows' parts over `group`.
    """

    def __call__(
        self, hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...


_HeadResult = tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Sums over all micro-batches and all data-parallel ranks; the same on every rank."""

    loss_sum: float
    count: float
    metrics: dict[str, float]

    @property
    def loss(self) -> float:
        """loss_sum / count"""
        return self.loss_sum / self.count


@dataclass(slots=True)
class _Prepared:
    """A micro-batch on the device, padded for the layout, with what its attention needs."""

    batch: PackedBatch
    """of this rank's tokens, without padding"""
    head_rows: Tensor | slice
    """where `batch`'s tokens are among this rank's padded ones"""
    input_ids_1T: Tensor
    documents: PackedDocuments


def forward_backward(model: Model, microbatches: Sequence[PackedBatch], head: Head) -> StepMetrics:
    """Adds to the gradients: d(sum of loss_sum over micro-batches and data ranks) / (global sum of count).

    Every rank of a replica (same data_rank) must pass the same micro-batches; replicas pass different ones, as many
    of them. After it the gradients are reduced, scaled and ready for `Optimizer.step`.
    Raises NonFiniteError on every rank if any micro-batch's loss is not finite, ValueError if count is 0.
    """
    collected: list[_HeadResult] = []

    def loss(index: int, prepared: _Prepared, hidden_TD: Tensor) -> tuple[Tensor, Tensor, dict]:
        hidden_MD = hidden_TD[prepared.head_rows]
        loss_sum, count, metrics = head(
            hidden_MD, model.head_weight_VD, prepared.batch, group=model.world.tensor_group
        )
        collected.append((loss_sum.detach(), count.detach(), metrics))
        return loss_sum, torch.zeros((), dtype=torch.int32, device=loss_sum.device), {}

    count = torch.zeros((), dtype=torch.float64, device=model.world.device)

    def finalize(chunks: Any, num_tokens: Any = None, **kwargs: Any) -> None:
        # Megatron counts tokens in int32; ours may be any number, e.g. documents or weights.
        for _, c, _ in collected:
            count.add_(c.to(count))
        finalize_model_grads(chunks, count, **kwargs)

    model.transformer_config.finalize_model_grads_func = finalize
    _run_schedule(model, microbatches, loss, forward_only=False)
    result = _reduce(model, collected, count)
    if not math.isfinite(result.loss_sum):
        _raise_non_finite_loss(model, microbatches, collected)
    if result.count <= 0:
        raise ValueError(
            f"step {model.num_updates}: nothing to train on: the heads' counts sum to {result.count} over "
            f"{len(microbatches)} micro-batches and {model.world.data_size} data ranks"
        )
    return result


@torch.no_grad()
def forward_only(
    model: Model,
    microbatches: Sequence[PackedBatch],
    fn: Callable[..., Any],
) -> list[Any]:
    """`fn(hidden_MD, weight_VD, batch, group=...)` of each micro-batch, in order, on every rank of the replica.

    fn's results, from the last pipeline stage, are tensors, or dicts, lists and tuples of them. Under context
    parallelism fn sees this rank's tokens: results with one row per token are put together, others summed.
    """
    results: list[Any] = []
    rows: list[Tensor | None] = []

    def collect(index: int, prepared: _Prepared, hidden_TD: Tensor, non_loss_data: bool) -> None:
        hidden_MD = hidden_TD[prepared.head_rows]
        batch = prepared.batch
        result = fn(hidden_MD, model.head_weight_VD, batch, group=model.world.tensor_group)
        results.append(result)
        rows.append(batch.rows)

    _run_schedule(model, microbatches, collect, forward_only=True)
    if model.world.layout.context > 1:
        results = _over_context_ranks(model, microbatches, rows, results)
    return _from_last_stage(model, results)


def _run_schedule(
    model: Model,
    microbatches: Sequence[PackedBatch],
    on_hidden: Callable[..., Any],
    *,
    forward_only: bool,
) -> None:
    """Runs every micro-batch through this rank's chunks; `on_hidden(index, prepared, hidden)` on the last stage."""
    layout = model.world.layout
    if not microbatches:
        raise ValueError("expected at least one micro-batch, got none")
    if layout.virtual_pipeline > 1 and len(microbatches) % layout.pipeline:
        raise ValueError(
            f"interleaved pipelining needs a multiple of pipeline = {layout.pipeline} micro-batches, "
            f"got {len(microbatches)}"
        )
    for index, batch in enumerate(microbatches):
        # Now, on every stage: once the schedule runs, a stage that raises leaves the others waiting.
        if max(batch.lengths) > model.config.max_positions:
            raise ValueError(
                f"micro-batch {index}: a document of {max(batch.lengths)} tokens is longer than the model's "
                f"max_positions {model.config.max_positions}"
            )
    longest = max(b.num_tokens for b in microbatches) if layout.pipeline > 1 else 0
    prepared: dict[int, _Prepared] = {}

    def forward_step(indices: Iterator[int], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        index = next(indices)
        if index not in prepared:
            prepared[index] = _prepare(model, microbatches[index], longest)
        p = prepared[index]
        hidden = chunk(p.input_ids_1T, None, None, packed_seq_params=p.documents)
        if layout.virtual_pipeline == 1:
            del prepared[index]
        return hidden, partial(on_hidden, index, p)

    several = layout.virtual_pipeline > 1
    iterators = [iter(range(len(microbatches))) for _ in model.chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=list(model.chunks) if several else model.chunks[0],
        num_microbatches=len(microbatches),
        seq_length=_padded(longest, layout.token_multiple),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _padded(num_tokens: int, multiple: int) -> int:
    return num_tokens + -num_tokens % multiple


def _prepare(model: Model, batch: PackedBatch, longest: int) -> _Prepared:
    """Pads with one dummy document: to the layout's multiple and, between pipeline stages, to the longest of the step.

    The head never sees the padding: it gets the batch as it came.
    """
    world = model.world
    total = _padded(max(batch.num_tokens, longest), world.layout.token_multiple)
    tail = total - batch.num_tokens
    cu_seqlens, tokens_T = batch.cu_seqlens, batch.tokens_T
    if tail:
        cuts = [total]
        longest_document = model.config.max_positions
        while cuts[0] - batch.num_tokens > longest_document:
            cuts.insert(0, cuts[0] - longest_document)
        cu_seqlens = torch.cat((cu_seqlens, torch.tensor(cuts, dtype=torch.int32)))
        tokens_T = torch.cat((tokens_T, tokens_T.new_zeros(tail)))
    group = world.context_group if world.layout.context > 1 else None
    head_rows: Tensor | slice = slice(batch.num_tokens)
    if group is not None:
        spans = spans_of_rank(total, group.rank(), group.size())
        tokens_T = torch.cat([tokens_T[a:b] for a, b in spans])
        real = [(a, max(a, min(b, batch.num_tokens))) for a, b in spans]
        chunk = total // (2 * group.size())
        head_rows = torch.cat([i * chunk + torch.arange(b - a) for i, (a, b) in enumerate(real)])
        head_rows = head_rows.to(world.device)
        batch = batch.take(torch.cat([torch.arange(a, b) for a, b in real]), group)
    return _Prepared(
        batch=batch.to(world.device),
        head_rows=head_rows,
        input_ids_1T=tokens_T[None].to(world.device, non_blocking=True),
        documents=packed_documents(cu_seqlens, model.config, world.device, group),
    )


def _from_last_stage(model: Model, value: Any) -> Any:
    """The last pipeline stage's `value`, on every stage."""
    if model.world.layout.pipeline == 1:
        return value
    group = model.world.pipeline_group
    box = [value]
    last = dist.get_global_rank(group, group.size() - 1)
    dist.broadcast_object_list(box, src=last, group=group, device=model.world.device)
    return box[0]


def _over_context_ranks(
    model: Model,
    microbatches: Sequence[PackedBatch],
    rows: list[Tensor | None],
    results: list[Any],
) -> list[Any]:
    """Puts the context ranks' results together; there are none on the earlier pipeline stages."""
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
        owners = [part_rows[index] for part_rows, _ in parts]
        if all(v.ndim and v.shape[0] == len(r) for v, r in zip(values, owners, strict=True)):
            whole = values[0].new_empty(microbatches[index].num_tokens, *values[0].shape[1:])
            for value, owned in zip(values, owners, strict=True):
                whole[owned] = value.to(whole.device)
            return whole
        return torch.stack([v.to(values[0].device) for v in values]).sum(0)

    return [merge(i, [part[i] for _, part in parts]) for i in range(len(results))]


def _reduce(model: Model, collected: list[_HeadResult], count: Tensor) -> StepMetrics:
    """Sums over micro-batches and data ranks, then tells the earlier pipeline stages."""
    world = model.world
    names: list[str] = sorted(collected[0][2]) if collected else []
    sums: list[float] = []
    if collected:
        columns = [[loss for loss, _, _ in collected]]
        columns += [[metrics[name] for _, _, metrics in collected] for name in names]
        total = torch.stack([torch.stack([v.double() for v in column]).sum() for column in columns])
        if world.data_context_group.size() > 1:
            dist.all_reduce(total, group=world.data_context_group)
        sums = total.tolist()
    names, sums = _from_last_stage(model, (names, sums))
    # finalize_model_grads has summed `count` over all ranks already.
    return StepMetrics(
        loss_sum=sums[0], count=count.item(), metrics=dict(zip(names, sums[1:], strict=True))
    )


def _raise_non_finite_loss(
    model: Model, microbatches: Sequence[PackedBatch], collected: list[_HeadResult]
) -> None:
    """Runs the forward pass once more to find the documents, then raises on every rank with what all ranks found."""
    world = model.world
    losses = _from_last_stage(model, [loss.item() for loss, _, _ in collected])
    bad_documents = forward_only(model, microbatches, _documents_not_finite)
    mine = [
        f"data rank {world.data_rank} (rank {world.rank}), micro-batch {i}: loss {loss}, "
        + _document_text(microbatches[i], bad.nonzero()[:, 0].tolist())
        for i, (loss, bad) in enumerate(zip(losses, bad_documents, strict=True))
        if not math.isfinite(loss)
    ]
    speaks = world.tensor_rank == 0 and world.is_last_stage
    everyone = [
        line for lines in world.all_gather_objects(mine if speaks else []) for line in lines
    ]
    raise NonFiniteError(
        f"step {model.num_updates}: the loss is not finite; no weight was changed:\n"
        + "\n".join(everyone)
    )


def _documents_not_finite(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup
) -> Tensor:
    """(N,) how many of each document's hidden states are not finite"""
    bad_M = ~torch.isfinite(hidden_MD).all(-1)
    counts_N = torch.zeros(batch.num_documents, dtype=torch.int64, device=hidden_MD.device)
    return counts_N.index_add_(0, batch.document_ids_T, bad_M.long())


def _document_text(batch: PackedBatch, bad: list[int]) -> str:
    if not bad:
        return "every hidden state is finite: look at the head, its targets and fields"
    names = [f"{i} ({batch.names[i]})" if batch.names else str(i) for i in bad[:5]]
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"hidden states not finite in document {', '.join(names)}{more}"
