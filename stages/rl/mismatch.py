"""Measure of the difference between sampler and trainer at every RL step, on every trained token of the present weights.

With d = trainer's log-prob - sampler's log-prob of a sampled token, both from the same weights:

    mean |d|, max |d|, the share of tokens with |d| above a few thresholds, and
    KL(sampler || trainer), estimated per token as e^d - 1 - d (never negative; Schulman's k3)

Rounding gives d around 1e-6 in float32 and 1e-2 in bfloat16. More than `alarm_level` means that the two are
different functions (stale weights, another rope table, another temperature, ...): the run stops before the update,
and `mismatch_diagnosis.py` finds out which.

Tokens of older weights than the trainer's are left out: their d includes the change of the policy. With
rollout.asynchronous those are all trained tokens. Then the measure is taken on answers of the present weights that are
not trained on: the next step's or, if those are not complete (`rollout.partial`) or there is no next step, short ones.

Importance weights w = e^d correct the differences that cannot be removed (bfloat16, FP8, stale tokens):
    truncated   min(w, cap)                      (TIS)
    masked      w within [low, cap], else 0      (IcePop)
per token, or per sequence with d summed over the sequence. They multiply the policy loss; the clipped ratio is then
against the trainer's own log-probs. A |d| of the size of rounding counts as 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.parallel.ranks.world import World

THRESHOLDS = (0.01, 0.1)
ALARM_LEVELS = {"float32": 1e-3, "bfloat16": 0.02, "fp8": 0.06, "fp8_cache": 0.15}
"""mean |d|, by the sampler's precision. A trained tiny model's rounding: 1e-7, 2e-4 (bfloat16), 2.4e-3 (FP8 weights), 5e-3 to 3e-2
(keys and values in FP8, by vLLM on a CPU)"""
ROUNDING = {"float32": 1e-4, "bfloat16": 0.02, "fp8": 0.05, "fp8_cache": 0.1}
"""a |d| up to this counts as 0, so the token gets importance weight 1"""
MAX_EXPONENT = 20.0


class MismatchError(RuntimeError):
    """Error for a sampler and a trainer that are different policies. `report` is the page of the diagnosis, if any."""

    def __init__(self, message: str, report: str = "") -> None:
        super().__init__(f"{message}\n{report}" if report else message)
        self.report = report


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Differences over one step's tokens that were sampled from the trainer's present weights."""

    tokens: int
    mean_abs: float
    max_abs: float
    kl: float
    shares: tuple[float, ...]
    """of tokens with |d| above each of THRESHOLDS"""
    stale_tokens: int
    """left out: sampled from older weights"""
    max_age: int
    """updates between sampling and now, of the oldest token"""

    def row(self) -> dict[str, float]:
        """Return the fields for the log; without a difference if no token was sampled from the present weights."""
        age: dict[str, float] = {"stale_tokens": self.stale_tokens, "max_age": self.max_age}
        if not self.tokens:
            return age
        over = {f"mismatch_over_{t:g}": s for t, s in zip(THRESHOLDS, self.shares, strict=True)}
        return {
            "mismatch": self.mean_abs,
            "mismatch_max": self.max_abs,
            "mismatch_kl": self.kl,
            **over,
            **age,
        }

    def exceeds(self, alarm: float) -> bool:
        """Return True if the mean difference is above `alarm`, or not a number."""
        return self.tokens > 0 and not self.mean_abs <= alarm


class MismatchMeter:
    """Sums that the loss head adds to in each micro-batch; `collect` returns the step's numbers and resets them."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    @torch.no_grad()
    def add(self, d_M: Tensor, age_M: Tensor, counts_M: Tensor) -> None:
        """Add a micro-batch. d_M: trainer's minus sampler's log-prob; age_M: staleness; counts_M: rows that are trained on."""
        fresh_M = counts_M & (age_M == 0)
        d_M = d_M.double().where(fresh_M, 0.0)
        size_M = d_M.abs()
        bounded_M = d_M.clamp(-MAX_EXPONENT, MAX_EXPONENT)
        sums = [
            fresh_M.sum(), size_M.sum(), (torch.expm1(bounded_M) - bounded_M).sum(),
            (counts_M & (age_M > 0)).sum(), *((size_M > t).sum() for t in THRESHOLDS),
        ]  # fmt: skip
        peaks = [size_M.amax(), age_M.where(counts_M, 0).amax()] if len(d_M) else [d_M.sum()] * 2
        self._parts.append(torch.stack([x.double() for x in (*sums, *peaks)]))

    def collect(self, world: World) -> Mismatch:
        """Return the step's differences over all ranks, on every rank, and reset. Collective."""
        mine = None
        if world.is_last_stage and world.tensor_rank == 0 and self._parts:
            parts = torch.stack(self._parts)
            mine = (*parts[:, :-2].sum(0).tolist(), *parts[:, -2:].amax(0).tolist())
        self._parts = []
        ranks = [part for part in world.all_gather_objects(mine) if part is not None]
        count, total, kl, stale, *above = (
            sum(values) for values in list(zip(*ranks, strict=True))[:-2]
        )
        peak, age = (max(values) for values in list(zip(*ranks, strict=True))[-2:])
        tokens = max(count, 1.0)
        return Mismatch(
            tokens=int(count),
            mean_abs=total / tokens,
            max_abs=peak,
            kl=kl / tokens,
            shares=tuple(share / tokens for share in above),
            stale_tokens=int(stale),
            max_age=int(age),
        )


def alarm_level(chosen: float | None, precision: str) -> float:
    """Return `rlvr.max_mismatch` or, for None, a mean |d| that rounding in the sampler's `precision` never reaches."""
    return ALARM_LEVELS[precision] if chosen is None else chosen


@torch.no_grad()
def importance_weights(
    d_M: Tensor,  # trainer's minus sampler's log-prob, of the trained rows
    counts_M: Tensor,  # bool
    mode: str,
    *,
    cap: float,
    low: float,
    documents_M: Tensor,  # int64, which sequence a row is of
    num_documents: int,
    context_group: dist.ProcessGroup | None = None,  # ranks that hold the sequences' other rows
    rounding: float,  # |d| up to this counts as 0
) -> Tensor:
    """Return (M,) factors of the policy loss. `mode` is level_kind: token or sequence, truncated or masked.

    Raises ValueError for another mode. The formulas are in the module's docstring.
    """
    level, _, kind = mode.partition("_")
    if level not in ("token", "sequence") or kind not in ("truncated", "masked"):
        raise ValueError(
            f"importance: expected token or sequence, truncated or masked, got {mode!r}"
        )
    d_M = d_M.float().where(counts_M & (d_M.abs() > rounding), 0.0)
    if level == "sequence":
        d_M = sums_of_documents(d_M, documents_M, num_documents, context_group)[documents_M]
    w_M = d_M.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    if kind == "truncated":
        return w_M.clamp(max=cap)
    return w_M.where((w_M >= low) & (w_M <= cap), 0.0)


def sums_of_documents(
    value_M: Tensor,
    documents_M: Tensor,
    num_documents: int,
    context_group: dist.ProcessGroup | None,
) -> Tensor:
    """Return (N,) sums over each document's rows, those that other context ranks hold included."""
    sums_N = value_M.new_zeros(num_documents).index_add_(0, documents_M, value_M)
    if context_group is not None:
        dist.all_reduce(sums_N, group=context_group)
    return sums_N


def importance_of(run: Any) -> str:
    """Return the mode of a RunConfig's importance weights: `rlvr.importance`, or for auto the one that fits its sampling."""
    if run.rlvr.importance == "auto":
        return "token_truncated" if run.rollout.asynchronous else "off"
    return run.rlvr.importance


def precision_of(rollout: Any, on_gpu: bool) -> str:
    """Return the precision in which the sampler of a RolloutConfig computes."""
    if rollout.kv_cache_dtype == "fp8":
        return "fp8_cache"
    if rollout.quantization == "fp8":
        return "fp8"
    if rollout.dtype != "auto":
        return rollout.dtype
    return "bfloat16" if on_gpu else "float32"
