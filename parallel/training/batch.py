"""A micro-batch: whole documents laid end to end, with no padding between them.

T tokens of all documents, N documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.parallel.ranks.timing import phase

IGNORE = -100
"""target of a position that carries no loss"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One sequence with its targets, before packing."""

    tokens: Sequence[int]
    targets: Sequence[int]
    """targets[i] is what position i predicts, IGNORE where nothing is trained; as long as `tokens`"""
    token_fields: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """one value per token, e.g. the log-probability it was sampled with"""
    document_fields: Mapping[str, float] = field(default_factory=dict)
    """one value per document, e.g. its advantage"""
    name: str = ""
    """what an error message calls it, e.g. `rows.jsonl:17`"""


def next_token_targets(tokens: Sequence[int], trained: Sequence[bool]) -> list[int]:
    """Targets shifted by one: position i predicts token i + 1 if that token is trained; the last predicts nothing."""
    if len(tokens) != len(trained):
        raise ValueError(f"next_token_targets: {len(tokens)} tokens but {len(trained)} loss flags")
    shifted = [t if keep else IGNORE for t, keep in zip(tokens[1:], trained[1:], strict=True)]
    return [*shifted, IGNORE]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Documents end to end (THD layout). Document i is tokens cu_seqlens[i] to cu_seqlens[i + 1]."""

    tokens_T: Tensor
    """int64"""
    targets_T: Tensor
    """int64, IGNORE where no loss"""
    cu_seqlens: Tensor
    """(N + 1,) int32, on the CPU: boundaries, from 0 to T"""
    fields: dict[str, Tensor] = field(default_factory=dict)
    """anything else a head needs, per token (T,)"""
    document_fields: dict[str, Tensor] = field(default_factory=dict)
    """and per document (N,)"""
    names: tuple[str, ...] = ()
    """the documents' names, for error messages; () if they have none"""
    rows: Tensor | None = None
    """context parallel: which tokens of the whole micro-batch these T are; cu_seqlens, lengths and the
    document fields still speak of the whole documents. None means all, in order"""
    context_group: dist.ProcessGroup | None = None
    """the ranks that hold the other tokens; None if there are none"""

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.shape[0]

    @property
    def num_documents(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        cuts = self.cu_seqlens.tolist()
        return [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

    @property
    def document_ids_T(self) -> Tensor:
        """(T,) int64: which document each token belongs to; on the tokens' device."""
        lengths = self.cu_seqlens.diff().to(torch.int64)
        ids = torch.repeat_interleave(torch.arange(self.num_documents), lengths)
        return (ids if self.rows is None else ids[self.rows]).to(self.tokens_T.device)

    def once(self, x: Tensor) -> Tensor:
        """For a head under context parallelism: `x`, whole on each of the C ranks, as a share of which C make one.

        What a head returns is summed over the ranks. The value is divided, the gradient is not: each rank's backward
        adds its own tokens' part.
        """
        if self.context_group is None:
            return x
        return x + (x / self.context_group.size() - x).detach()

    def take(self, rows: Tensor, context_group: dist.ProcessGroup) -> "PackedBatch":
        """The tokens `rows` of this whole micro-batch, for the context rank that holds them."""
        assert self.rows is None, "already a part of a micro-batch"
        return replace(
            self,
            tokens_T=self.tokens_T[rows],
            targets_T=self.targets_T[rows],
            fields={k: v[rows] for k, v in self.fields.items()},
            rows=rows,
            context_group=context_group,
        )

    def to(self, device: torch.device) -> "PackedBatch":
        """Tokens, targets and fields on `device`; cu_seqlens and rows stay."""
        if self.tokens_T.device == device:
            return self
        return replace(
            self,
            tokens_T=self.tokens_T.to(device, non_blocking=True),
            targets_T=self.targets_T.to(device, non_blocking=True),
            fields={k: v.to(device, non_blocking=True) for k, v in self.fields.items()},
            document_fields={
                k: v.to(device, non_blocking=True) for k, v in self.document_fields.items()
            },
        )


def idle(batch: PackedBatch) -> PackedBatch:
    """Return `batch` with no target and every field 0: a rank with less to train on than the others runs it beside theirs.

    It goes through the same collectives and adds 0 to loss, count and gradients.
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
    """Lays `documents` end to end.

    If their tokens are not a multiple of `multiple_of`, a dummy document follows: token 0, no targets, fields 0. It
    is a document of its own, so that no real one gets longer and nothing real attends to it.
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
        tokens_T=torch.tensor(
            [t for d in documents for t in d.tokens] + [0] * tail, dtype=torch.int64
        ),
        targets_T=torch.tensor(
            [t for d in documents for t in d.targets] + [IGNORE] * tail, dtype=torch.int64
        ),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        fields=fields,
        document_fields=document_fields,
        names=tuple(d.name for d in documents) if any(d.name for d in documents) else (),
    )
