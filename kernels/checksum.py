"""A checksum of a tensor's bytes: exact, the same on any device, at the speed of reading them.

    The bytes, padded with zeros, are int64 words in blocks of 127 rows of 129. Each row and each column of a block is
    summed modulo 2^64. Each sum s counts as s + floor(s / 2^32), times an odd number drawn at random for its place in
    the block; the total of a block is multiplied by one for the block's place. The checksum is the sum of that modulo
    2^64, and the number of bytes.

A change of a row's or a column's sum is detected with high probability: missed once in 2^60 for bytes that are lost, old,
zeroed, shifted or exchanged, once in 2^32 where only top bits of words change, as with signs of every second fp32. A
change that leaves every row's and every column's sum as it was is missed: the simplest is +d, -d, -d, +d in the corners
of a rectangle within one block, or, for top bits of words, an even number in each row and each column. Rows and columns
are odd in length so that matrices are not regular in that way. It protects against faults, not against an adversary.

One program reads a block once and adds its total atomically. The sum is of integers, so the order does not matter.

Bound: memory. A tensor is read once; on a CPU twice, the second time from the cache.

Letters: K blocks, R rows and C columns of a block, S sums of a block.
"""

# triton types constexpr parameters as tl.constexpr, not int
# pyright: reportArgumentType=false
import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from phimini.kernels.backend.launch import Backend, runs_triton

_ROWS, _COLUMNS = 127, 129
_ROW_BYTES = 8 * _COLUMNS
_BLOCK_BYTES = 8 * _ROWS * _COLUMNS
_SUMS = _ROWS + _COLUMNS
_CACHED = 4
"""Blocks (512 KiB) that a CPU's cache still holds for the second read."""
_SEEDED = 4096
"""Weights drawn from one seed."""


# --- reference -----------------------------------------------------------------------------------
def checksum_reference(tensor: Tensor) -> Tensor:
    """The definition: 0-d int64, on the tensor's device."""
    data = _bytes(tensor)
    blocks = len(data) // _BLOCK_BYTES + 1
    padded = torch.nn.functional.pad(data, (0, blocks * _BLOCK_BYTES - len(data)))
    words_KRC = padded.view(torch.int64).view(blocks, _ROWS, _COLUMNS)
    sums_KS = torch.cat((words_KRC.sum(2), words_KRC.sum(1)), 1)
    of_sum, of_block = (_weights(data.device, n) for n in (_SUMS, blocks))
    of_block_K = ((sums_KS + (sums_KS >> 32)) * of_sum).sum(1)
    return (of_block_K * of_block).sum() + len(data)


@functools.lru_cache(maxsize=64)
def _weights(device: torch.device, count: int) -> Tensor:
    """Return `count` odd numbers; a longer list begins with the same ones."""
    drawn = [_odd(_SEEDED, seed) for seed in range(-(-count // _SEEDED))]
    return torch.cat(drawn)[:count].to(device)


def _odd(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


# --- triton --------------------------------------------------------------------------------------
@triton.jit
def _checksum_kernel(
    words_ptr, num_words, of_sum_ptr, of_block_ptr, out_ptr,  # (num_words,) (S,) (K,) ()
    R: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)  # the last of BLOCK_C + 1 columns is read separately
    columns = tl.zeros([BLOCK_R, BLOCK_C], tl.int64)
    last_column = tl.zeros([BLOCK_R], tl.int64)
    totals = tl.zeros([BLOCK_R], tl.int64)
    for first in range(0, R, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        starts = (k * R + rows) * C
        offsets = starts[:, None] + cols[None, :]
        inside = (rows[:, None] < R) & (offsets < num_words)
        words = tl.load(words_ptr + offsets, mask=inside, other=0)
        inside = (rows < R) & (starts + BLOCK_C < num_words)
        last = tl.load(words_ptr + starts + BLOCK_C, mask=inside, other=0)
        columns += words
        last_column += last
        sums = tl.sum(words, axis=1) + last
        weights = tl.load(of_sum_ptr + rows, mask=rows < R, other=0)
        totals += (sums + (sums >> 32)) * weights
    sums = tl.sum(columns, axis=0)
    total = tl.sum((sums + (sums >> 32)) * tl.load(of_sum_ptr + R + cols), axis=0)
    sum_of_last = tl.sum(last_column, axis=0)
    total += (sum_of_last + (sum_of_last >> 32)) * tl.load(of_sum_ptr + R + BLOCK_C)
    total += tl.sum(totals, axis=0)
    tl.atomic_add(out_ptr, total * tl.load(of_block_ptr + k), sem="relaxed")


# --- launch --------------------------------------------------------------------------------------
def launch_config() -> dict[str, int]:
    """Return block sizes and warps: a thread holds 8 words, of 8 rows; a warp reads 32 words of a row."""
    return {"R": _ROWS, "C": _COLUMNS, "BLOCK_R": 8, "BLOCK_C": _COLUMNS - 1, "num_warps": 4}


def _with_triton(data: Tensor) -> Tensor:
    """Return 0-d int64 without waiting for the GPU. Bytes that do not fill their last word, or are not aligned, cost a
    copy; weights of a model always fill and align them."""
    num_bytes = len(data)
    if num_bytes % 8 or data.data_ptr() % 8:
        data = torch.nn.functional.pad(data, (0, -num_bytes % 8 or 8))
    words = data.view(torch.int64)
    blocks = max(1, -(-len(words) // (_ROWS * _COLUMNS)))
    of_sum, of_block = (_weights(data.device, n) for n in (_SUMS, blocks))
    out = words.new_full((), num_bytes)
    _checksum_kernel[(blocks,)](words, len(words), of_sum, of_block, out, **launch_config())
    return out


def _on_cpu(tensor: Tensor) -> int:
    data = tensor.numpy()  # torch refuses words that are not aligned
    whole, rest = divmod(len(data), _BLOCK_BYTES)
    sums_KS = np.zeros((whole + 1, _SUMS), dtype=np.int64)
    words_KRC = data[: len(data) - rest].view(np.int64).reshape(whole, _ROWS, _COLUMNS)
    for k in range(0, whole, _CACHED):
        part, sums = words_KRC[k : k + _CACHED], sums_KS[k : min(k + _CACHED, whole)]
        words = torch.from_numpy(part)
        torch.sum(words, 2, out=torch.from_numpy(sums[:, :_ROWS]))
        torch.sum(words, 1, out=torch.from_numpy(sums[:, _ROWS:]))
    if rest:
        words_RC = np.zeros((-(-rest // _ROW_BYTES), _COLUMNS), dtype=np.int64)
        words_RC.reshape(-1).view(np.uint8)[:rest] = data[len(data) - rest :]
        np.add.reduce(words_RC, 1, out=sums_KS[-1, : len(words_RC)])
        np.add.reduce(words_RC, 0, out=sums_KS[-1, _ROWS:])
    sums_KS += sums_KS >> 32
    total = sums_KS @ _on_host(_SUMS) @ _on_host(whole + 1)
    return (int(total) + len(data) + 2**63) % 2**64 - 2**63


@functools.lru_cache(maxsize=64)
def _on_host(count: int) -> np.ndarray:
    return _weights(torch.device("cpu"), count).numpy()


# --- public op -----------------------------------------------------------------------------------
def checksum(tensor: Tensor, *, _backend: Backend | None = None) -> int:
    """Return the checksum of a tensor's bytes and their order, signed 64-bit, for any dtype. Waits for a GPU."""
    return checksums([tensor], _backend=_backend)[0]


def checksums(tensors: Sequence[Tensor], *, _backend: Backend | None = None) -> list[int]:
    """Return the `checksum` of each. Waits for a GPU once. Raises ValueError for tensors on several devices."""
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError("checksums: tensors: expected all on one device")
    flat = [_bytes(tensor) for tensor in tensors]
    if not flat or not runs_triton(flat[0], _backend):
        return [_on_cpu(data) for data in flat]
    return torch.stack([_with_triton(data) for data in flat]).tolist()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
