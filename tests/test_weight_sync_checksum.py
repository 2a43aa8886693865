"""The checksum of a sync: its definition, and every fault that it is there for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phimini.parallel import weight_sync_checksum
from phimini.parallel.weight_sync_checksum import checksum, fingerprint

ROW, BLOCK = 128 * 8, 128 * 8 * 2048  # bytes
PAGE = 4096
SIZES = (
    1,
    3,
    8,
    508,
    ROW,
    ROW + 4,
    40 * PAGE,
    40 * PAGE + 12,
    BLOCK,
    BLOCK + ROW,
    BLOCK + 2 * ROW + 20,
)


def noise(num_bytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def defined(data: Tensor) -> int:
    """The docstring's sum, word by word."""
    padded = np.zeros(max(1, -(-len(data) // ROW)) * ROW, dtype=np.uint8)
    padded[: len(data)] = data.numpy()
    words_NC = padded.view(np.uint64).reshape(-1, 128)
    later = np.frombuffer(padded.tobytes()[4:-4] + bytes(8), dtype=np.uint64)
    sums = []
    for start in range(0, len(words_NC), 2048):
        of_rows = words_NC[start : start + 2048].sum(1).tolist()
        sums += of_rows + [0] * (min(len(words_NC), 2048) - len(of_rows))
        sums += later.reshape(-1, 128)[start : start + 2048].sum(0).tolist()
    sums = np.array(sums, dtype=np.uint64)
    weights = weight_sync_checksum._weights(torch.device("cpu"), 1 + len(sums) // 4096).numpy()
    high = (sums.view(np.int64) >> 32).view(np.uint64)
    total = ((sums + high) * weights[: len(sums)].view(np.uint64)).sum()
    return int(total + np.uint64(len(data)))


@pytest.mark.parametrize("num_bytes", SIZES)
def test_it_is_what_its_docstring_says_on_a_cpu_and_at_once(num_bytes: int, monkeypatch) -> None:
    data = noise(num_bytes)
    expected = defined(data)
    assert int(checksum(data)) % 2**64 == expected
    monkeypatch.setattr(weight_sync_checksum, "_block_by_block", weight_sync_checksum._at_once)
    assert int(checksum(data)) % 2**64 == expected


def test_every_places_weight_is_odd_its_own_and_the_same_for_any_size() -> None:
    cpu = torch.device("cpu")
    weights = weight_sync_checksum._weights(cpu, 3)
    assert bool((weights % 2 != 0).all()) and len(weights.unique()) == len(weights)
    assert torch.equal(weight_sync_checksum._weights(cpu, 2), weights[: 2 * 4096])


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


# --- top bits ---------------------------------------------------------------------------------------
def negated(data: Tensor, dtype: torch.dtype, places: Tensor | slice) -> Tensor:
    spoilt = data.clone().view(dtype)
    spoilt[places] = -spoilt[places]
    return spoilt.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("every", [1, 2, 4, 8, 128, 256, 512])
def test_the_signs_of_every_nth_element_are_seen(dtype: torch.dtype, every: int) -> None:
    """In words of 8 bytes it is the top bit that changes, and an even number of times."""
    data = torch.randn(BLOCK // 2).to(dtype).view(torch.uint8)
    ones = torch.ones(BLOCK // 2, dtype=dtype).view(torch.uint8)
    for first in range(min(every, 8)):
        places = slice(first, None, every)
        assert int(checksum(data)) != int(checksum(negated(data, dtype, places))), first
        assert int(checksum(ones)) != int(checksum(negated(ones, dtype, places))), first


@faults
@given(
    sizes.filter(lambda size: size >= 508),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
    st.integers(0, 10_000),
)
def test_the_signs_of_any_few_elements_are_seen(
    size: int, dtype: torch.dtype, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(size // dtype.itemsize, generator=generator).to(dtype).view(torch.uint8)
    number = data.numel() // dtype.itemsize
    places = torch.randperm(number, generator=generator)[:count]
    assert int(checksum(data)) != int(checksum(negated(data, dtype, places)))


@pytest.mark.parametrize("apart", [2, 256, 512, 256 * 2048], ids="{} elements apart".format)
@pytest.mark.parametrize("first", [0, 1, 254, 255])
def test_two_opposite_signs_are_seen_in_one_row_one_column_and_two_blocks(
    first: int, apart: int
) -> None:
    x = torch.zeros(256 * 2048 + 1024)
    x[first], x[first + apart] = 1.5, -1.5
    places = torch.tensor([first, first + apart])
    data = x.view(torch.uint8)
    assert int(checksum(data)) != int(checksum(negated(data, torch.float32, places)))


def test_what_the_docstring_says_is_not_seen_is_not() -> None:
    """A rectangle within one block, by design: who relies on more must know."""
    numbers = torch.randint(10**5, 10**6, (2048, 256), dtype=torch.int32)
    spoilt = numbers.clone()
    for row, column, sign in ((3, 5, 1), (3, 41, -1), (900, 5, -1), (900, 41, 1)):
        spoilt[row, column] += sign * 12345
    assert int(checksum(numbers)) == int(checksum(spoilt))
    signs = torch.ones(2048, 256)
    signs[3, 41] = signs[900, 5] = -1
    spoilt = signs.clone()
    for row, column in ((3, 5), (3, 41), (900, 5), (900, 41)):
        spoilt[row, column] *= -1
    assert int(checksum(signs)) == int(checksum(spoilt))
