"""Block sizes of the head's kernels per GPU generation, and why.

Found by compiling offline (`phimini bench kernels --static`); not yet timed on a GPU. The reasons:

sm_90, sm_100: 128 x 256 x 64, 8 warps. 85 FLOP per byte fetched from L2; 128 x 128 has 64, which at 600 TFLOP/s asks
    for 9.4 TB/s. Four stages fill 192 KiB of the 227 KiB of shared memory; a second program would not fit with
    three either. TMA descriptors made on the host: the pointer arithmetic of the same tile costs 64 registers.
    4 warps spill 600 times.
sm_90, logits kernel: persistent, one program per SM with its tiles in one flattened loop, so that the first loads of a
    tile pass under the statistics of the tile before (255 registers, no spills; E leaves in halves, whose 32 KiB are
    what four stages spare). The statistics themselves, about a tenth of a tile's time, still wait for the products:
    triton 3.7 compiles `warp_specialize` on sm_90 to the same program, or fails with 4 warps.
    cuBLAS would overlap them, but hands over bf16 logits, whose rounding (|z| 2^-9) every log-prob would carry, or
    fp32 ones, whose 26 GB written and read cost the 10 ms that they save.
sm_100: one tile per program. The persistent loop spills 87 to 324 times, warp specialisation 51 to 518 times.
sm_80: 128 x 128 x 64, 8 warps, cp.async through pointers: there is no TMA, and descriptors are lowered to
    16-bit accesses without a pipeline. 128 x 256 spills 280 times.
merge and gradient kernels: bound by memory. 128-bit accesses, no spills; the gradient kernel has two tiles in flight,
    64 KB per SM at half of the warps resident (3/8 with an entropy gradient).

The gradient kernel's column block is the logit tile's: one maximum belongs to one such tile.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulBlocks:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    use_tma: bool
    persistent: bool = False
    """the logits kernel: one program per SM, which loads its next tile while it computes this one's statistics"""


MATMUL = {
    80: MatmulBlocks(
        block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3, use_tma=False
    ),
    90: MatmulBlocks(
        block_m=128,
        block_n=256,
        block_k=64,
        num_warps=8,
        num_stages=4,
        use_tma=True,
        persistent=True,
    ),
    100: MatmulBlocks(
        block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, use_tma=True
    ),
}
MERGE_SPLITS, MERGE_ROWS, MERGE_WARPS = 32, 32, 4
GRADIENT_ROWS, GRADIENT_WARPS = 8, 4
GRADIENT_TILES = 8
"""Tiles of one program: the row's numbers (24 bytes) are then read once per 8 KB of logits."""


def vocabulary_splits(num_row_blocks: int, num_tiles: int, num_sms: int) -> int:
    """Return the number of parts of the vocabulary for the forward-only kernel: the fewest that keep 90 % of SMs busy.

    One program per SM and row block; with P programs, ceil(P / SMs) rounds take as long as P / SMs would at best.
    """
    best, best_use = 1, 0.0
    for splits in range(1, min(num_tiles, 32) + 1):
        programs = num_row_blocks * splits
        use = programs / (-(-programs // num_sms) * num_sms)
        if use >= 0.9:
            return splits
        if use > best_use:
            best, best_use = splits, use
    return best
