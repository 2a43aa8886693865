"""The checksum of a sync: its definition, and every fault that it is there for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phimini.parallel import weight_sync_checksum
from phimini.parallel.weight_sync_checksum import checksum, fingerprint

ROW, BLOCK = 64 * 8, 64 * 8 * 4096  # bytes
PAGE = 4096
SIZES = (1, 3, 8, 508, ROW, ROW + 4, 40 * PAGE, 40 * PAGE + 12, BLOCK, BLOCK + 2 * ROW + 20)


def noise(num_bytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def defined(data: Tensor) -> int:
    """The docstring's sum, word by word."""
    padded = np.zeros(-(-len(data) // 8) * 8, dtype=np.uint8)
    padded[: len(data)] = data.numpy()
    rows, columns = (
        w.numpy().view(np.uint64) for w in weight_sync_checksum._weights(torch.device("cpu"))
    )
    place = np.arange(len(padded) // 8)
    steps = np.array(
        [weight_sync_checksum._block_weight(k) for k in range(1 + len(place) // (64 * 4096))]
    ).view(np.uint64)
    weights = (rows[place // 64 % 4096] + columns[place % 64]) * steps[place // (64 * 4096)]
    return int(np.sum(padded.view(np.uint64) * weights) + np.uint64(len(data)))


@pytest.mark.parametrize("num_bytes", SIZES)
def test_it_is_what_its_docstring_says_on_a_cpu_and_at_once(num_bytes: int, monkeypatch) -> None:
    data = noise(num_bytes)
    expected = defined(data)
    assert int(checksum(data)) % 2**64 == expected
    monkeypatch.setattr(weight_sync_checksum, "_block_by_block", weight_sync_checksum._at_once)
    assert int(checksum(data)) % 2**64 == expected


def test_every_words_weight_is_odd_and_no_two_are_equal() -> None:
    rows, columns = (
        w.numpy().view(np.uint64) for w in weight_sync_checksum._weights(torch.device("cpu"))
    )
    weights = rows[:, None] + columns[None]
    assert bool((weights % 2 == 1).all()) and len(np.unique(weights)) == weights.size
    steps = [weight_sync_checksum._block_weight(k) for k in range(10_000)]
    assert len(set(steps)) == len(steps) and all(step % 2 == 1 for step in steps)


# --- faults ----------------------------------------------------------------------------------------
sizes = st.sampled_from(SIZES)
anywhere = st.floats(0, 1, exclude_max=True)
dtypes = st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64])
faults = settings(max_examples=60, deadline=None)


@faults
@given(sizes, anywhere, st.integers(0, 7))
def test_any_bit_flipped_is_seen(size: int, where: float, bit: int) -> None:
    data = noise(size)
    spoilt = data.clone()
    spoilt[int(where * size)] ^= 1 << bit
    assert int(checksum(data)) != int(checksum(spoilt))


@faults
@given(sizes, dtypes, anywhere, anywhere)
def test_any_two_elements_swapped_are_seen(
    size: int, dtype: torch.dtype, one: float, other: float
) -> None:
    data = noise(size - size % dtype.itemsize).view(dtype)
    if not len(data):
        return
    i, j = int(one * len(data)), int(other * len(data))
    spoilt = data.clone()
    spoilt[[i, j]] = data[[j, i]]
    same = torch.equal(spoilt.view(torch.uint8), data.view(torch.uint8))
    assert (int(checksum(data)) == int(checksum(spoilt))) == same


@faults
@given(sizes, anywhere)
def test_a_zeroed_page_is_seen(size: int, where: float) -> None:
    data = noise(size)
    start = int(where * size) // PAGE * PAGE
    spoilt = data.clone()
    spoilt[start : start + PAGE] = 0
    same = torch.equal(spoilt, data)
    assert (int(checksum(data)) == int(checksum(spoilt))) == same


@faults
@given(sizes, st.sampled_from([1, 2, 4, 8, 16, ROW, PAGE, -1, -8, -ROW]))
def test_bytes_read_from_a_shifted_place_are_seen(size: int, shift: int) -> None:
    segment = noise(size + 2 * PAGE)
    right = segment[PAGE : PAGE + size].clone()
    shifted = segment[PAGE + shift : PAGE + shift + size].clone()
    same = torch.equal(right, shifted)
    assert (int(checksum(right)) == int(checksum(shifted))) == same


@faults
@given(sizes, st.integers(1, 600))
def test_a_truncated_tensor_and_one_with_zeros_added_are_seen(size: int, cut: int) -> None:
    data = torch.zeros(size + cut, dtype=torch.uint8)
    assert int(checksum(data)) != int(checksum(data[:size])), "zeros count too"


@faults
@given(sizes, st.integers(0, 1000))
def test_a_tensor_in_the_place_of_another_of_its_shape_is_seen(size: int, seed: int) -> None:
    one, other = noise(size, seed), noise(size, seed + 1)
    assert (int(checksum(one)) == int(checksum(other))) == torch.equal(one, other)


@pytest.mark.parametrize("width", [64, 128, 256, 3072, 8192])
def test_any_two_rows_of_a_matrix_swapped_are_seen(width: int) -> None:
    x = torch.randn(600, width)
    for a, b in ((0, 1), (0, 251), (3, 502), (17, 599), (250, 501)):
        y = x.clone()
        y[[a, b]] = x[[b, a]]
        assert int(checksum(x)) != int(checksum(y)), (a, b)


def test_it_is_of_order_and_not_of_strides() -> None:
    rows = torch.randn(2000, 256)
    halves = torch.cat((rows[1000:], rows[:1000]))
    assert int(checksum(halves)) != int(checksum(rows))
    assert int(checksum(rows.T)) == int(checksum(rows.T.contiguous())) != int(checksum(rows))
    assert fingerprint({"a": 1, "b": 2}) != fingerprint({"a": 2, "b": 1})


def test_what_the_docstring_says_is_not_seen_is_not() -> None:
    """A rectangle within one block, by design: who relies on more must know."""
    words = noise(BLOCK).view(torch.int64).view(4096, 64)
    spoilt = words.clone()
    for row, column, sign in ((3, 5, 1), (3, 40, -1), (900, 5, -1), (900, 40, 1)):
        spoilt[row, column] += sign * 12345
    assert int(checksum(words)) == int(checksum(spoilt))
