"""The head, one chunk of rows at a time: logits, statistics, then gradients from coefficients.

    z = x W^T / temperature        lse = log sum exp z       logp = z[target] - lse
    H = lse - sum p z              (entropy)                 zbar = mean z      (label smoothing)

A loss of these has, per row, the gradient with respect to the logits

    dz = (dlse - dlogp) p + dlogp onehot - dH p (z - sum p z) + dzbar / V

so a back-end needs a few numbers per row between its logit GEMM and its two gradient GEMMs. Every loss here knows them
as soon as a chunk's statistics are known: three GEMMs for forward and backward together.

Vocab-parallel: each rank has V/TP rows of W. Ranks gather (max, sum, entropy sum, target logit) per row and
merge them in rank order, so all ranks have bit-equal statistics; dX is summed over the ranks at the end.

Letters: M rows, D model width, V vocabulary rows of this rank, R ranks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels.backend.launch import host_knows
from phimini.kernels.head.rows import HeadRows, chunk_slices

MAX, SUM, WEIGHTED, TARGET = 0, 1, 2, -1
"""Rows of `stats_KM`, a rank's part of the softmax of each row: the largest logit, the sum of exp(z - max), for the entropy
alone the sum of exp(z - max) * (z - max), and last the target's logit, 0 where another rank has the target."""


class RowStats(NamedTuple):
    """Statistics of each row, (M,) each; fp64, the mean logit in the compute dtype."""

    logp_M: Tensor
    max_M: Tensor
    log_sum_M: Tensor
    """Log of the sum of exp(z - max); lse is `max_M + log_sum_M`."""
    entropy_M: Tensor | None
    mean_logit_M: Tensor | None
    is_top_M: Tensor
    """Whether the target has the largest logit, bool; a tie counts."""


class RowGrads(NamedTuple):
    """d loss / d statistic, (M,) each; None is 0."""

    logp_M: Tensor
    lse_M: Tensor | None = None
    entropy_M: Tensor | None = None
    mean_logit_M: Tensor | None = None


class LogitGrads(NamedTuple):
    """Factors of dz = scale * exp(z - max) * (softmax - entropy * (z - max + shift)) + target * onehot, max of this rank."""

    scale_M: Tensor
    softmax_M: Tensor
    target_M: Tensor
    entropy_M: Tensor | None
    shift_M: Tensor | None


class ChunkedHead:
    """The part of the head that the back-ends share; they provide `logits`, `gradients` and `scaled_rows`.

    For each of `chunks`: `stats = head.forward(rows)`, then, where gradients are wanted, `head.backward(rows, grads)`.
    At the end `head.finish()`. `dx_MD` is written, `dw_VD` added to; None where that gradient is not wanted.
    """

    CHUNK_MULTIPLE = 32
    """Chunks have a multiple of so many rows, but for the last."""

    def __init__(
        self,
        rows: HeadRows,
        weight_VD: Tensor,
        chunk_rows: int,
        *,
        temperature: float | Tensor = 1.0,
        group: dist.ProcessGroup | None = None,
        needs_dx: bool = False,
        dw_VD: Tensor | None = None,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
        with_mean_logit: bool = False,
        sequence_parallel: bool = False,
        on_gpu: bool = False,
    ) -> None:
        """`chunk_rows`: the most rows of a chunk. `temperature` as a tensor has one value per row that counts."""
        V, D = weight_VD.shape
        self.rows = rows
        self.chunks = chunk_slices(len(rows.targets_M), chunk_rows, self.CHUNK_MULTIPLE)
        self.sequence_parallel, self.on_gpu = sequence_parallel, on_gpu
        self.dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        self.weight_VD = weight_VD
        self.group = group
        self.num_classes = V if group is None else V * group.size()
        self.targets_M = rows.targets_M if group is None else rows.targets_M - V * group.rank()
        self.has_all_targets = group is None and rows.active_M is None
        self.inactive_41 = None
        if rows.active_M is not None:
            self.inactive_41 = weight_VD.new_zeros(4, 1, dtype=self.dtype)
            self.inactive_41[SUM] = 1.0 if group is None or group.rank() == 0 else 0.0
        self.with_entropy = with_entropy or entropy_gradient
        self.entropy_gradient = entropy_gradient
        self.inverse_temperature_M = None
        if isinstance(temperature, Tensor):
            self.inverse_temperature_M = temperature.to(self.dtype).reciprocal()
        elif temperature != 1:
            self.inverse_temperature_M = torch.full_like(
                rows.targets_M, 1 / temperature, dtype=self.dtype
            )
        self.dx_MD = None
        if needs_dx:
            self.dx_MD = torch.empty(
                len(rows.targets_M), D, dtype=self.dtype, device=weight_VD.device
            )
        self.dw_VD = dw_VD
        self.local_mean_D = self.mean_D = self.mean_gradient_D = None
        if with_mean_logit:
            self.local_mean_D = weight_VD.sum(0, dtype=self.dtype) / self.num_classes
            self.mean_D = self.local_mean_D.clone()
            if group is not None:
                dist.all_reduce(self.mean_D, group=group)

    def logits(self, rows: slice) -> Tensor:
        """Compute and keep a chunk's logits; return their `stats_KM`, of three or, with the entropy, four rows."""
        raise NotImplementedError

    def gradients(self, rows: slice, grads: LogitGrads) -> None:
        """Turn the chunk's logits into dz; write dX of the chunk and add to dW."""
        raise NotImplementedError

    def scaled_rows(self, rows: slice) -> Tensor:
        """Return x / temperature of a chunk, in the compute dtype."""
        raise NotImplementedError

    def forward(self, rows: slice) -> RowStats:
        """Return the statistics of a chunk; 0 for rows that do not count."""
        stats_KM = self.logits(rows)
        if self.inactive_41 is not None and self.rows.active_M is not None:
            # Back-ends may leave out rows that do not count. They get a softmax over one class with logit 0.
            stats_KM = stats_KM.where(self.rows.active_M[rows], self.inactive_41[: len(stats_KM)])
        self.local_max_M = stats_KM[MAX]
        if self.group is not None:
            stats_KM = _merge_ranks(stats_KM, self.weight_VD.shape[0], self.group)
        # fp64 for these few numbers: in fp32 a log-prob of -10 is off by up to 5e-7, a ratio of two by 1e-6.
        stats_KM = stats_KM.double()
        self.max_M = stats_KM[MAX]
        self.log_sum_M = stats_KM[SUM].log()
        target_M = stats_KM[TARGET] - self.max_M
        self.logp_M = target_M - self.log_sum_M
        self.mean_shift_M = self.entropy_M = None
        if self.with_entropy:
            self.mean_shift_M = stats_KM[WEIGHTED] / stats_KM[SUM]
            self.entropy_M = self.log_sum_M - self.mean_shift_M
        return RowStats(
            logp_M=self.logp_M,
            max_M=self.max_M,
            log_sum_M=self.log_sum_M,
            entropy_M=self.entropy_M,
            mean_logit_M=None if self.mean_D is None else self.scaled_rows(rows).mv(self.mean_D),
            is_top_M=target_M >= 0,
        )

    def backward(self, rows: slice, grads: RowGrads) -> None:
        """Compute dX and dW of the chunk of the latest `forward`, once: its logits are overwritten."""
        shift_M, scale_M = None, -self.log_sum_M
        if grads.entropy_M is not None:
            assert self.mean_shift_M is not None, "an entropy gradient needs entropy_gradient=True"
            shift_M = -self.mean_shift_M
        if self.group is not None:  # other ranks may have larger logits
            below_M = self.local_max_M - self.max_M
            scale_M = scale_M + below_M
            shift_M = None if shift_M is None else shift_M + below_M
        # A rank whose classes all have tiny probabilities would underflow to 0 here; below e^-60 it does not matter.
        scale_M = scale_M.clamp_min(-60).exp()
        softmax_M = -grads.logp_M if grads.lse_M is None else grads.lse_M - grads.logp_M
        dz = LogitGrads(
            scale_M=scale_M.to(self.dtype),
            softmax_M=softmax_M.to(self.dtype),
            target_M=grads.logp_M.to(self.dtype),
            entropy_M=None if grads.entropy_M is None else grads.entropy_M.to(self.dtype),
            shift_M=None if shift_M is None else shift_M.to(self.dtype),
        )
        self.gradients(rows, dz)
        if grads.mean_logit_M is not None:
            self._mean_gradient(rows, grads.mean_logit_M.to(self.dtype))

    def _mean_gradient(self, rows: slice, grad_M: Tensor) -> None:
        """Add the gradient of zbar = x . (mean row of W) / temperature: rank one, without a pass over the logits."""
        assert self.local_mean_D is not None, "a mean_logit gradient needs with_mean_logit=True"
        if self.dx_MD is not None:
            scaled_M = (
                grad_M
                if self.inverse_temperature_M is None
                else grad_M * self.inverse_temperature_M[rows]
            )
            self.dx_MD[rows].addr_(scaled_M, self.local_mean_D)
        if self.dw_VD is not None:
            part_D = self.scaled_rows(rows).t().mv(grad_M)
            self.mean_gradient_D = (
                part_D if self.mean_gradient_D is None else self.mean_gradient_D + part_D
            )

    def finish(self) -> Tensor | None:
        """Complete dW and return dX of this rank's rows in hidden's dtype; None where it is not wanted."""
        if self.mean_gradient_D is not None and self.dw_VD is not None:
            self.dw_VD += self.mean_gradient_D / self.num_classes
        if self.dx_MD is None:
            return None
        if self.group is not None:
            dist.all_reduce(self.dx_MD, group=self.group)
        dx_MD = self.rows.expand(self.dx_MD).to(self.weight_VD.dtype)
        if self.sequence_parallel and self.group is not None:
            dx_MD = dx_MD.chunk(self.group.size())[self.group.rank()].clone()
        return dx_MD


def _merge_ranks(stats_KM: Tensor, num_local_classes: int, group: dist.ProcessGroup) -> Tensor:
    """Merge the ranks' statistics: one all-gather, then every rank does the same sums in the same order."""
    K, M = stats_KM.shape
    mine = torch.cat([stats_KM.flatten(), stats_KM.new_full((1,), num_local_classes)])
    gathered = mine.new_empty(group.size() * mine.shape[0])
    dist.all_gather_into_tensor(gathered, mine, group=group)
    gathered = gathered.view(group.size(), -1)
    _check_equal_shares(gathered[:, -1])
    max_RM, sum_RM, *weighted_RM, target_RM = gathered[:, :-1].view(group.size(), K, M).unbind(1)
    max_M = max_RM.amax(0)
    below_RM = max_RM - max_M
    factor_RM = below_RM.exp()
    weighted = [(factor_RM * (each_RM + below_RM * sum_RM)).sum(0) for each_RM in weighted_RM]
    return torch.stack([max_M, (factor_RM * sum_RM).sum(0), *weighted, target_RM.sum(0)])


def _check_equal_shares(num_classes_R: Tensor) -> None:
    """Raise ValueError for unequal numbers of weight rows (V not divisible by TP); on CUDA checked on the device."""
    equal = (num_classes_R == num_classes_R[0]).all()
    if not host_knows(num_classes_R):
        torch.ops.aten._assert_async.msg(
            equal, "head: weight_VD must have the same number of rows on every rank of group"
        )
    elif not equal:
        raise ValueError(
            f"head: weight_VD must have V/TP rows, equal on all {num_classes_R.numel()} ranks of group; V not divisible "
            f"by TP? got {[int(n) for n in num_classes_R]}"
        )
