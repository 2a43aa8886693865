"""Plan of a preference batch: groups of whole pairs that are computed together.

All rows of a pair share a coefficient that is known after the pair's last logit. So chunks hold whole pairs, and
a pair longer than a chunk is a separate group. The host plans the groups from the number of rows of each sequence. Where
it does not know them (`sequence_M` is on a GPU, and the caller gave no `sequence_rows`) and one chunk cannot hold
everything, logits are computed twice.

Letters: M rows, P pairs, S = 2P sequences: 2i is the chosen and 2i + 1 the rejected answer of pair i.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels.backend.launch import host_knows
from phimini.kernels.head.call import HeadCall
from phimini.kernels.head.rows import HeadRows, move_counting_rows_first, rows_at


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGroup:
    """Pairs [first, last) and their rows."""

    first: int
    last: int
    rows: slice
    chosen_rows: int
    """Chosen rows of the first pair: its rejected rows begin behind them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPlan:
    """Rows in the order of computation, and the groups they form."""

    rows: HeadRows
    sequence_M: Tensor
    """Sequence of each of the rows."""
    groups: list[PairGroup] | None
    """None where the coefficients come from a first pass over all rows."""


SequenceRows = tuple[Sequence[int], Sequence[int]]
"""Rows of each sequence on this rank, and the most rows that it has on any rank of `sequence_group`."""


def plan_pairs(
    call: HeadCall, sequence_M: Tensor, weight_P: Tensor | None, num_sequences: int,
    sequence_group: dist.ProcessGroup | None, sequence_rows: SequenceRows | None,
) -> PairPlan:  # fmt: skip
    """Return the plan.

    Raises ValueError for a sequence outside [0, num_sequences), for rows that count, where the host can see it.
    """
    on_device_M = sequence_M.to(call.targets_M.device, non_blocking=True)
    counts_M = call.targets_M != call.options.ignore_index
    _check_sequences(call.options.op, on_device_M, counts_M, num_sequences)
    of_all_M = on_device_M.clamp(0, num_sequences - 1)  # ignored rows too, which lengths count
    on_device_M = of_all_M.where(counts_M, 0)
    counts_M = call.counts(None if weight_P is None else weight_P[on_device_M // 2])
    if not call.is_counted_on_device:
        return _sorted_plan(call, on_device_M, counts_M, num_sequences, sequence_group)
    if sequence_rows is None and sequence_group is None and host_knows(sequence_M):
        host_M = sequence_M.clamp(0, num_sequences - 1)
        own = torch.bincount(host_M, minlength=num_sequences).tolist()
        sequence_rows = own, own
    groups, segment_M, M = None, None, len(counts_M)
    # What is decided from `most` is the same on every rank of `sequence_group`, which then sum group by group.
    if sequence_rows is not None and sum(sequence_rows[1]) > call.chunk_rows:
        groups = pair_groups(*sequence_rows, call.chunk_rows)
        segment_M = _segments(of_all_M, groups, call.chunk_rows)
    elif call.chunk_rows < M:
        warnings.warn(
            f"linear_dpo: {M} rows do not fit one chunk of {call.chunk_rows}, and how many belong to which pair is not known "
            "on the host: logits are computed twice. Pass sequence_rows, sequence_M on the CPU or a larger chunk_bytes",
            stacklevel=2,
        )
    max_rows = call.options.max_rows if segment_M is None else None
    rows = move_counting_rows_first(call.hidden_MD, call.targets_M, counts_M, segment_M, max_rows)
    if groups is None and len(rows.targets_M) <= call.chunk_rows:
        groups = [
            PairGroup(
                first=0, last=num_sequences // 2, rows=slice(0, len(rows.targets_M)), chosen_rows=0
            )
        ]
    sequence_of_rows_M = rows.select(on_device_M, torch.int64)
    assert sequence_of_rows_M is not None, "selected from a tensor"
    return PairPlan(rows=rows, sequence_M=sequence_of_rows_M, groups=groups)


def _check_sequences(op: str, sequence_M: Tensor, counts_M: Tensor, num_sequences: int) -> None:
    if not host_knows(sequence_M):
        return
    bad_M = ((sequence_M < 0) | (sequence_M >= num_sequences)) & counts_M
    if bool(bad_M.any()):
        at = int(bad_M.nonzero()[0])
        raise ValueError(
            f"{op}: sequence_M[{at}] is {int(sequence_M[at])}, expected a sequence in [0, {num_sequences})"
        )


def _sorted_plan(
    call: HeadCall, sequence_M: Tensor, counts_M: Tensor, num_sequences: int, sequence_group: dist.ProcessGroup | None
) -> PairPlan:  # fmt: skip
    """Return the plan on a CPU: only the rows that count, in the order of their sequences."""
    kept_M = counts_M.nonzero()[:, 0]
    sequence_M = sequence_M[kept_M]
    if bool((sequence_M.diff() < 0).any()):
        sequence_M, order_M = sequence_M.sort(stable=True)
        kept_M = kept_M[order_M]
    elif len(kept_M) == len(counts_M):
        kept_M = None
    rows = rows_at(call.hidden_MD, call.targets_M, kept_M)
    length_S = torch.bincount(sequence_M, minlength=num_sequences)
    largest_S = length_S
    if sequence_group is not None:
        # All ranks must form the same groups, because they sum log-probs group by group.
        largest_S = length_S.clone()
        dist.all_reduce(largest_S, op=dist.ReduceOp.MAX, group=sequence_group)
    groups = pair_groups(length_S.tolist(), largest_S.tolist(), call.chunk_rows)
    return PairPlan(rows=rows, sequence_M=sequence_M, groups=groups)


def pair_groups(
    lengths: Sequence[int], largest: Sequence[int], rows_at_most: int
) -> list[PairGroup]:
    """Return groups of as many whole pairs as fit. `largest`: each sequence's greatest length on any rank, which decides."""
    pair_rows = [a + b for a, b in zip(largest[::2], largest[1::2], strict=True)]
    groups, first, start = [], 0, 0
    while first < len(pair_rows):
        last, budget = first + 1, rows_at_most - pair_rows[first]
        while last < len(pair_rows) and pair_rows[last] <= budget:
            budget -= pair_rows[last]
            last += 1
        stop = start + sum(lengths[2 * first : 2 * last])
        chosen_rows = lengths[2 * first]
        groups.append(
            PairGroup(first=first, last=last, rows=slice(start, stop), chosen_rows=chosen_rows)
        )
        first, start = last, stop
    return groups


def _segments(sequence_M: Tensor, groups: list[PairGroup], rows_at_most: int) -> Tensor:
    """Return (M,), the segment of each row; within a segment, rows that count come first. A long pair's halves are two.

    Made by comparisons: a table of segments would have to be copied to the GPU.
    """
    starts = []
    for group in groups:
        is_long = group.rows.stop - group.rows.start > rows_at_most
        starts += [2 * group.first, 2 * group.first + 1] if is_long else [2 * group.first]
    segment_M = torch.zeros_like(sequence_M)
    for start in starts[1:]:
        segment_M += sequence_M >= start
    return segment_M
