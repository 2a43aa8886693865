"""GPUs, and the rates that every predicted time is computed with: one table, with a source for each number.

The rates are those of an H100 SXM. Another GPU is assumed to reach the same shares of its own data sheet, with the
attention kernel made for it. Predictions are arithmetic with these rates; no run has confirmed them.
"""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
RESERVE = 0.10
"""share of a GPU's memory that a plan leaves free: for fragmentation and for allocations that it does not model, because
no GPU has confirmed its memory yet"""
Attention = Literal["fa2", "fa3", "fa4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU model, by its data sheet."""

    name: str
    memory_bytes: int
    """bytes that torch may allocate in all"""
    peak_flops: float
    """dense bf16 FLOP/s; also the base of MFU in fp8 runs"""
    bandwidth: float
    """bytes/s of the memory"""
    link: float
    """bytes/s to the other GPUs of its node, one way"""
    capability: tuple[int, int]
    """CUDA's compute capability, which decides the FP8 recipes and the attention kernel"""

    @property
    def usable_bytes(self) -> int:
        """Bytes that a plan may give away."""
        return int((1 - RESERVE) * self.memory_bytes)

    @property
    def attention(self) -> Attention:
        """Attention kernel made for this GPU."""
        return {8: "fa2", 9: "fa3", 10: "fa4"}[self.capability[0]]  # pyright: ignore[reportReturnType]


def _gpu(
    name: str, gib: float, tflops: float, tbs: float, link: float, capability: tuple[int, int]
) -> Gpu:
    return Gpu(
        name=name, memory_bytes=int(gib * GIB), peak_flops=tflops * 1e12, bandwidth=tbs * 1e12, link=link * 1e9,
        capability=capability,
    )  # fmt: skip


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 79.1, 312, 2.04, 300, (8, 0)),
        _gpu("h100", 79.1, 989, 3.35, 450, (9, 0)),
        _gpu("h200", 139.8, 989, 4.8, 450, (9, 0)),
        _gpu("b200", 178.3, 2250, 8.0, 900, (10, 0)),
    )
}
_BASE = GPUS["h100"]


@dataclass(frozen=True, slots=True)
class Rate:
    """FLOP/s or bytes/s of an H100 SXM, and where the number is from."""

    value: float
    source: str


_FIGURES = "arXiv 2407.08608, figures 5 and 6: causal, head size 128, 16k tokens; backward scaled from non-causal"
RATES = {
    "gemm": Rate(
        660e12, "assumed, below the best single bf16 product, 780e12 (gist Chillee/2ec89696)"
    ),
    "gemm_tensorwise": Rate(1150e12, "assumed for FP8 products with current scaling"),
    "gemm_blockwise": Rate(950e12, "assumed for FP8 products with scales of blocks"),
    "head_logits": Rate(500e12, "assumed for this project's Triton kernel"),
    "head_gradients": Rate(640e12, "assumed, a little below gemm: accumulates in fp32"),
    "fa2_forward": Rate(335e12, _FIGURES),
    "fa2_backward": Rate(291e12, _FIGURES),
    "fa3_forward": Rate(618e12, _FIGURES),
    "fa3_backward": Rate(533e12, _FIGURES),
    "bytes": Rate(2.7e12, "below quack's best, 3.0e12 (media/2025-07-10-membound-sol.md)"),
    "link": Rate(360e9, "assumed, 80 % of the data sheet"),
    "network": Rate(40e9, "assumed, 80 % of 400 Gbit/s for each GPU"),
}
LAUNCH_S = 6e-3
"""assumed for each micro-batch: launch tail and Megatron's schedule"""


def rate(name: str, gpu: Gpu = _BASE) -> float:
    """Return a rate of RATES on `gpu`: the share of its data sheet that an H100 reaches of its own."""
    if name == "network":
        return RATES[name].value
    if name in ("bytes", "link"):
        sheets = (gpu.bandwidth, _BASE.bandwidth) if name == "bytes" else (gpu.link, _BASE.link)
        return RATES[name].value * sheets[0] / sheets[1]
    kernel, _, direction = name.partition("_")
    if kernel == gpu.attention:  # made for this GPU, as FlashAttention 3 for an H100
        name = f"fa3_{direction}"
    if name not in RATES:
        raise ValueError(f"rates: {gpu.name} has no rate of {name}; its kernel is {gpu.attention}")
    return RATES[name].value * gpu.peak_flops / _BASE.peak_flops


def table(gpu: Gpu, attention: Attention | None = None) -> dict[str, float]:
    """Return the rates of `gpu` that a prediction uses, for a row or a document."""
    kernel = attention or gpu.attention
    names = [n for n in RATES if not n.startswith("fa")]
    rates = {n: rate(n, gpu) for n in (*names, f"{kernel}_forward", f"{kernel}_backward")}
    return rates | {"launch_s": LAUNCH_S}
