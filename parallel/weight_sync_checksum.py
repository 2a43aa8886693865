"""A checksum of a tensor's bytes: exact, the same on any device, at the speed of reading them."""

import hashlib

import numpy as np
import torch
from torch import Tensor

_COLUMNS = _ROWS = 256
_BLOCK_BYTES = _COLUMNS * _ROWS * 8


def _odd(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


_ROW_WEIGHTS, _COLUMN_WEIGHTS = _odd(_ROWS, 1), _odd(_COLUMNS, 2) - 1


def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 of the tensor's bytes and their order; the same on any device, exact whatever the dtype.

    The bytes are int64 words in blocks of 256 rows of 256: the sum of word * (row weight + column weight) * block
    weight modulo 2^64, and the length. Every product of weights is odd, so one changed word always changes the sum;
    two words that trade places do unless their difference happens to be divisible (2^-60). Not meant against an
    adversary.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // _BLOCK_BYTES * _BLOCK_BYTES
    words_KRC = data[:whole].view(torch.int64).view(-1, _ROWS, _COLUMNS)
    column_sums_KC, row_sums_KR = _sums(words_KRC)
    if whole < data.numel():  # the last block, with zeros for what is missing
        rest = data[whole:]
        if missing := -rest.numel() % (_COLUMNS * 8):
            rest = torch.cat((rest, rest.new_zeros(missing)))
        words_RC = rest.view(torch.int64).view(-1, _COLUMNS)
        rows_R = torch.nn.functional.pad(words_RC.sum(1), (0, _ROWS - len(words_RC)))
        column_sums_KC = torch.cat((column_sums_KC, words_RC.sum(0)[None]))
        row_sums_KR = torch.cat((row_sums_KR, rows_R[None]))
    row, column = _ROW_WEIGHTS.to(data.device), _COLUMN_WEIGHTS.to(data.device)
    sums_K = (column_sums_KC * column).sum(1) + (row_sums_KR * row).sum(1)
    # Odd and different for every block: steps of the golden ratio's 64 bits.
    steps_K = torch.arange(len(sums_K), device=data.device) * -7046029254386353130 + 1
    return (sums_K * steps_K).sum() + data.numel()


def _sums(words_KRC: Tensor) -> tuple[Tensor, Tensor]:
    """Each block's sums over rows (K, C) and over columns (K, R)."""
    if words_KRC.device.type != "cpu" or len(words_KRC) == 0:
        return words_KRC.sum(1), words_KRC.sum(2)
    column_sums_KC = torch.empty(len(words_KRC), _COLUMNS, dtype=torch.int64)
    row_sums_KR = torch.empty(len(words_KRC), _ROWS, dtype=torch.int64)
    # A block at a time: its second sum reads the cache. numpy adds rows twice as fast as torch 2.13, columns slower.
    blocks = zip(words_KRC.numpy(), column_sums_KC.numpy(), words_KRC, row_sums_KR, strict=True)
    for block, column_sums, words_RC, row_sums in blocks:
        np.add.reduce(block, 0, out=column_sums)
        torch.sum(words_RC, 1, out=row_sums)
    return column_sums_KC, row_sums_KR


def fingerprint(checksums: dict[str, int]) -> str:
    """16 hex digits for a whole set of weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
