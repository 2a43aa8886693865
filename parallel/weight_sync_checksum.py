"""A checksum of a tensor's bytes: exact, the same on any device, at the speed of reading them."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ROWS, _COLUMNS = 127, 129
_ROW_BYTES = 8 * _COLUMNS
_BLOCK_BYTES = 8 * _ROWS * _COLUMNS
_SUMS = _ROWS + _COLUMNS
_CACHED = 4
"""blocks (512 KiB) that a CPU still holds when it reads them for the second time"""
_SEEDED = 4096
"""weights that one seed draws"""


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bytes and their order, as a signed 64-bit number; the same on any device, exact whatever the dtype.

    The bytes, filled up with zeros, are int64 words in blocks of 127 rows of 129. Each row and each column of a block is
    summed modulo 2^64. Each sum s counts as s + floor(s / 2^32), times an odd number drawn at random for its place in
    the block; the total of a block is multiplied by one for the block's place. The checksum is the sum of that modulo
    2^64, and the number of bytes.

    What changes a row's or a column's sum is seen, but for a coincidence: one in 2^60 for bytes that are lost, old,
    zeroed, shifted or exchanged; one in 2^32 where only top bits of words change, as with signs of every second fp32.
    A change that leaves every row's and every column's sum as it was is not seen: +d, -d, -d, +d in the corners of a
    rectangle within one block is the simplest, or, of top bits of words, an even number in each row and each column.
    Rows and columns are odd in length so that no matrix is regular in that way. Against faults, not an adversary.
    """
    return checksums([tensor])[0]


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """`checksum` of each; a GPU is waited for once."""
    sums = [_on_cpu(data) if data.is_cpu else _on_gpu(data) for data in map(_bytes, tensors)]
    on_gpu = [value for value in sums if isinstance(value, Tensor)]
    return torch.stack(on_gpu).tolist() if on_gpu else [int(value) for value in sums]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _on_cpu(tensor: Tensor) -> int:
    data = tensor.numpy()  # torch refuses words that begin between two of its own
    whole = len(data) // _BLOCK_BYTES
    sums_KS = np.zeros((whole + 1, _SUMS), dtype=np.int64)
    if whole:
        blocks = data[: whole * _BLOCK_BYTES].view(np.int64).reshape(whole, _ROWS, _COLUMNS)
        of_rows_KR, of_columns_KC = torch.from_numpy(sums_KS[:-1]).split((_ROWS, _COLUMNS), 1)
        parts = (t.split(_CACHED) for t in (torch.from_numpy(blocks), of_rows_KR, of_columns_KC))
        for words_KRC, rows_KR, columns_KC in zip(*parts, strict=True):
            torch.sum(words_KRC, 2, out=rows_KR)
            torch.sum(words_KRC, 1, out=columns_KC)
    if len(data) > whole * _BLOCK_BYTES:
        rest = data[whole * _BLOCK_BYTES :]
        words_RC = np.zeros((-(-len(rest) // _ROW_BYTES), _COLUMNS), dtype=np.int64)
        words_RC.reshape(-1).view(np.uint8)[: len(rest)] = rest
        np.add.reduce(words_RC, 1, out=sums_KS[-1, : len(words_RC)])
        np.add.reduce(words_RC, 0, out=sums_KS[-1, _ROWS:])
    sums_KS += sums_KS >> 32
    cpu = tensor.device
    total = sums_KS @ _weights(cpu, _SUMS).numpy() @ _weights(cpu, whole + 1).numpy()
    return (int(total) + len(data) + 2**63) % 2**64 - 2**63


def _on_gpu(data: Tensor) -> Tensor:
    """0-d int64; not waited for."""
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) // _BLOCK_BYTES
    sums_KS = data.new_zeros((whole + 1, _SUMS), dtype=torch.int64)
    rest = data[whole * _BLOCK_BYTES :]
    rest = torch.nn.functional.pad(rest, (0, _BLOCK_BYTES - len(rest)))
    for first, part in ((0, data[: whole * _BLOCK_BYTES]), (whole, rest)):
        part_KRC = part.view(torch.int64).view(-1, _ROWS, _COLUMNS)
        part_KS = sums_KS[first : first + len(part_KRC)]
        part_KS[:, :_ROWS], part_KS[:, _ROWS:] = part_KRC.sum(2), part_KRC.sum(1)
    of_sum, of_block = (_weights(data.device, n) for n in (_SUMS, whole + 1))
    of_block_K = (sums_KS + (sums_KS >> 32)).mul_(of_sum).sum(1)
    return of_block_K.mul_(of_block).sum() + len(data)


@functools.lru_cache(maxsize=64)
def _weights(device: torch.device, count: int) -> Tensor:
    """Odd numbers; of more the first ones are the same."""
    drawn = [_odd(_SEEDED, seed) for seed in range(-(-count // _SEEDED))]
    return torch.cat(drawn)[:count].to(device)


def _odd(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


def fingerprint(checksums: dict[str, int]) -> str:
    """16 hex digits for a whole set of weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
