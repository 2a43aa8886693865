"""A checksum of a tensor's bytes: exact, the same on any device, at the speed of reading them."""

import hashlib

import torch
from torch import Tensor

_COLUMNS, _ROWS = 256, 128
_BLOCK_BYTES = _COLUMNS * _ROWS * 8


def _odd(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


_ROW_WEIGHTS, _COLUMN_WEIGHTS = _odd(_ROWS, 1), _odd(_COLUMNS, 2) - 1


def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 of the tensor's bytes and their order; the same on any device, exact whatever the dtype.

    The bytes are int64 words in blocks of 128 rows of 256: the sum of word * (row weight + column weight) * block
    weight modulo 2^64, and the length. Every product of weights is odd, so one changed word always changes the sum;
    two words that trade places do unless their difference happens to be divisible (2^-60). Not meant against an
    adversary.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // _BLOCK_BYTES * _BLOCK_BYTES
    blocks: list[Tensor] = []
    if whole:
        words_KRC = data[:whole].view(torch.int64).view(-1, _ROWS, _COLUMNS)
        # A block at a time on a CPU: its second sum then reads the cache. At once on a GPU: few launches.
        parts = words_KRC.unbind() if data.device.type == "cpu" else [words_KRC]
        blocks += [_blocks(part) for part in parts]
    if whole < data.numel():
        rest = data[whole:]
        if tail := -rest.numel() % (_COLUMNS * 8):
            rest = torch.cat((rest, rest.new_zeros(tail)))
        blocks.append(_blocks(rest.view(torch.int64).view(-1, _COLUMNS)))
    if len(blocks) == 1 and blocks[0].ndim == 0:
        return blocks[0] + data.numel()
    sums_K = torch.cat([block.reshape(-1) for block in blocks])
    # Odd and different for every block: steps of the golden ratio's 64 bits.
    steps_K = torch.arange(len(sums_K), device=data.device) * -7046029254386353130 + 1
    return (sums_K * steps_K).sum() + data.numel()


def _blocks(words: Tensor) -> Tensor:
    """(..., R, 256) -> (...): each block's weighted sum."""
    row, column = _ROW_WEIGHTS[: words.shape[-2]], _COLUMN_WEIGHTS
    if words.device.type != "cpu":
        row, column = row.to(words.device), column.to(words.device)
    return (words.sum(-2) * column).sum(-1) + (words.sum(-1) * row).sum(-1)


def fingerprint(checksums: dict[str, int]) -> str:
    """16 hex digits for a whole set of weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
