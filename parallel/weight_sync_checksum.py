"""A checksum of a tensor's bytes: exact, the same on any device, at the speed of reading them."""

import functools
import hashlib

import torch
from torch import Tensor

_COLUMNS, _ROWS = 128, 2048
_ROW_BYTES = _COLUMNS * 8
_HALF = 4
"""bytes; by so much the columns' words begin later than the rows'"""
_AT_ONCE = 32
"""blocks that a GPU sums together: few kernels, and a copy of at most 64 MiB"""
_SEEDED = 4096
"""weights that one seed draws"""


def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 of the tensor's bytes and their order; the same on any device, exact whatever the dtype.

    The bytes are int64 words in rows of 128 and blocks of 2,048 rows (2 MiB), the last row filled up with zeros. Each
    row is summed modulo 2^64. So is each column of each block, but over the words that begin 4 bytes later, without
    the tensor's last 4 bytes: what overflows in one sum, the top bits of a word, is in the middle of the other's.
    Every sum s counts as s + floor(s / 2^32), times an odd number drawn at random for its place; the checksum is the
    sum of that modulo 2^64, and the number of bytes. A tensor that does not fill its last row is copied to do so.

    What changes a row's or a column's sum is seen, but for a coincidence: one in 2^60 for bytes that are lost, old,
    zeroed, shifted or exchanged; one in 2^32 where only top bits of 4-byte halves change, as with signs of fp32.
    A change that leaves every row's and every column's sum as it was is not seen: +d, -d, -d, +d in the corners of a
    rectangle within one block is the simplest. Of signs of every second fp32 (every fourth bf16) that is an even
    number in each row, and in each column as many from + to - as from - to +. Against faults, not an adversary.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    num_bytes = data.numel()
    if num_bytes % _ROW_BYTES or not num_bytes:
        data = torch.nn.functional.pad(data, (0, -num_bytes % _ROW_BYTES or _ROW_BYTES))
    rows = data.numel() // _ROW_BYTES
    blocks = -(-rows // _ROWS)
    sums_KS = data.new_zeros((blocks, min(rows, _ROWS) + _COLUMNS), dtype=torch.int64)
    (_block_by_block if data.is_cpu else _at_once)(data, rows, sums_KS)
    sums = sums_KS.view(-1)
    weights = _weights(data.device, -(-sums.numel() // _SEEDED))[: sums.numel()]
    return sums.add_(sums >> 32).mul_(weights).sum() + num_bytes


def _block_by_block(data: Tensor, rows: int, sums_KS: Tensor) -> None:
    """For a CPU, which reads words wherever they begin: a block's second sum reads the cache."""
    numbers = data.numpy()
    words_NC = torch.from_numpy(numbers.view("int64").reshape(rows, _COLUMNS))
    later = numbers[_HALF : _HALF - 8].view("int64")
    whole = len(later) // _COLUMNS * _COLUMNS
    later_NC = torch.from_numpy(later[:whole].reshape(-1, _COLUMNS))
    for start, sums_S in zip(range(0, rows, _ROWS), sums_KS.unbind(), strict=True):
        words_RC = words_NC[start : start + _ROWS]
        torch.sum(words_RC, 1, out=sums_S[: len(words_RC)])
        if start < len(later_NC):
            torch.sum(later_NC[start : start + _ROWS], 0, out=sums_S[-_COLUMNS:])
    sums_KS.numpy()[-1, -_COLUMNS:-1] += later[whole:]


def _at_once(data: Tensor, rows: int, sums_KS: Tensor) -> None:
    """For a GPU: the same in few kernels, of the rows and then of the columns, whose words it copies."""
    for start, num_rows in ((0, rows), (_HALF, rows - 1)):
        whole = num_rows // _ROWS
        spans = [(k, min(_AT_ONCE, whole - k), _ROWS) for k in range(0, whole, _AT_ONCE)]
        if num_rows % _ROWS:
            spans.append((whole, 1, num_rows % _ROWS))
        for first, count, height in spans:
            place = start + first * _ROWS * _ROW_BYTES
            part = data[place : place + count * height * _ROW_BYTES]
            part = part.clone() if start else part
            words_KRC = part.view(torch.int64).view(count, height, _COLUMNS)
            sums_S = sums_KS[first : first + count]
            if start:
                sums_S[:, -_COLUMNS:] = words_KRC.sum(1)
            else:
                sums_S[:, :height] = words_KRC.sum(2)
    ends = data[_HALF - _ROW_BYTES : -_HALF].clone().view(torch.int64)
    sums_KS[-1, -_COLUMNS:-1] += ends


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device, seeds: int) -> Tensor:
    """Odd numbers; with more seeds more of them, after the same first ones."""
    return torch.cat([_odd(_SEEDED, seed) for seed in range(seeds)]).to(device)


def _odd(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


def fingerprint(checksums: dict[str, int]) -> str:
    """16 hex digits for a whole set of weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
