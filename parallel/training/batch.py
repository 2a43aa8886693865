"""Micro-batch of whole documents, concatenated without padding; its copy to the GPU; the check that ranks have the same data.

T tokens of all documents, N documents.

Each data rank trains on its share of the step's global batch. A rank with another file, verdict or random state would
go unnoticed, because losses and gradients stay finite. If the ranks of one replica differ, the gradients are wrong. So
the data is compared before a step's first forward, in one small all-gather.

A copy from pageable memory stops the host until the GPU's queue has drained. So all tensors of a micro-batch go into one
pinned buffer, which a side stream copies while the compute stream still works on earlier micro-batches.
"""

import functools
import hashlib
import marshal
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels.backend import launch
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World

T = TypeVar("T")
IGNORE = -100
"""target of a position without loss"""
ALIGNMENT = 256
"""bytes between the starts of two tensors in the buffer, as the GPU's own allocations"""
KEPT_ON_HOST = ("cu_seqlens", "rows")
"""fields of any dataclass that the host goes on reading"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One sequence with its targets, before packing."""

    tokens: Sequence[int] | np.ndarray
    targets: Sequence[int] | np.ndarray
    """targets[i] is the token that position i predicts, or IGNORE; as long as `tokens`"""
    token_fields: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """one value per token, e.g. the log-probability it was sampled with"""
    document_fields: Mapping[str, float] = field(default_factory=dict)
    """one value per document, e.g. its advantage"""
    name: str = ""
    """name in error messages, e.g. `rows.jsonl:17`"""


def next_token_targets(tokens: Sequence[int], trained: Sequence[bool]) -> list[int]:
    """Return targets shifted by one: position i predicts token i + 1 if that token is trained; the last is IGNORE."""
    if len(tokens) != len(trained):
        raise ValueError(f"next_token_targets: {len(tokens)} tokens but {len(trained)} loss flags")
    shifted = [t if keep else IGNORE for t, keep in zip(tokens[1:], trained[1:], strict=True)]
    return [*shifted, IGNORE]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Concatenated documents (THD layout). Document i is tokens cu_seqlens[i] to cu_seqlens[i + 1]."""

    tokens_T: Tensor
    """int64"""
    targets_T: Tensor
    """int64, IGNORE without loss"""
    cu_seqlens: Tensor
    """(N + 1,) int32, on the CPU: boundaries, from 0 to T"""
    fields: dict[str, Tensor] = field(default_factory=dict)
    """other inputs of a head, per token (T,)"""
    document_fields: dict[str, Tensor] = field(default_factory=dict)
    """other inputs of a head, per document (N,)"""
    names: tuple[str, ...] = ()
    """the documents' names, for error messages; () if they have none"""
    rows: Tensor | None = None
    """under context parallelism, the indices of these T tokens in the whole micro-batch; None means all, in order.
    cu_seqlens, lengths and the document fields still describe whole documents"""
    context_group: dist.ProcessGroup | None = None
    """the ranks that hold the other tokens; None without context parallelism"""
    rows_by_rank: tuple[tuple[int, ...], ...] = ()
    """under context parallelism, the tokens of each document on each context rank"""

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.shape[0]

    @property
    def num_documents(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each document."""
        cuts = self.cu_seqlens.tolist()
        return [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

    @property
    def document_rows(self) -> tuple[list[int], list[int]]:
        """Return for each document its tokens among these T, and the most that any context rank has."""
        if self.context_group is None:
            return self.lengths, self.lengths
        most = [max(counts) for counts in zip(*self.rows_by_rank, strict=True)]
        return list(self.rows_by_rank[self.context_group.rank()]), most

    @property
    def document_ids_T(self) -> Tensor:
        """Return the document index of each token, (T,) int64, on the tokens' device; kept in the field `document`."""
        if "document" in self.fields:
            return self.fields["document"]
        lengths, total = self.cu_seqlens.diff().to(torch.int64), sum(self.lengths)
        ids = torch.repeat_interleave(torch.arange(self.num_documents), lengths, output_size=total)
        return ids if self.rows is None else ids[self.rows]

    def share_of_rank(self, x: Tensor) -> Tensor:
        """Divide by the number of context ranks a value that every rank computes in full.

        A head's results are summed over the context ranks, so the value counts once. The gradient is left unscaled,
        because each rank's backward adds only the part of its own tokens.
        """
        if self.context_group is None:
            return x
        return x + (x / self.context_group.size() - x).detach()

    def take(
        self, rows: Tensor, context_group: dist.ProcessGroup, rows_by_rank: tuple[tuple[int, ...], ...]
    ) -> "PackedBatch":  # fmt: skip
        """Return the tokens `rows` of this whole micro-batch, for the context rank that holds them."""
        assert self.rows is None, "already a part of a micro-batch"
        return replace(
            self,
            tokens_T=self.tokens_T[rows],
            targets_T=self.targets_T[rows],
            fields={k: v[rows] for k, v in self.fields.items()},
            rows=rows,
            context_group=context_group,
            rows_by_rank=rows_by_rank,
        )


def idle(batch: PackedBatch) -> PackedBatch:
    """Return `batch` without targets and with every field 0, for a rank that has fewer micro-batches than the others.

    It takes part in the same collectives and adds 0 to loss, count and gradients.
    """
    zeros = lambda fields: {name: torch.zeros_like(x) for name, x in fields.items()}
    return replace(
        batch,
        targets_T=torch.full_like(batch.targets_T, IGNORE),
        fields=zeros(batch.fields),
        document_fields=zeros(batch.document_fields),
    )


@phase("data")
def pack(documents: Sequence[Document], multiple_of: int = 1) -> PackedBatch:
    """Concatenate `documents`.

    If the number of tokens is not a multiple of `multiple_of`, a dummy document follows: token 0, no targets, fields
    0. As a separate document it lengthens no real one, and no real token attends to it.
    Raises ValueError for an empty document, differing lengths, or fields that not all documents have.
    """
    if not documents:
        raise ValueError("pack: expected at least one document, got none")
    first = documents[0]
    for i, d in enumerate(documents):
        if len(d.tokens) == 0:
            raise ValueError(f"pack: document {i} has no tokens")
        for name, values in (("targets", d.targets), *d.token_fields.items()):
            if len(values) != len(d.tokens):
                raise ValueError(
                    f"pack: document {i} has {len(d.tokens)} tokens but {len(values)} {name}"
                )
        if d.token_fields.keys() != first.token_fields.keys():
            raise ValueError(f"pack: document {i} has token fields {sorted(d.token_fields)}, the first {sorted(first.token_fields)}")  # fmt: skip
        if d.document_fields.keys() != first.document_fields.keys():
            raise ValueError(f"pack: document {i} has document fields {sorted(d.document_fields)}, the first {sorted(first.document_fields)}")  # fmt: skip
    lengths = [len(d.tokens) for d in documents]
    tail = -sum(lengths) % multiple_of
    fields = {
        name: torch.tensor([v for d in documents for v in d.token_fields[name]] + [0] * tail)
        for name in first.token_fields
    }
    document_fields = {
        name: torch.tensor([d.document_fields[name] for d in documents] + [0] * bool(tail))
        for name in first.document_fields
    }
    if tail:
        lengths.append(tail)
    return PackedBatch(
        tokens_T=_joined([d.tokens for d in documents], [0] * tail),
        targets_T=_joined([d.targets for d in documents], [IGNORE] * tail),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        fields=fields,
        document_fields=document_fields,
        names=tuple(d.name for d in documents) if any(d.name for d in documents) else (),
    )


def _joined(parts: Sequence[Sequence[int] | np.ndarray], tail: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(p, np.int64) for p in (*parts, tail)]))


# --- the same data on all ranks -------------------------------------------------------------------
class DivergedError(RuntimeError):
    """Error for ranks about to train on different data; raised on every rank before any weight changes."""


def digest(*values: Any) -> int:
    """Return a 64-bit checksum of numbers, strings, None, and lists and tuples of them, equal for equal values."""
    # marshal takes a hundredth of a step. Later versions than 2, and pickle, also encode which objects are shared.
    return _number(hashlib.blake2b(marshal.dumps(values, 2), digest_size=8).digest())


def check_same_data(
    world: World, step: str, items: Any, microbatches: Sequence[PackedBatch] = ()
) -> None:
    """Raise DivergedError on every rank unless all ranks have equal `items`, and a replica equal `microbatches`.

    Collective.

    step: name of the step for the message.
    items: the step's global batch, in types that `digest` accepts.
    microbatches: those of this data rank, still on the CPU. Document fields are not compared, because each rank may
    compute them and round differently.
    """
    if world.world_size == 1:
        return
    with phase("data"):
        several = world.layout.model_size > 1  # ranks of this replica
        mine = [digest(items), _of_tensors(microbatches) if several else 0, world.data_rank]
    with phase("communication"):
        here = torch.tensor(mine, dtype=torch.int64, device=world.device)
        everywhere = [torch.empty_like(here) for _ in range(world.world_size)]
        dist.all_gather(everywhere, here)
        wholes, shares, data_ranks = zip(*torch.stack(everywhere).tolist(), strict=True)
    if len(set(wholes)) > 1:
        raise DivergedError(
            f"{step}: the ranks are about to train on different data: {_sides(enumerate(wholes))}"
        )
    for data_rank in range(world.data_size):
        of_replica = [(r, share) for r, share in enumerate(shares) if data_ranks[r] == data_rank]
        if len({share for _, share in of_replica}) > 1:
            raise DivergedError(
                f"{step}: the ranks of one replica are about to train on different micro-batches: {_sides(of_replica)}"
            )


def _of_tensors(microbatches: Iterable[PackedBatch]) -> int:
    total = hashlib.blake2b(digest_size=8)
    for batch in microbatches:
        named = {"tokens": batch.tokens_T, "targets": batch.targets_T, "cuts": batch.cu_seqlens}
        for name, tensor in sorted((named | batch.fields).items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().numpy().data)
    return _number(total.digest())


def _number(checksum: bytes) -> int:
    return int.from_bytes(checksum, "little", signed=True)


def _sides(of_ranks: Iterable[tuple[int, int]]) -> str:
    """Return the ranks grouped by their data, the smaller groups first: `rank 1 differs from ranks 0, 2`."""
    sides: dict[int, list[str]] = defaultdict(list)
    for rank, value in of_ranks:
        sides[value].append(str(rank))
    ordered = sorted(sides.values(), key=lambda ranks: (len(ranks), -int(ranks[0])))
    texts = [f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for ranks in ordered]
    verb = "differs" if len(ordered[0]) == 1 else "differ"
    return f"{texts[0]} {verb} from {' and from '.join(texts[1:])}"


# --- copy to the GPU -----------------------------------------------------------------------------
def to_device(value: T, device: torch.device) -> T:
    """Return `value` with its tensors on `device`, but KEPT_ON_HOST: dataclasses, dicts, lists and tuples are searched.

    On a CPU nothing is copied. Tensors that are on the GPU already stay as they are.
    """
    if device.type == "cpu" and launch.stand_in is None:
        return value
    host: list[Tensor] = []
    mapped(host.append, value)
    if not host:
        return value
    starts, num_bytes = [], 0
    for tensor in host:
        starts.append(num_bytes)
        num_bytes += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    pinned = pinned_buffer(num_bytes)
    parts = list(zip(starts, host, strict=True))
    for start, tensor in parts:
        _part(pinned, start, tensor).copy_(tensor)
    buffer = copy_beside(pinned, device)
    moved = iter([_part(buffer, start, tensor) for start, tensor in parts])
    return mapped(lambda _: next(moved), value)


def mapped(fn: Callable[[Tensor], Any], value: Any) -> Any:
    """Return `value` with `fn` applied, in a fixed order, to its tensors that are not on a GPU."""
    if isinstance(value, Tensor):
        return value if launch.on_gpu(value) else fn(value)
    if isinstance(value, dict):
        return {key: mapped(fn, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(fn, item) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed = {
        f.name: mapped(fn, getattr(value, f.name))
        for f in fields(value)
        if f.name not in KEPT_ON_HOST
    }
    return _replaced(value, changed)


def _replaced(value: Any, changed: dict[str, Any]) -> Any:
    copy = object.__new__(type(value))
    for f in fields(value):  # frozen or not, and without running __post_init__ a second time
        object.__setattr__(copy, f.name, changed.get(f.name, getattr(value, f.name)))
    return copy


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def pinned_buffer(num_bytes: int) -> Tensor:
    """Return page-locked memory; torch reuses it once the copies from it are done."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


@functools.cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def copy_beside(pinned: Tensor, device: torch.device) -> Tensor:
    """Copy on a side stream. What the current stream gets to do from now on waits for the copy, the host does not."""
    stream, current = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        buffer = pinned.to(device, non_blocking=True)
    current.wait_stream(stream)
    buffer.record_stream(current)
    return buffer
