"""Direct preference optimisation of a linear head, forward and backward in three GEMMs.

    logp[s] = sum of the log-probs of sequence s's targets        sequences 2i (chosen) and 2i+1 (rejected) are pair i
    h = (logp[2i] - reference[2i]) - (logp[2i+1] - reference[2i+1])
    loss = sum over pairs of weight * (-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      e = label_smoothing
                                       + nll_weight * mean over chosen tokens of -logp)

All rows of a pair share one unknown number, the derivative by h, known when the pair's last logit is. Rows are put in the
order of their sequences and chunks hold whole pairs, so the logits are still there when it is. A pair too long for a
chunk is computed in several with coefficient 1 into a dW of its own, which is scaled into the sum afterwards:
three GEMMs again, at the price of one pass over V * D numbers (two with nll_weight) per such pair.

Deterministic. Bound: compute, 6 * M * V * D FLOPs. Memory: chunk_bytes of logits, dW in fp32 (two or three of them if a
pair is longer than a chunk), dX.

Letters: M rows (tokens), D model width, V vocabulary (or this rank's V/TP rows), P pairs, S = 2P sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from phimini.kernels._head_base import ChunkedHead, RowGrads
from phimini.kernels._head_call import group_of, name_of
from phimini.kernels._head_loss_op import HeadLoss, LossCall
from phimini.kernels._head_rows import (
    HeadRows,
    check_head,
    check_main_grad,
    check_rows,
    check_targets,
    chunk_slices,
)
from phimini.kernels.linear_logprob import linear_logprob_reference


class DpoMetrics(NamedTuple):
    """Sums over the pairs whose weight is not 0, without their weights; scalars, detached."""

    preference_loss_sum: Tensor
    """without the nll term"""
    chosen_reward_sum: Tensor
    """beta * (logp - reference)"""
    rejected_reward_sum: Tensor
    margin_sum: Tensor
    accuracy_sum: Tensor
    """pairs whose chosen reward is the larger"""
    chosen_logp_sum: Tensor
    rejected_logp_sum: Tensor
    nll_sum: Tensor
    """of the chosen answers' mean token nll"""
    num_pairs: Tensor


# --- reference -----------------------------------------------------------------------------------
def linear_dpo_reference(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    sequence_M: Tensor,
    reference_logp_S: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    pair_weight_P: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, DpoMetrics]:
    """The definition: full log-softmax, plain torch, gradients by autograd."""
    logp_M = linear_logprob_reference(
        hidden_MD, weight_VD, targets_M, ignore_index=ignore_index
    ).logp_M
    counts_M = targets_M != ignore_index
    zeros_S = logp_M.new_zeros(reference_logp_S.shape)
    index_M = sequence_M.where(counts_M, 0)
    logp_S = zeros_S.index_add(0, index_M, logp_M)
    length_S = zeros_S.index_add(0, index_M, counts_M.to(logp_M.dtype))
    weight_P = (
        torch.ones_like(zeros_S[::2]) if pair_weight_P is None else pair_weight_P.to(logp_M.dtype)
    )
    return _loss_of_pairs(
        logp_S,
        reference_logp_S.to(logp_M.dtype),
        length_S,
        weight_P,
        beta,
        label_smoothing,
        nll_weight,
    )


def _loss_of_pairs(
    logp_S: Tensor, reference_S: Tensor, length_S: Tensor, weight_P: Tensor, beta: float, smoothing: float,
    nll_weight: float,
) -> tuple[Tensor, DpoMetrics]:  # fmt: skip
    reward_P2 = beta * (logp_S - reference_S).view(-1, 2)
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    preference_P = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
    nll_P = -logp_S[::2] / length_S[::2].clamp_min(1)
    loss = (weight_P * (preference_P + nll_weight * nll_P)).sum()
    counts_P = weight_P != 0
    values = (preference_P, reward_P2[:, 0], reward_P2[:, 1], margin_P, (margin_P > 0).to(loss.dtype), logp_S[::2],
              logp_S[1::2], nll_P, torch.ones_like(nll_P))  # fmt: skip
    return loss, DpoMetrics(*(value_P.detach().where(counts_P, 0).sum() for value_P in values))


# --- which rows go together ------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _PairGroup:
    """Pairs [first, last) that are computed together, and their rows among the sorted ones."""

    first: int
    last: int
    rows: slice
    chosen_rows: int
    """of the first pair: where its rejected rows begin"""


def _sorted_rows(
    call: LossCall, sequence_M: Tensor, weight_P: Tensor | None
) -> tuple[HeadRows, Tensor]:
    """(rows that count, in the order of their sequences; the sequence of each)."""
    num_sequences = call.row_values[1].shape[0]  # pyright: ignore[reportOptionalMemberAccess]
    counts_M = call.targets_M != call.ignore_index
    index_M = sequence_M.where(counts_M, 0)
    bad_M = (index_M < 0) | (index_M >= num_sequences)
    if bool(bad_M.any()):
        at = int(bad_M.nonzero()[0])
        raise ValueError(
            f"{call.op}: sequence_M[{at}] is {int(sequence_M[at])}, expected a sequence in [0, {num_sequences})"
        )
    if weight_P is not None:
        counts_M = counts_M & (weight_P[index_M // 2] != 0)
    kept_M = counts_M.nonzero()[:, 0]
    sequence_M = sequence_M[kept_M]
    if bool((sequence_M.diff() < 0).any()):
        sequence_M, order_M = sequence_M.sort(stable=True)
        kept_M = kept_M[order_M]
    is_all = kept_M.shape[0] == counts_M.shape[0] and bool((kept_M.diff() > 0).all())
    kept_M = None if is_all else kept_M
    targets_M = call.targets_M if kept_M is None else call.targets_M[kept_M]
    num_classes = call.weight_VD.shape[0] * (1 if call.group is None else call.group.size())
    check_targets(call.op, targets_M, kept_M, num_classes)
    x_MD = call.hidden_MD.contiguous() if kept_M is None else call.hidden_MD[kept_M]
    return HeadRows(
        x_MD=x_MD, targets_M=targets_M, kept_M=kept_M, num_total=counts_M.shape[0]
    ), sequence_M


def _pair_groups(
    length_S: Tensor, rows_at_most: int, sequence_group: dist.ProcessGroup | None
) -> list[_PairGroup]:
    """As many whole pairs as fit. All ranks of a sequence group form the same groups: they sum logp group by group."""
    largest_P = length_S.view(-1, 2).sum(1)
    if sequence_group is not None:
        largest_P = largest_P.clone()
        dist.all_reduce(largest_P, op=dist.ReduceOp.MAX, group=sequence_group)
    lengths, largest = length_S.tolist(), largest_P.tolist()
    groups, first, start = [], 0, 0
    while first < len(largest):
        last, budget = first + 1, rows_at_most - largest[first]
        while last < len(largest) and largest[last] <= budget:
            budget -= largest[last]
            last += 1
        stop = start + sum(lengths[2 * first : 2 * last])
        groups.append(_PairGroup(first, last, slice(start, stop), lengths[2 * first]))
        first, start = last, stop
    return groups


# --- forward with gradients, custom op ------------------------------------------------------------
class _Dpo:
    """The loss over one call: log-probs of sequences, and the coefficients they give."""

    def __init__(self, call: LossCall) -> None:
        self.call = call
        self.beta, self.smoothing, self.nll_weight = call.numbers
        self.sequence_group = group_of(call.words)
        sequence_M, reference_S, weight_P = call.row_values
        assert sequence_M is not None and reference_S is not None
        self.rows, self.sequence_M = _sorted_rows(call, sequence_M, weight_P)
        self.reference_S = reference_S.to(call.dtype)
        self.weight_P = (
            torch.ones_like(self.reference_S[::2]) if weight_P is None else weight_P.to(call.dtype)
        )
        self.local_length_S = torch.bincount(self.sequence_M, minlength=reference_S.shape[0])
        self.length_S = self.local_length_S.to(call.dtype)
        if self.sequence_group is not None:
            dist.all_reduce(self.length_S, group=self.sequence_group)
        self.logp_S = torch.zeros_like(self.reference_S)
        self.scratch_VD: list[Tensor] = []

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        head = self.call.open_for_loss(self.rows)
        for group in _pair_groups(self.local_length_S, self.call.chunk_rows, self.sequence_group):
            if group.rows.stop - group.rows.start <= self.call.chunk_rows:
                self._whole_pairs(head, group)
            else:
                self._long_pair(head, group)
        loss, metrics = _loss_of_pairs(
            self.logp_S,
            self.reference_S,
            self.length_S,
            self.weight_P,
            self.beta,
            self.smoothing,
            self.nll_weight,
        )
        return loss, torch.stack(metrics), self.call.close(head, self.rows)

    def _add_logp(self, group: _PairGroup, logp_M: Tensor) -> None:
        """Sums in fp64: an answer has thousands of tokens."""
        sums_S = torch.zeros_like(
            self.logp_S[2 * group.first : 2 * group.last], dtype=torch.float64
        )
        sums_S.index_add_(0, self.sequence_M[group.rows] - 2 * group.first, logp_M.double())
        if self.sequence_group is not None:
            dist.all_reduce(sums_S, group=self.sequence_group)
        self.logp_S[2 * group.first : 2 * group.last] = sums_S

    def _coefficients(self, group: _PairGroup) -> Tensor:
        """d loss / d logp of a token, for the group's sequences, (2 pairs,)."""
        pairs, sequences = slice(group.first, group.last), slice(2 * group.first, 2 * group.last)
        rewards_P2 = self.beta * (self.logp_S - self.reference_S)[sequences].view(-1, 2)
        margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        dh_P = self.beta * (
            self.smoothing * torch.sigmoid(margin_P)
            - (1 - self.smoothing) * torch.sigmoid(-margin_P)
        )
        chosen_P = dh_P - self.nll_weight / self.length_S[sequences][::2].clamp_min(1)
        return (self.weight_P[pairs, None] * torch.stack([chosen_P, -dh_P], 1)).flatten()

    def _whole_pairs(self, head: ChunkedHead, group: _PairGroup) -> None:
        has_rows = group.rows.stop > group.rows.start
        logp_M = head.forward(group.rows).logp_M if has_rows else self.logp_S.new_empty(0)
        self._add_logp(group, logp_M)
        if self.call.needs_gradient and has_rows:
            of_row_M = self._coefficients(group)[self.sequence_M[group.rows] - 2 * group.first]
            head.backward(group.rows, RowGrads(of_row_M))

    def _long_pair(self, head: ChunkedHead, group: _PairGroup) -> None:
        """Unit gradients into scratch dWs, scaled when the pair's coefficient is known."""
        middle = group.rows.start + group.chosen_rows
        halves = (slice(group.rows.start, middle), slice(middle, group.rows.stop))
        # Without an nll term the two halves' coefficients differ in sign only: one scratch does.
        signs = (1.0, 1.0) if self.nll_weight else (1.0, -1.0)
        dw_VD, scratch_VD = head.dw_VD, self._scratch(head, 2 if self.nll_weight else 1)
        logps = []
        for half, sign, head.dw_VD in zip(
            halves, signs, [scratch_VD[0], scratch_VD[-1]], strict=True
        ):
            for chunk in chunk_slices(half.stop - half.start, self.call.chunk_rows):
                rows = slice(half.start + chunk.start, half.start + chunk.stop)
                logps.append(head.forward(rows).logp_M)
                if self.call.needs_gradient:
                    head.backward(rows, RowGrads(torch.full_like(logps[-1], sign)))
        head.dw_VD = dw_VD
        self._add_logp(group, torch.cat(logps) if logps else self.logp_S.new_empty(0))
        if not self.call.needs_gradient:
            return
        chosen, rejected = self._coefficients(group).unbind()
        for half, coefficient in zip(halves, (chosen * signs[0], rejected * signs[1]), strict=True):
            if head.dx_MD is not None:
                head.dx_MD[half] *= coefficient
        if dw_VD is not None:
            for scratch, coefficient in zip(scratch_VD, (chosen, rejected), strict=False):
                assert scratch is not None, "scratch exists where dW is wanted"
                dw_VD += scratch.mul_(coefficient)

    def _scratch(self, head: ChunkedHead, num: int) -> list[Tensor | None]:
        if head.dw_VD is None:
            return [None] * num
        while len(self.scratch_VD) < num:
            self.scratch_VD.append(torch.empty_like(head.dw_VD))
        return [scratch.zero_() for scratch in self.scratch_VD]


_dpo = HeadLoss("linear_dpo", len(DpoMetrics._fields), lambda call: _Dpo(call).run())


# --- public op -----------------------------------------------------------------------------------
def linear_dpo(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    sequence_M: Tensor,
    reference_logp_S: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    pair_weight_P: Tensor | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    sequence_group: dist.ProcessGroup | None = None,
    main_grad: Tensor | None = None,
    chunk_bytes: int | None = None,
    _backend: str = "",
) -> tuple[Tensor, DpoMetrics]:
    """(sum over pairs of weight * loss, metrics); fp32 scalars (fp64 for fp64 input).

    sequence_M (M,) int64: row -> sequence, 2i the chosen and 2i+1 the rejected answer of pair i; rows may come in any
    order. reference_logp_S (2P,): the reference model's sums. pair_weight_P (P,): rows of a pair of weight 0 are
    not computed. nll_weight: adds that times the mean token nll of the chosen answer.
    sequence_group: context parallel, each rank has some rows of each sequence: log-probs are summed over the group,
    every rank returns the whole loss, and the ranks' gradients add up to the loss's gradient.
    The other arguments, and the errors raised: as in `linear_cross_entropy`.
    """
    op = "linear_dpo"
    check_head(op, hidden_MD, weight_VD, targets_M, 1.0, group, sequence_parallel, chunk_bytes)
    check_rows(op, "sequence_M", sequence_M, targets_M.shape[0])
    check_main_grad(op, main_grad, weight_VD)
    if sequence_M.dtype != torch.int64:
        raise ValueError(f"{op}: sequence_M must be int64, got {sequence_M.dtype}")
    if reference_logp_S.ndim != 1 or reference_logp_S.shape[0] % 2:
        raise ValueError(
            f"{op}: reference_logp_S must be (2P,), one per sequence, got {tuple(reference_logp_S.shape)}"
        )
    if pair_weight_P is not None and pair_weight_P.shape != (reference_logp_S.shape[0] // 2,):
        raise ValueError(
            f"{op}: pair_weight_P must be ({reference_logp_S.shape[0] // 2},), one per pair, got {tuple(pair_weight_P.shape)}"
        )
    if not 0 <= label_smoothing < 0.5 or nll_weight < 0 or beta <= 0:
        raise ValueError(
            f"{op}: expected beta > 0, label_smoothing in [0, 0.5), nll_weight >= 0, "
            f"got {beta}, {label_smoothing}, {nll_weight}"
        )
    loss, metrics_9 = _dpo(
        hidden_MD, weight_VD, targets_M, row_values=[sequence_M, reference_logp_S, pair_weight_P],
        numbers=[beta, label_smoothing, nll_weight], words=name_of(sequence_group),
        temperature=1.0, ignore_index=ignore_index, group=group, sequence_parallel=sequence_parallel,
        main_grad=main_grad, chunk_bytes=chunk_bytes, backend=_backend,
    )  # fmt: skip
    return loss, DpoMetrics(*metrics_9.unbind())
