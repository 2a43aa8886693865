"""The cases that the ops' bench files list: kernels to compile offline, and calls whose memory traffic is counted."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TARGETS = (80, 90, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCase:
    """One kernel with one configuration, compiled for each target."""

    kernel: str
    """the row's name, shared with other projects' kernels for the same work"""
    provider: str = "phimini"
    function: Any
    """the function that `triton.jit` made (autotuned and heuristic kernels: the innermost `.fn`)"""
    signature: dict[str, str]
    """run-time arguments: "*bf16" a pointer aligned to 16 bytes, "i32:16" divisible by 16, "i32", "fp32" """
    constexprs: dict[str, Any]
    """compile-time arguments, None pointers and ints equal to 1 (triton specialises on 1) among them"""
    num_warps: int
    num_stages: int = 3
    targets: tuple[int, ...] = TARGETS
    is_matmul: bool = False
    access_bits: int = 128
    """least width of a thread's global accesses; 64 for words of 64 bits at any offset, which cannot be read in pairs"""
    max_registers: dict[int, int] = field(default_factory=dict)
    """the committed ceiling per target"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficCase:
    """One op of one provider: `run` calls it once, on small tensors of the real proportions."""

    kernel: str
    provider: str = "phimini"
    run: Callable[[], Any]
    minimum_bytes: int


def liger_is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None
