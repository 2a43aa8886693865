"""One stage's step as the plan sees it: rows, lengths, forwards, and the engine beside it."""

from dataclasses import dataclass
from typing import get_args

from phimini.parallel.plan.engine import Engine
from phimini.parallel.plan.memory import Fp8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One stage's step, in rows: packed rows, single sequences, or the two answers of a pair."""

    stage: str
    sequence_length: int
    """tokens of a row"""
    rows_per_step: int
    """rows in the global batch"""
    micro_tokens: int | None = None
    """tokens that one rank computes at once; None: one row"""
    document_length: int | None = None
    """tokens of a document inside a packed row, for attention's FLOPs; None: one document fills the row"""
    trained_share: float = 1.0
    """share of the tokens with a loss; the head computes only these"""
    extra_forwards: float = 0.0
    """additional forward passes (a DPO reference: 1), counted as model FLOPs"""
    reference_model: bool = False
    """a frozen copy of the model in memory"""
    pair_scratches: int = 0
    """see `MemoryOptions`"""
    samples_per_step: int = 0
    """upper bound of the answers that a step samples; their memory and FLOPs are not counted"""
    samples_before: int = 0
    """answers sampled before the first step"""
    engine: Engine | None = None
    """rollout engine on the same GPUs; None: it runs elsewhere"""
    fp8: Fp8 = "none"
    zero1: bool = True
    overlap: bool = False
    """gradients are reduced (and ZeRO-1's parameters gathered) during the computation"""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "rows_per_step", "micro_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"Workload.{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.trained_share <= 1:
            raise ValueError(
                f"Workload.trained_share: expected a share in (0, 1], got {self.trained_share}"
            )
        if self.fp8 not in get_args(Fp8):
            raise ValueError(f"Workload.fp8: expected one of {get_args(Fp8)}, got {self.fp8!r}")

    @property
    def micro_rows(self) -> int:
        """Whole rows that one rank computes at once."""
        return (self.micro_tokens or self.sequence_length) // self.sequence_length
