"""Direct preference optimisation of a linear head, forward and backward in three GEMMs.

    logp[s] = sum of the log-probs of sequence s's targets        sequences 2i (chosen) and 2i+1 (rejected) are pair i
    h = (logp[2i] - reference[2i]) - (logp[2i+1] - reference[2i+1])
    loss = sum over pairs of weight * (-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      e = label_smoothing
                                       + nll_weight * mean over chosen tokens of -logp)

Variants, each off by default: `length_normalized` takes mean log-probs instead of sums in h; `loss="ipo"` takes
(h - 1 / (2 beta))^2 instead of the sigmoid's terms (arXiv 2310.12036, eq. 17); `nll_scale_P` takes the given factor of
the chosen tokens' summed -logp instead of 1 / their number.

All rows of a pair share one factor, the derivative by h. It is known when the pair's last logit is computed. So rows are
sorted by sequence and chunks hold whole pairs: the logits are still in memory when the factor is known. A pair too long
for a chunk is computed in several chunks with factor 1 into a separate dW, which is scaled and added afterwards. That is
three GEMMs again, plus one pass over V * D numbers (two with nll_weight) for such a pair. Four GEMMs are needed only
where the host does not know the pairs' rows (`sequence_M` on a GPU, without `sequence_rows`) and one chunk cannot hold
them all.

Deterministic. Bound: compute, 6 * M * V * D FLOPs. Memory: chunk_bytes of logits, dW in fp32 (two or three of them if a
pair is longer than a chunk), dX.

Letters: M rows (tokens), D model width, V vocabulary (or this rank's V/TP rows), P pairs, S = 2P sequences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Unpack

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from phimini.kernels.backend.launch import host_knows
from phimini.kernels.head.call import HeadCall, LossOptions, LossResult, head_loss
from phimini.kernels.head.chunked import ChunkedHead, RowGrads
from phimini.kernels.head.options import HeadKeywords
from phimini.kernels.head.pairs import PairGroup, SequenceRows, plan_pairs
from phimini.kernels.head.rows import check_head, check_tensor, chunk_slices
from phimini.kernels.linear_logprob import linear_logprob_reference


class DpoMetrics(NamedTuple):
    """Unweighted sums over the pairs whose weight is not 0; scalars, detached."""

    preference_loss_sum: Tensor
    """Without the nll term."""
    chosen_reward_sum: Tensor
    """beta * (logp - reference)."""
    rejected_reward_sum: Tensor
    margin_sum: Tensor
    accuracy_sum: Tensor
    """Pairs whose chosen reward is the larger."""
    chosen_logp_sum: Tensor
    rejected_logp_sum: Tensor
    nll_sum: Tensor
    """Mean token nll of the chosen answers."""
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
    loss: Literal["dpo", "ipo"] = "dpo",
    length_normalized: bool = False,
    pair_weight_P: Tensor | None = None,
    nll_scale_P: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, DpoMetrics]:
    """The definition: full log-softmax, plain torch, gradients by autograd."""
    logp_M = linear_logprob_reference(
        hidden_MD, weight_VD, targets_M, ignore_index=ignore_index
    ).logp_M
    counts_M = targets_M != ignore_index
    zeros_S = logp_M.new_zeros(reference_logp_S.shape)
    index_M = sequence_M.to(targets_M.device).where(counts_M, 0)
    logp_S = zeros_S.index_add(0, index_M, logp_M)
    length_S = zeros_S.index_add(0, index_M, counts_M.to(logp_M.dtype))
    weight_P = (
        torch.ones_like(zeros_S[::2]) if pair_weight_P is None else pair_weight_P.to(logp_M.dtype)
    )
    if nll_scale_P is not None:
        nll_scale_P = nll_scale_P.to(logp_M.dtype)
    options = Dpo(
        beta=beta, label_smoothing=label_smoothing, nll_weight=nll_weight, loss=loss,
        length_normalized=length_normalized, sequence_group=None,
    )  # fmt: skip
    reference_S = reference_logp_S.to(logp_M.dtype)
    return _loss_of_pairs(logp_S, reference_S, length_S, weight_P, nll_scale_P, options)


def _loss_of_pairs(
    logp_S: Tensor, reference_S: Tensor, length_S: Tensor, weight_P: Tensor, nll_scale_P: Tensor | None, options: "Dpo"
) -> tuple[Tensor, DpoMetrics]:  # fmt: skip
    score_S = logp_S - reference_S
    if options.length_normalized:
        score_S = score_S / length_S.clamp_min(1)
    reward_P2 = options.beta * score_S.view(-1, 2)
    margin_P, smoothing = reward_P2[:, 0] - reward_P2[:, 1], options.label_smoothing
    if options.loss == "ipo":
        preference_P = ((margin_P - 0.5) / options.beta).square()
    else:
        preference_P = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)  # fmt: skip
    if nll_scale_P is None:
        nll_P = -logp_S[::2] / length_S[::2].clamp_min(1)
    else:
        nll_P = -logp_S[::2] * nll_scale_P
    loss = (weight_P * (preference_P + options.nll_weight * nll_P)).sum()
    counts_P = weight_P != 0
    values = (preference_P, reward_P2[:, 0], reward_P2[:, 1], margin_P, (margin_P > 0).to(loss.dtype), logp_S[::2],
              logp_S[1::2], nll_P, torch.ones_like(nll_P))  # fmt: skip
    return loss, DpoMetrics(*(value_P.detach().where(counts_P, 0).sum() for value_P in values))


# --- forward with gradients ----------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Dpo(LossOptions):
    """Options of the loss. `_DpoRun` computes it."""

    op = "linear_dpo"
    num_metrics = len(DpoMetrics._fields)

    beta: float
    label_smoothing: float
    nll_weight: float
    loss: Literal["dpo", "ipo"]
    length_normalized: bool
    sequence_group: dist.ProcessGroup | None
    sequence_rows: SequenceRows | None = None

    def run(self, call: HeadCall, values: Sequence[Tensor | None]) -> LossResult:
        return _DpoRun(self, call, values).run()


class _DpoRun:
    """One computation of the loss: log-probs of sequences, and the coefficients that follow from them."""

    def __init__(self, options: Dpo, call: HeadCall, values: Sequence[Tensor | None]) -> None:
        self.call, self.options = call, options
        self.nll_weight = options.nll_weight
        self.sequence_group = options.sequence_group
        if self.sequence_group is not None and self.sequence_group.size() == 1:
            self.sequence_group = None
        sequence_M, reference_S, weight_P, nll_scale_P = values
        assert sequence_M is not None and reference_S is not None, "not optional"
        self.plan = plan_pairs(
            call, sequence_M, weight_P, len(reference_S), self.sequence_group, options.sequence_rows
        )
        self.rows, self.sequence_M = self.plan.rows, self.plan.sequence_M
        self.reference_S = reference_S.to(call.dtype)
        self.weight_P = (
            torch.ones_like(self.reference_S[::2]) if weight_P is None else weight_P.to(call.dtype)
        )
        self.nll_scale_P = None if nll_scale_P is None else nll_scale_P.to(call.dtype)
        # sums of ones are exact in any order
        ones_M = self.rows.weights(None, call.dtype)
        self.length_S = torch.zeros_like(self.reference_S).index_add_(0, self.sequence_M, ones_M)
        if self.sequence_group is not None:
            dist.all_reduce(self.length_S, group=self.sequence_group)
        self.logp_S = torch.zeros_like(self.reference_S)
        self.scratch_VD: list[Tensor] = []

    def run(self) -> LossResult:
        head = self.call.open(self.rows)
        if self.plan.groups is None:
            self._twice(head)
        for group in self.plan.groups or []:
            if group.rows.stop - group.rows.start <= self.call.chunk_rows:
                self._whole_pairs(head, group)
            else:
                self._long_pair(head, group)
        loss, metrics = _loss_of_pairs(
            self.logp_S,
            self.reference_S,
            self.length_S,
            self.weight_P,
            self.nll_scale_P,
            self.options,
        )
        return LossResult(loss, torch.stack(metrics), head.finish(), None)

    def _sequence_within(self, sequences: slice, rows: slice) -> Tensor:
        """Return each row's sequence within `sequences`; ignored rows have sequence 0 and log-prob 0, and may be anywhere."""
        return (self.sequence_M[rows] - sequences.start).clamp_min(0)

    def _add_logp(self, sequences: slice, rows: slice, logp_M: Tensor) -> None:
        """Add the rows' log-probs to their sequences. In fp64, for thousands of tokens; without atomics on a GPU."""
        sequence_M = self._sequence_within(sequences, rows)
        num = sequences.stop - sequences.start
        if not host_knows(logp_M):
            is_of_SM = sequence_M == torch.arange(num, device=logp_M.device)[:, None]
            sums_S = torch.where(is_of_SM, logp_M.double(), 0).sum(1)
        else:
            sums_S = torch.zeros(num, dtype=torch.float64).index_add_(
                0, sequence_M, logp_M.double()
            )
        if self.sequence_group is not None:
            dist.all_reduce(sums_S, group=self.sequence_group)
        self.logp_S[sequences] = sums_S.to(self.logp_S.dtype)

    def _coefficients(self, sequences: slice) -> Tensor:
        """Return d loss / d logp of a token of each of these sequences."""
        beta, smoothing = self.options.beta, self.options.label_smoothing
        pairs = slice(sequences.start // 2, sequences.stop // 2)
        score_S = (self.logp_S - self.reference_S)[sequences]
        length_S = self.length_S[sequences].clamp_min(1)
        if self.options.length_normalized:
            score_S = score_S / length_S
        reward_P2 = beta * score_S.view(-1, 2)
        margin_P = reward_P2[:, 0] - reward_P2[:, 1]
        if self.options.loss == "ipo":
            dh_P = 2 * (margin_P - 0.5) / beta
        else:
            dh_P = beta * (
                smoothing * torch.sigmoid(margin_P) - (1 - smoothing) * torch.sigmoid(-margin_P)
            )
        chosen_P, rejected_P = dh_P, -dh_P
        if self.options.length_normalized:
            chosen_P, rejected_P = chosen_P / length_S[::2], rejected_P / length_S[1::2]
        if self.nll_scale_P is None:
            chosen_P = chosen_P - self.nll_weight / length_S[::2]
        else:
            chosen_P = chosen_P - self.nll_weight * self.nll_scale_P[pairs]
        return (self.weight_P[pairs, None] * torch.stack([chosen_P, rejected_P], 1)).flatten()

    def _whole_pairs(self, head: ChunkedHead, group: PairGroup) -> None:
        rows, sequences = group.rows, slice(2 * group.first, 2 * group.last)
        has_rows = rows.stop > rows.start
        logp_M = head.forward(rows).logp_M if has_rows else self.logp_S[:0]
        self._add_logp(sequences, rows, logp_M)
        if self.call.needs_gradient and has_rows:
            of_row_M = self._coefficients(sequences)[self._sequence_within(sequences, rows)]
            head.backward(rows, RowGrads(of_row_M))

    def _long_pair(self, head: ChunkedHead, group: PairGroup) -> None:
        """Compute unit gradients into scratch dWs, and scale them when the pair's coefficient is known."""
        middle = group.rows.start + group.chosen_rows
        halves = (slice(group.rows.start, middle), slice(middle, group.rows.stop))
        # Where the coefficients of the two halves differ in sign only, one scratch is enough.
        is_antisymmetric = not self.nll_weight and not self.options.length_normalized
        signs = (1.0, -1.0) if is_antisymmetric else (1.0, 1.0)
        dw_VD, scratch_VD = head.dw_VD, self._scratch(head, 1 if is_antisymmetric else 2)
        logps = [self.logp_S[:0]]
        for half, sign, head.dw_VD in zip(
            halves, signs, (scratch_VD[0], scratch_VD[-1]), strict=True
        ):
            for chunk in chunk_slices(half.stop - half.start, self.call.chunk_rows):
                rows = slice(half.start + chunk.start, half.start + chunk.stop)
                logps.append(head.forward(rows).logp_M)
                if self.call.needs_gradient:
                    head.backward(rows, RowGrads(torch.full_like(logps[-1], sign)))
        head.dw_VD = dw_VD
        sequences = slice(2 * group.first, 2 * group.last)
        self._add_logp(sequences, group.rows, torch.cat(logps))
        if not self.call.needs_gradient:
            return
        chosen, rejected = self._coefficients(sequences).unbind()
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

    def _twice(self, head: ChunkedHead) -> None:
        """Compute logits twice, four GEMMs: log-probs by the kernel that keeps no logits, then all with known coefficients."""
        first = self.call.open(self.rows, statistics_only=True)
        logps = [self.logp_S[:0], *(first.forward(chunk).logp_M for chunk in first.chunks)]
        sequences = slice(0, len(self.logp_S))
        self._add_logp(sequences, slice(0, len(self.sequence_M)), torch.cat(logps))
        if self.call.needs_gradient:
            of_row_M = self._coefficients(sequences)[self.sequence_M]
            for chunk in head.chunks:
                head.forward(chunk)
                head.backward(chunk, RowGrads(of_row_M[chunk]))


def _check_rows(op: str, rows: SequenceRows | None, num_sequences: int, M: int) -> None:
    if rows is None:
        return
    own, most = rows
    fits = len(own) == len(most) == num_sequences and sum(own) == M
    if not fits or any(a > b for a, b in zip(own, most, strict=True)):
        raise ValueError(
            f"{op}: sequence_rows must be two lists of {num_sequences} numbers, the first of which sum to {M} rows and are at "
            f"most those of the second, got {len(own)} numbers that sum to {sum(own)}, and {len(most)} that sum to {sum(most)}"
        )


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
    loss: Literal["dpo", "ipo"] = "dpo",
    length_normalized: bool = False,
    pair_weight_P: Tensor | None = None,
    nll_scale_P: Tensor | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    sequence_rows: SequenceRows | None = None,
    main_grad: Tensor | None = None,
    **head: Unpack[HeadKeywords],
) -> tuple[Tensor, DpoMetrics]:
    """Return (sum over pairs of weight * loss, metrics); fp32 scalars (fp64 for fp64 input).

    sequence_M (M,) int64: each row's sequence, 2i the chosen and 2i+1 the rejected answer of pair i; rows in any order.
    The host plans chunks of whole pairs: from sequence_M on a CPU, or from sequence_rows where sequence_M is on a GPU.
    sequence_rows: (rows of each sequence among these M, the most rows of it on any rank of sequence_group), ignored rows
    included.
    reference_logp_S (2P,): the reference model's sums. pair_weight_P (P,): rows of a pair of weight 0 are not computed.
    nll_weight: factor of the mean token nll of the chosen answer, which is added to the loss.
    nll_scale_P (P,): factor of the summed token nll of the chosen answer, instead of 1 / its tokens.
    loss, length_normalized: the variants of the file's docstring; IPO has no label_smoothing.
    sequence_group: context parallel, each rank has some rows of each sequence: log-probs are summed over the group,
    every rank returns the whole loss, and the ranks' gradients add up to the loss's gradient.
    The other arguments, and the errors raised: as in `linear_cross_entropy`.
    """
    options = Dpo(
        beta=beta, label_smoothing=label_smoothing, nll_weight=nll_weight, loss=loss,
        length_normalized=length_normalized, sequence_group=sequence_group,
        sequence_rows=None if sequence_rows is None else (tuple(sequence_rows[0]), tuple(sequence_rows[1])),
        with_entropy=False, **head,
    )  # fmt: skip
    op = options.op
    check_head(options, hidden_MD, weight_VD, targets_M, main_grad=main_grad)
    check_tensor(op, "sequence_M", sequence_M, None, tuple(targets_M.shape))
    check_tensor(op, "reference_logp_S", reference_logp_S, weight_VD.device)
    if sequence_group is not None and not isinstance(sequence_group, dist.ProcessGroup):
        raise ValueError(
            f"{op}: sequence_group must be a ProcessGroup or None, got {sequence_group!r}"
        )
    if sequence_M.dtype != torch.int64:
        raise ValueError(f"{op}: sequence_M must be int64, got {sequence_M.dtype}")
    if reference_logp_S.ndim != 1 or reference_logp_S.shape[0] % 2:
        raise ValueError(
            f"{op}: reference_logp_S must be (2P,), one per sequence, got {tuple(reference_logp_S.shape)}"
        )
    _check_rows(op, sequence_rows, len(reference_logp_S), len(targets_M))
    for name, value_P in (("pair_weight_P", pair_weight_P), ("nll_scale_P", nll_scale_P)):
        num_pairs = reference_logp_S.shape[0] // 2
        if value_P is not None:
            check_tensor(op, name, value_P, weight_VD.device)
        if value_P is not None and value_P.shape != (num_pairs,):
            raise ValueError(
                f"{op}: {name} must be ({num_pairs},), one per pair, got {tuple(value_P.shape)}"
            )
    if loss not in ("dpo", "ipo") or (loss == "ipo" and label_smoothing):
        raise ValueError(
            f"{op}: expected loss in dpo, ipo, and label_smoothing with dpo only, got {loss!r} with {label_smoothing}"
        )
    if not (0 <= label_smoothing < 0.5 and 0 <= nll_weight < math.inf and 0 < beta < math.inf):
        raise ValueError(
            f"{op}: expected beta > 0, label_smoothing in [0, 0.5), nll_weight >= 0, "
            f"got {beta}, {label_smoothing}, {nll_weight}"
        )
    values = [sequence_M, reference_logp_S, pair_weight_P, nll_scale_P]
    total, metrics_9, _ = head_loss(
        options, hidden_MD, weight_VD, targets_M, values, main_grad=main_grad
    )
    return total, DpoMetrics(*metrics_9.unbind())
