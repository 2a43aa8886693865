"""Search for the rank, stage, micro-batch and document that made a loss or a gradient non-finite.

The step has failed, so the search may be slow: it runs the micro-batches again and inspects the output of every stage.
A non-finite value spreads to later stages but not to other documents, so the earliest stage that has one, and its
documents, are the cause.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from phimini.parallel.megatron.builder import Model
from phimini.parallel.training.batch import PackedBatch
from phimini.parallel.training.schedule import Prepared, from_last_stage, run_schedule


class NonFiniteError(RuntimeError):
    """Error for a loss or a gradient that is inf or NaN; raised on every rank before any weight changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """A non-finite value in one micro-batch, found by one rank."""

    data_rank: int
    index: int
    """index of the micro-batch on its data rank"""
    chunk: int
    """index over all stages, in the order of the layers"""
    rank: int
    stage: int
    documents: tuple[int, ...]
    what: str


def raise_for_loss(
    model: Model, microbatches: Sequence[PackedBatch], losses: Sequence[Tensor]
) -> NoReturn:
    """Find and raise the cause of a non-finite loss. Collective over the whole job.

    losses: of each micro-batch, on the last stage.
    """
    world = model.world
    of_batches = from_last_stage(model, [loss.item() for loss in losses])
    found: list[_Finding] = []

    def look(index: int, prepared: Prepared, chunk: int, hidden: Tensor) -> None:
        if not torch.isfinite(hidden).all():
            documents = _documents(model, prepared, hidden)
            found.append(_finding(model, index, chunk, documents, "hidden states"))

    with torch.no_grad():
        run_schedule(model, microbatches, _ignore, forward_only=True, on_output=look)
    bad = [i for i, loss in enumerate(of_batches) if not math.isfinite(loss)]
    seen = [f for findings in world.all_gather_objects(found) for f in findings]
    mine = []
    for index in bad:
        before = f"data rank {world.data_rank}, micro-batch {index}: loss {of_batches[index]}, "
        here = [f for f in seen if (f.data_rank, f.index) == (world.data_rank, index)]
        text = "every hidden state is finite: look at the head, its targets and fields"
        if here:
            text = _text(here, microbatches[index], first=True)
        mine.append(before + text)
    _raise(model, "the loss is not finite", mine if _speaks(model) else [])


def raise_for_gradient(model: Model, grad_norm: float) -> NoReturn:
    """Find and raise the cause of a non-finite gradient norm after finite losses. Collective over the whole job."""
    world = model.world
    names = _bad_gradients(model)
    found: list[_Finding] = []
    microbatches, loss = model.latest_step or ([], _ignore)
    for index, batch in enumerate(microbatches):
        found += _gradient_findings(model, index, batch, loss)
    seen = [f for findings in world.all_gather_objects(found) for f in findings]
    mine = [f"rank {world.rank}: {name}" for name in names[:4]]
    if _speaks(model):
        for index, batch in enumerate(microbatches):
            here = [f for f in seen if (f.data_rank, f.index) == (world.data_rank, index)]
            if here:
                # Backward runs in reverse, so the cause is in the latest chunk that has a non-finite gradient.
                place = f"data rank {world.data_rank}, micro-batch {index}: "
                mine.append(place + _text(here, batch, first=False))
    alone = "" if seen else "; each micro-batch's own gradient is finite: it is their sum"
    _raise(model, f"the gradient norm is {grad_norm} although every loss was finite{alone}", mine)


def _raise(model: Model, what: str, mine: list[str]) -> NoReturn:
    lines = [line for lines in model.world.all_gather_objects(mine) for line in lines]
    raise NonFiniteError(
        f"step {model.num_updates}: {what}; no weight was changed. Not finite:\n" + "\n".join(lines)
    )


def _speaks(model: Model) -> bool:
    """Return True on the rank of each replica that reports."""
    world = model.world
    return world.tensor_rank == 0 and world.context_rank == 0 and world.is_last_stage


def _ignore(index: int, prepared: Prepared, hidden_TD: Tensor, **_: Any) -> None:
    """Ignore the hidden states of the last stage, for a forward-only run."""


def _gradient_findings(model: Model, index: int, batch: PackedBatch, loss: Any) -> list[_Finding]:
    """Check one micro-batch's backward: gradients of each chunk's inputs and outputs, and of the weights."""
    found: list[_Finding] = []
    handles: list[Any] = []

    def watch(prepared: Prepared, chunk: int, hidden: Tensor) -> None:
        def look(gradient: Tensor) -> None:
            if not torch.isfinite(gradient).all():
                documents = _documents(model, prepared, gradient)
                what = "gradients for hidden states"
                found.append(_finding(model, index, chunk, documents, what))

        if hidden.requires_grad:
            handles.append(hidden.register_hook(look))

    def of_embedding(module: Any, args: Any, output: Tensor) -> None:
        embedded.append(output)

    embedded: list[Tensor] = []
    gpt = model.gpts[0]
    if gpt.pre_process:
        handles.append(gpt.embedding.register_forward_hook(of_embedding))

    def on_output(_: int, prepared: Prepared, chunk: int, hidden: Tensor) -> None:
        watch(prepared, chunk, hidden)
        if chunk == 0 and embedded:
            watch(prepared, chunk, embedded.pop())

    model.zero_grad()
    with _without_reduction(model), torch.enable_grad():
        run_schedule(model, [batch], loss, forward_only=False, on_output=on_output)
    for handle in handles:
        handle.remove()
    for chunk in range(len(model.chunks)):
        if names := _bad_gradients(model, chunk):
            found.append(_finding(model, index, chunk, (), f"gradient of {names[0]}"))
    return found


@contextlib.contextmanager
def _without_reduction(model: Model) -> Iterator[None]:
    """Keep gradients local to each rank."""
    config: Any = model.transformer_config
    config.finalize_model_grads_func = None
    config.no_sync_func = contextlib.nullcontext
    if len(model.chunks) > 1:
        config.no_sync_func = [contextlib.nullcontext] * len(model.chunks)
    with contextlib.ExitStack() as stack:
        for chunk in model.chunks:
            stack.enter_context(chunk.no_sync())  # pyright: ignore[reportCallIssue, reportArgumentType]
        yield


def _bad_gradients(model: Model, chunk: int | None = None) -> list[str]:
    return [
        name
        for name, p in model.named_parameters()
        if (chunk is None or name.startswith(f"chunks.{chunk}."))
        and not torch.isfinite(p.main_grad).all()  # pyright: ignore[reportAttributeAccessIssue]
    ]


def _documents(model: Model, prepared: Prepared, x: Tensor) -> tuple[int, ...]:
    """Return the documents with a non-finite row of x (T or T / tensor, ..., D), without the padding."""
    bad_T = ~torch.isfinite(x.detach().flatten(1)).all(-1)
    num_rows = prepared.input_ids_1T.shape[1]
    if len(bad_T) < num_rows:  # sequence parallel: only the rows of this tensor rank
        first = model.world.tensor_rank * len(bad_T)
        whole_T = bad_T.new_zeros(num_rows)
        whole_T[first : first + len(bad_T)] = bad_T
        bad_T = whole_T
    batch = prepared.batch
    return tuple(batch.document_ids_T[bad_T[prepared.head_rows]].unique().tolist())


def _finding(
    model: Model, index: int, chunk: int, documents: tuple[int, ...], what: str
) -> _Finding:
    world = model.world
    return _Finding(
        data_rank=world.data_rank,
        index=index,
        chunk=chunk * world.layout.pipeline + world.pipeline_rank,
        rank=world.rank,
        stage=world.pipeline_rank,
        documents=documents,
        what=what,
    )


def _text(found: list[_Finding], batch: PackedBatch, *, first: bool) -> str:
    """Describe the origin: the first chunk with a finding, or the last one."""
    at = (min if first else max)(f.chunk for f in found)
    source = next(f for f in found if f.chunk == at)
    ranks = ", ".join(str(r) for r in sorted({f.rank for f in found if f.chunk == at}))
    documents = sorted({d for f in found for d in f.documents})
    named = [f"{d} ({batch.names[d]})" if batch.names else str(d) for d in documents[:5]]
    more = f" and {len(documents) - 5} more" if len(documents) > 5 else ""
    of = f"document {', '.join(named)}{more}" if documents else "no document's rows"
    return f"{source.what} on rank {ranks}, pipeline stage {source.stage}; {of}"
