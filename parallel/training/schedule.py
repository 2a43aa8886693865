"""Pipeline schedule: run micro-batches through this rank's chunks in Megatron's order, at any layout.

M tokens of a micro-batch, T padded tokens that this rank holds, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from phimini.parallel.attention.context_parallel import spans_of_rank
from phimini.parallel.attention.core import PackedDocuments, packed_documents, rope_tables
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.timing import phase
from phimini.parallel.training.batch import IGNORE, PackedBatch, to_device


@dataclass(slots=True)
class Prepared:
    """A micro-batch on the device, padded for the layout, with the inputs of its attention."""

    batch: PackedBatch
    """of this rank's tokens, without padding"""
    head_rows: Tensor | slice
    """indices of `batch`'s tokens among this rank's padded tokens"""
    input_ids_1T: Tensor
    documents: PackedDocuments


def run_schedule(
    model: Model,
    microbatches: Sequence[PackedBatch],
    on_hidden: Callable[..., Any],
    *,
    forward_only: bool,
    on_output: Callable[[int, Prepared, int, Tensor], None] | None = None,
) -> None:
    """Run every micro-batch through this rank's chunks; call `on_hidden(index, prepared, hidden)` on the last stage.

    on_output: called on every stage with (index, prepared, this rank's chunk, output of the chunk).

    The interleaved schedule needs a multiple of `pipeline` micro-batches, so one-token dummies that the loss ignores
    are prepended. The last micro-batch must be a real one that reaches the head's weight: an overlapped gradient
    reduction waits for all gradients of a bucket.
    """
    layout = model.world.layout
    if not microbatches:
        raise ValueError("expected at least one micro-batch, got none")
    for index, batch in enumerate(microbatches):
        # Checked here on every stage: within the schedule, a stage that raises leaves the others waiting.
        if max(batch.lengths) > model.config.max_positions:
            raise ValueError(
                f"micro-batch {index}: a document of {max(batch.lengths)} tokens is longer than the model's "
                f"max_positions {model.config.max_positions}"
            )
        _check_ids(index, batch, model.config.vocab_size)
    longest = max(b.num_tokens for b in microbatches) if layout.pipeline > 1 else 0
    several = layout.virtual_pipeline > 1
    first = len(microbatches) - _padded(len(microbatches), layout.pipeline) if several else 0
    prepared: dict[int, Prepared] = {}

    def forward_step(indices: Iterator[int], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        index = next(indices)
        fills_up = index < 0
        if index not in prepared:
            batch = _one_token() if fills_up else microbatches[index]
            prepared[index] = _prepare(model, batch, longest)
        p = prepared[index]
        with phase("forward"):
            hidden = chunk(p.input_ids_1T, None, None, packed_seq_params=p.documents)
        if on_output is not None and not fills_up:
            on_output(index, p, list(model.chunks).index(chunk), hidden)
        if not several:
            del prepared[index]
        return hidden, _no_loss if fills_up else phase("head")(partial(on_hidden, index, p))

    iterators = [iter(range(first, len(microbatches))) for _ in model.chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=list(model.chunks) if several else model.chunks[0],
        num_microbatches=len(microbatches) - first,
        seq_length=_padded(longest, model.world.token_multiple),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _check_ids(index: int, batch: PackedBatch, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary; tensor-parallel embeddings would return zeros for them."""
    targets_T = batch.targets_T.where(batch.targets_T != IGNORE, 0)
    for name, ids_T in (("token", batch.tokens_T), ("target", targets_T)):
        if ids_T.device.type != "cpu":
            continue  # a check would wait for the GPU
        low, high = (int(bound) for bound in ids_T.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"micro-batch {index}: {name} {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}"
            )


def _padded(number: int, multiple: int) -> int:
    return number + -number % multiple


def _one_token() -> PackedBatch:
    return PackedBatch(
        tokens_T=torch.zeros(1, dtype=torch.int64),
        targets_T=torch.full((1,), IGNORE),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
    )


def _no_loss(hidden_TD: Tensor, **_: Any) -> tuple[Tensor, Tensor, dict]:
    return hidden_TD.sum() * 0, torch.zeros((), dtype=torch.int32, device=hidden_TD.device), {}


@phase("data")
def _prepare(model: Model, batch: PackedBatch, longest: int) -> Prepared:
    """Pad with one dummy document to the layout's multiple and, with several pipeline stages, to the longest batch.

    The head never sees the padding, because it gets the original batch.
    """
    world = model.world
    total = _padded(max(batch.num_tokens, longest), world.token_multiple)
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
        size = group.size()
        spans = spans_of_rank(total, group.rank(), size)
        tokens_T = torch.cat([tokens_T[a:b] for a, b in spans])
        real = [(a, max(a, min(b, batch.num_tokens))) for a, b in spans]
        chunk = total // (2 * size)
        head_rows = torch.cat([i * chunk + torch.arange(b - a) for i, (a, b) in enumerate(real)])
        by_rank = tuple(
            _rows_of_documents(batch.cu_seqlens.tolist(), spans_of_rank(total, rank, size))
            for rank in range(size)
        )
        batch = batch.take(torch.cat([torch.arange(a, b) for a, b in real]), group, by_rank)
    prepared = Prepared(
        batch=replace(batch, fields=batch.fields | {"document": batch.document_ids_T}),
        head_rows=head_rows,
        input_ids_1T=tokens_T[None],
        documents=packed_documents(cu_seqlens, model.config, group, world.uses_ring),
    )
    prepared = to_device(prepared, world.device)
    prepared.documents.rope_tables = rope_tables(
        model.config, prepared.documents.max_seqlen_q, world.device
    )
    return prepared


def _rows_of_documents(cuts: list[int], spans: list[tuple[int, int]]) -> tuple[int, ...]:
    """Return the tokens of each document within `spans`."""
    return tuple(
        sum(max(0, min(end, last) - max(begin, first)) for first, last in spans)
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
    )


def from_last_stage(model: Model, value: Any) -> Any:
    """Return the last pipeline stage's `value` on every stage."""
    if model.world.layout.pipeline == 1:
        return value
    group = model.world.pipeline_group
    box = [value]
    last = dist.get_global_rank(group, group.size() - 1)
    dist.broadcast_object_list(box, src=last, group=group, device=model.world.device)
    return box[0]
