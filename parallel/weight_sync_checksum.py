"""A checksum of a tensor's bytes: exact, the same on any device, at the speed of reading them."""

import functools
import hashlib

import torch
from torch import Tensor

_COLUMNS, _ROWS = 64, 4096
_ROW_BYTES = _COLUMNS * 8
_GOLDEN = -7046029254386353130


def _odd(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 of the tensor's bytes and their order; the same on any device, exact whatever the dtype.

    The bytes are int64 words in rows of 64 and blocks of 4,096 rows (2 MiB), the last row filled up with zeros: the
    sum of word * (row weight + column weight) * block weight modulo 2^64, and the length. Row and block weights are
    odd, column weights even; those of rows and columns were drawn at random.

    A change within one word (8 bytes) is always seen, for its weight is odd. Two words that change, or trade places,
    are seen but for one difference in 2^60. More words are unless differences times weights cancel: for zeroed pages,
    shifted or exchanged rows, old bytes and noise one in 2^60 as well. What cancels by construction is not seen: +d,
    -d, -d, +d in the corners of a rectangle within one block is the simplest. Against faults, not an adversary.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() - data.numel() % _ROW_BYTES
    total = _weighted(data[:whole].view(torch.int64).view(-1, _COLUMNS), 0)
    if whole < data.numel():
        last = torch.nn.functional.pad(data[whole:], (0, whole + _ROW_BYTES - data.numel()))
        total = total + _weighted(last.view(torch.int64).view(1, _COLUMNS), whole // _ROW_BYTES)
    return total + data.numel()


def _weighted(words_NC: Tensor, first_row: int) -> Tensor:
    """The weighted sum of whole rows, the first of which is the tensor's row `first_row`."""
    return (_block_by_block if words_NC.is_cpu else _at_once)(words_NC, *divmod(first_row, _ROWS))


def _block_by_block(words_NC: Tensor, first_block: int, first_row: int) -> Tensor:
    """For a CPU: a block's second sum reads the cache."""
    row_weights, column_weights = _weights(words_NC.device)
    total = torch.zeros((), dtype=torch.int64)
    for block, words_RC in enumerate(words_NC.split(_ROWS), first_block):
        rows_R = row_weights[first_row : first_row + len(words_RC)]
        row_sums_R, column_sums_C = words_RC.sum(1), words_RC.sum(0)
        value = torch.dot(row_sums_R, rows_R) + torch.dot(column_sums_C, column_weights)
        total += value * _block_weight(block)
    return total


def _at_once(words_NC: Tensor, first_block: int, first_row: int) -> Tensor:
    """For a GPU: few kernels, whatever the size; the whole blocks, then the rest."""
    row_weights, column_weights = _weights(words_NC.device)
    total = torch.zeros((), dtype=torch.int64, device=words_NC.device)
    whole = len(words_NC) // _ROWS * _ROWS
    for words_KRC in (words_NC[:whole].view(-1, _ROWS, _COLUMNS), words_NC[whole:].unsqueeze(0)):
        if words_KRC.numel() == 0:
            continue
        rows_R = row_weights[first_row : first_row + words_KRC.shape[1]]
        sums_K = (words_KRC.sum(2) * rows_R).sum(1) + (words_KRC.sum(1) * column_weights).sum(1)
        steps = [_block_weight(first_block + block) for block in range(len(sums_K))]
        total += (sums_K * torch.tensor(steps, dtype=torch.int64, device=sums_K.device)).sum()
        first_block += len(sums_K)
    return total


@functools.cache
def _weights(device: torch.device) -> tuple[Tensor, Tensor]:
    return _odd(_ROWS, 1).to(device), (_odd(_COLUMNS, 2) - 1).to(device)


def _block_weight(block: int) -> int:
    """Odd and different for every block: steps of the golden ratio's 64 bits, as a signed number."""
    return (block * _GOLDEN + 1 + 2**63) % 2**64 - 2**63


def fingerprint(checksums: dict[str, int]) -> str:
    """16 hex digits for a whole set of weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
