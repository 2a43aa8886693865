"""Bench cases of the tensor checksum: compiled and counted. `phimini bench weight-sync` times it within a sync."""

import torch

from phimini.bench.ops.cases import StaticCase, TrafficCase
from phimini.bench.ops.harness import Case
from phimini.kernels.checksum import _checksum_kernel, checksum, launch_config


def timed_cases(device: str, quick: bool) -> list[Case]:
    return []


# --- compiled --------------------------------------------------------------------------------------
def static_cases() -> list[StaticCase]:
    blocks = launch_config()
    num_warps = blocks.pop("num_warps")
    return [
        StaticCase(
            kernel="checksum",
            function=_checksum_kernel,
            signature={
                "words_ptr": "*i64", "num_words": "i32", "of_sum_ptr": "*i64", "of_block_ptr": "*i64", "out_ptr": "*i64",
            },
            constexprs=blocks,
            num_warps=num_warps,
            access_bits=64,
            max_registers={80: 72, 90: 72, 100: 72},
        )
    ]  # fmt: skip


# --- counted ---------------------------------------------------------------------------------------
def traffic_cases() -> list[TrafficCase]:
    """Return a bf16 tensor of five blocks, the last of which is not full."""
    tensor = torch.randn(600, 512).bfloat16()
    checksum(tensor)  # draws the weights
    return [
        TrafficCase(
            kernel="checksum",
            run=lambda: checksum(tensor, _backend="triton"),
            minimum_bytes=tensor.numel() * 2,
        )
    ]
