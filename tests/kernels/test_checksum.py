"""The checksum: its definition, its kernel, and every fault that it is there for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import observe
from numerics import DEVICE
from torch import Tensor

from phimini.kernels.backend.launch import Backend
from phimini.kernels.checksum import _weights, checksum, checksum_reference, checksums
from phimini.parallel.weight_sync.sync import fingerprint

ROW, BLOCK = 129 * 8, 129 * 8 * 127  # bytes
PAGE = 4096
BACKENDS: list[Backend] = ["triton", "torch"]
SIZES = (
    0,
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
    9 * BLOCK + 4,
)


def noise(num_bytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def defined(data: Tensor) -> int:
    """The docstring's sum, word by word."""
    cpu = torch.device("cpu")
    blocks = len(data) // BLOCK + 1
    padded = np.zeros(blocks * BLOCK, dtype=np.uint8)
    padded[: len(data)] = data.numpy()
    words_KRC = padded.view(np.uint64).reshape(blocks, 127, 129)
    weights = _weights(cpu, max(blocks, 256)).tolist()
    total = len(data)
    for words_RC, of_block in zip(words_KRC, weights, strict=False):
        sums = [*words_RC.sum(1).tolist(), *words_RC.sum(0).tolist()]
        high = [(s - (s >> 63 << 64)) >> 32 for s in sums]  # as a signed number
        total += of_block * sum((s + h) * w for s, h, w in zip(sums, high, weights, strict=False))
    return total % 2**64


@pytest.mark.parametrize("num_bytes", SIZES)
def test_it_is_what_its_docstring_says(num_bytes: int) -> None:
    data = noise(num_bytes).to(DEVICE)
    expected = defined(data.cpu())
    assert int(checksum_reference(data)) % 2**64 == expected
    for backend in BACKENDS:
        assert checksum(data, _backend=backend) % 2**64 == expected, backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_several_each_is_its_own_and_may_begin_anywhere(backend: Backend) -> None:
    bucket = noise(3 * BLOCK).to(DEVICE)
    tensors = [bucket[start:end] for start, end in ((0, 5), (2, 7), (3, BLOCK + 90), (8, 8))]
    assert checksums(tensors, _backend=backend) == [int(checksum_reference(t)) for t in tensors]
    assert checksums([], _backend=backend) == []


def test_of_a_cpu_and_of_another_device_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="expected all on one device"):
        checksums([torch.ones(1), torch.ones(1, device="meta")])


def test_the_order_of_the_programs_does_not_matter_and_no_byte_beyond_the_end_is_read() -> None:
    data = noise(3 * BLOCK + 5 * ROW + 16).to(DEVICE)
    for seed in (None, 1, 2):
        with observe(shuffle_seed=seed):
            assert checksum(data, _backend="triton") == int(checksum_reference(data))


def test_every_places_weight_is_odd_its_own_and_the_same_for_any_size() -> None:
    cpu = torch.device("cpu")
    weights = _weights(cpu, 9000)
    assert bool((weights % 2 != 0).all()) and len(weights.unique()) == len(weights) == 9000
    assert torch.equal(_weights(cpu, 5000), weights[:5000])


# --- faults ----------------------------------------------------------------------------------------
sizes = st.sampled_from(SIZES[1:])
anywhere = st.floats(0, 1, exclude_max=True)
dtypes = st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64])
faults = settings(max_examples=60, deadline=None)


@faults
@given(sizes, anywhere, st.integers(0, 7))
def test_any_bit_flipped_is_seen(size: int, where: float, bit: int) -> None:
    data = noise(size)
    spoilt = data.clone()
    spoilt[int(where * size)] ^= 1 << bit
    assert checksum(data) != checksum(spoilt)


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
    assert (checksum(data) == checksum(spoilt)) == same


@faults
@given(sizes, anywhere)
def test_a_zeroed_page_is_seen(size: int, where: float) -> None:
    data = noise(size)
    start = int(where * size) // PAGE * PAGE
    spoilt = data.clone()
    spoilt[start : start + PAGE] = 0
    same = torch.equal(spoilt, data)
    assert (checksum(data) == checksum(spoilt)) == same


@faults
@given(sizes, st.sampled_from([1, 2, 4, 8, 16, ROW, PAGE, -1, -8, -ROW]))
def test_bytes_read_from_a_shifted_place_are_seen(size: int, shift: int) -> None:
    segment = noise(size + 2 * PAGE)
    right = segment[PAGE : PAGE + size].clone()
    shifted = segment[PAGE + shift : PAGE + shift + size].clone()
    same = torch.equal(right, shifted)
    assert (checksum(right) == checksum(shifted)) == same


@faults
@given(sizes, st.integers(1, 600))
def test_a_truncated_tensor_and_one_with_zeros_added_are_seen(size: int, cut: int) -> None:
    data = torch.zeros(size + cut, dtype=torch.uint8)
    assert checksum(data) != checksum(data[:size]), "zeros count too"


@faults
@given(sizes, st.integers(0, 1000))
def test_a_tensor_in_the_place_of_another_of_its_shape_is_seen(size: int, seed: int) -> None:
    one, other = noise(size, seed), noise(size, seed + 1)
    assert (checksum(one) == checksum(other)) == torch.equal(one, other)


@pytest.mark.parametrize("width", [64, 128, 256, 3072, 8192])
def test_any_two_rows_of_a_matrix_swapped_are_seen(width: int) -> None:
    x = torch.randn(600, width)
    for a, b in ((0, 1), (0, 251), (3, 502), (17, 599), (250, 501)):
        y = x.clone()
        y[[a, b]] = x[[b, a]]
        assert checksum(x) != checksum(y), (a, b)


def test_it_is_of_order_and_not_of_strides() -> None:
    rows = torch.randn(2000, 256)
    halves = torch.cat((rows[1000:], rows[:1000]))
    assert checksum(halves) != checksum(rows)
    assert checksum(rows.T) == checksum(rows.T.contiguous()) != checksum(rows)
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
        assert checksum(data) != checksum(negated(data, dtype, places)), first
        assert checksum(ones) != checksum(negated(ones, dtype, places)), first


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
    assert checksum(data) != checksum(negated(data, dtype, places))


@pytest.mark.parametrize("apart", [2, 256, 258, 512, 258 * 127], ids="{} elements apart".format)
@pytest.mark.parametrize("first", [0, 1, 256, 257])
def test_two_opposite_signs_are_seen_in_one_row_one_column_and_two_blocks(
    first: int, apart: int
) -> None:
    x = torch.zeros(258 * 127 + 1024)
    x[first], x[first + apart] = 1.5, -1.5
    places = torch.tensor([first, first + apart])
    data = x.view(torch.uint8)
    assert checksum(data) != checksum(negated(data, torch.float32, places))


@pytest.mark.parametrize("width", [64, 128, 256, 512, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_signs_of_half_the_rows_or_columns_of_a_matrix_are_seen(
    width: int, dtype: torch.dtype
) -> None:
    """As when rotary halves are turned the wrong way."""
    x = torch.ones(256, width, dtype=dtype)
    half = width // 2
    for rows, columns in (
        (slice(128), slice(None)),
        (slice(None, None, 2), slice(None)),
        (slice(None), slice(half)),
        (slice(None), slice(1, None, 2)),
        (slice(64, None), slice(half, None)),
    ):
        spoilt = x.clone()
        spoilt[rows, columns] *= -1
        assert checksum(spoilt) != checksum(x), (rows, columns)


def test_what_the_docstring_says_is_not_seen_is_not() -> None:
    """A rectangle within one block, by design: who relies on more must know."""
    numbers = torch.randint(10**5, 10**6, (127, 258), dtype=torch.int32)
    spoilt = numbers.clone()
    for row, column, sign in ((3, 5, 1), (3, 41, -1), (90, 5, -1), (90, 41, 1)):
        spoilt[row, column] += sign * 12345
    assert checksum(numbers) == checksum(spoilt)
    signs = torch.ones(127, 258)
    spoilt = signs.clone()
    for row, column in ((3, 5), (3, 41), (90, 5), (90, 41)):
        spoilt[row, column] *= -1
    assert checksum(signs) == checksum(spoilt)
