"""Context parallelism over packed documents: the tokens of each rank, the keys they see, and the gather of all keys.

T tokens of the whole micro-batch, C context ranks, G key/value heads, K head size.

The pack is cut into 2C equal chunks, and rank r holds chunks r and 2C - 1 - r. Late tokens see many keys and early
tokens few, so this balances the work. Documents are cut at the ends of chunks, without padding. Keys and values are
either gathered over the ranks and their gradients reduce-scattered (this module; Llama 3, arXiv 2407.21783, section
3.3.2), or passed around a ring of ranks block by block (`ring.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive queries of one document, and the keys that the last of them sees.

    Query i of the piece sees its first (num_keys - num_queries + i + 1) keys.
    """

    query_begin: int
    """row among this rank's tokens"""
    query_end: int
    key_begin: int
    """token of the whole micro-batch"""
    key_end: int


def spans_of_rank(num_tokens: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Return the token ranges of the micro-batch that context rank `rank` of `size` holds, in its order."""
    if size == 1:
        return [(0, num_tokens)]
    assert num_tokens % (2 * size) == 0, f"{num_tokens} tokens do not divide into 2 x {size} chunks"
    chunk = num_tokens // (2 * size)
    return [(i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)]


def rows_of_rank(num_tokens: int, rank: int, size: int) -> Tensor:
    """Return the tokens of `spans_of_rank` as indices (T / C,) int64."""
    return torch.cat([torch.arange(a, b) for a, b in spans_of_rank(num_tokens, rank, size)])


def pieces_of_rank(cuts: list[int], rank: int, size: int) -> tuple[Piece, ...]:
    """Return the parts of documents in a rank's two chunks.

    `cuts` are the documents' boundaries, from 0 to T.
    """
    pieces, row = [], 0
    for begin, end in spans_of_rank(cuts[-1], rank, size):
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            first, last = max(a, begin), min(b, end)
            if first < last:
                start = row + first - begin
                pieces.append(Piece(start, start + last - first, a, last))
        row += end - begin
    return tuple(pieces)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate parts (1, H, length, K) into (sum of lengths, H, K)."""
    return torch.cat([x.transpose(1, 2) for x in parts], 1)[0]


@dataclass(frozen=True, slots=True)
class Block:
    """Queries of this rank and keys of one rank, for one call of an attention kernel.

    Rows index the rank's tokens; cuts count from the block's first row. A causal block is the rank's tokens with
    themselves, one part of a document after the other. Any other block is one rectangle: every query sees every key.
    """

    query_begin: int
    query_end: int
    key_begin: int
    key_end: int
    query_cuts: Tensor
    """(number of parts + 1,) int32, on the device"""
    key_cuts: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    part_lengths: tuple[int, ...]
    """queries of each part, for a kernel that is called once per part"""


def blocks_of_hop(cuts: list[int], rank: int, source: int, size: int) -> tuple[Block, ...]:
    """Return, with tensors on the CPU, the blocks that `rank` computes while it holds the keys of rank `source`.

    `cuts` are the documents' boundaries, from 0 to T. Chunks of `source` that lie after a query's chunk are left out,
    and so are keys of other documents. Two different chunks share at most one document, which runs from the earlier
    into the later, and a document in three of the chunks fills the middle one. At most one rectangle remains, besides
    the causal block of a rank with itself.
    """
    chunk = cuts[-1] // (2 * size)
    blocks = []
    if rank == source:
        lengths = [p.query_end - p.query_begin for p in pieces_of_rank(cuts, rank, size)]
        blocks.append(_block((0, 2 * chunk), (0, 2 * chunk), lengths, lengths, True))
    queries, keys = [], []
    for i, (query_begin, query_end) in enumerate(spans_of_rank(cuts[-1], rank, size)):
        a, b = next(
            (a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if a <= query_begin < b
        )
        for j, (key_begin, key_end) in enumerate(spans_of_rank(cuts[-1], source, size)):
            if key_end <= query_begin and a < key_end:
                queries += [i * chunk, i * chunk + min(b, query_end) - query_begin]
                keys += [j * chunk + max(a, key_begin) - key_begin, (j + 1) * chunk]
    if queries:
        rows, columns = (min(queries), max(queries)), (min(keys), max(keys))
        sides = [rows[1] - rows[0]], [columns[1] - columns[0]]
        blocks.append(_block(rows, columns, *sides, False))
    return tuple(blocks)


def _block(
    rows: tuple[int, int], columns: tuple[int, int], query_lengths: list[int], key_lengths: list[int],
    causal: bool,
) -> Block:  # fmt: skip
    query_cuts, key_cuts = (
        torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (query_lengths, key_lengths)
    )
    return Block(
        *rows, *columns, query_cuts, key_cuts, max(query_lengths), max(key_lengths), causal,
        tuple(query_lengths),
    )  # fmt: skip


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = group.size()
        ctx.group = group
        gathered = kv.new_empty(size, *kv.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), kv.contiguous(), group=group)
        first, second = gathered.chunk(2, dim=1)
        return torch.cat((*first, *second.flip(0)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        chunks = grads[0].chunk(2 * size)
        by_rank = torch.cat([chunks[i] for r in range(size) for i in (r, 2 * size - 1 - r)])
        dkv = by_rank.new_empty(by_rank.shape[0] // size, *by_rank.shape[1:])
        dist.reduce_scatter_tensor(dkv, by_rank, group=ctx.group)
        return dkv, None


def gather_keys(k_TGK: Tensor, v_TGK: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather keys and values of T/C tokens per rank into those of the whole micro-batch, in token order."""
    kv: Tensor = _GatherKeys.apply(torch.cat((k_TGK, v_TGK), -1), group)  # pyright: ignore[reportAssignmentType]
    k_TGK, v_TGK = kv.chunk(2, dim=-1)
    return k_TGK, v_TGK
