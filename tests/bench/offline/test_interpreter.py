"""The repaired interpreter: right numbers where the stock one is wrong, and planted mistakes are reported."""

# triton types constexpr parameters as tl.constexpr, not int
# pyright: reportArgumentType=false

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from interpreter import OutOfBoundsError, RaceError, install, observe, uninstall
from triton.language.extra import libdevice
from triton.language.extra.libdevice import tanh
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
BF16 = torch.bfloat16


@pytest.fixture
def stock_interpreter() -> Iterator[None]:
    uninstall()
    yield
    install()


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _truncate_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    bits = tl.load(x_ptr + i).to(tl.uint32, bitcast=True) >> 16
    tl.store(y_ptr + i, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True))


@triton.jit
def _bf16_maths_kernel(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(y_ptr + i, tl.where(a > b, a * b + a, -b) * 0.5)


@triton.jit
def _dot_kernel(
    a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k)
    b = tl.load(b_ptr + k[:, None] * N + n)
    tl.store(c_ptr + m[:, None] * N + n, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr, tl.sum(x, axis=0))
    tl.store(y_ptr + 1, tl.max(x, axis=0))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int8)


def dot(a: torch.Tensor, b: torch.Tensor, precision: str = "tf32") -> torch.Tensor:
    c = torch.empty(a.shape[0], b.shape[1])
    _dot_kernel[(1,)](a, b, c, M=a.shape[0], N=b.shape[1], K=a.shape[1], PRECISION=precision)
    return c


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# --- numbers ---------------------------------------------------------------------------------------
CASTS = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def awkward_values() -> torch.Tensor:
    x = torch.randn(1024) * torch.logspace(-8, 5, 1024)
    x[:6] = torch.tensor([1.9999, 0.0, -0.0, torch.nan, 3e-41, 1.99])
    return x


@pytest.mark.parametrize("dtype", CASTS, ids=str)
def test_a_cast_rounds_like_a_gpu(dtype: torch.dtype) -> None:
    x = awkward_values()
    y = torch.empty(1024, dtype=dtype)
    _cast_kernel[(1,)](x, y, BLOCK=1024)
    limit = LARGEST.get(dtype, torch.inf)
    expected = x.clamp(-limit, limit).to(dtype)  # casts to fp8 saturate
    finite = ~x.isnan()
    assert torch.equal(bits(y)[finite], bits(expected)[finite])
    assert y.float()[3].isnan()


def test_the_stock_cast_to_bf16_truncates(stock_interpreter: None) -> None:
    x = torch.randn(1024)
    y = torch.empty(1024, dtype=BF16)
    _cast_kernel[(1,)](x, y, BLOCK=1024)
    wrong = (bits(y) != bits(x.to(BF16))).float().mean().item()
    assert 0.4 < wrong < 0.6, "triton's interpreter rounds now: this repair can go"


def test_planted_bf16_truncation_is_visible() -> None:
    x = torch.rand(1024) + 1
    rounded, truncated = torch.empty(1024, dtype=BF16), torch.empty(1024, dtype=BF16)
    _cast_kernel[(1,)](x, rounded, BLOCK=1024)
    _truncate_kernel[(1,)](x, truncated, BLOCK=1024)
    unit = 2**-7
    assert (rounded.float() - x).mean().abs().item() < 0.05 * unit
    assert (truncated.float() - x).mean().item() < -0.4 * unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_dot_of_narrow_types(dtype: torch.dtype) -> None:
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    assert relative(dot(a, b), a.double() @ b.double()) < 1e-6


def test_the_stock_dot_of_bf16_is_garbage(stock_interpreter: None) -> None:
    a, b = torch.randn(32, 64).to(BF16), torch.randn(64, 16).to(BF16)
    assert relative(dot(a, b), a.double() @ b.double()) > 1e3, "triton's interpreter knows bf16 now"


def test_fp32_dot_is_tf32_unless_ieee_is_asked() -> None:
    a, b = torch.randn(32, 64), torch.randn(64, 16)
    exact = a.double() @ b.double()
    assert 1e-4 < relative(dot(a, b), exact) < 1e-3
    assert relative(dot(a, b, "ieee"), exact) < 1e-6
    with observe(tf32=False):
        assert relative(dot(a, b), exact) < 1e-6


def test_bf16_arithmetic_rounds_each_operation() -> None:
    a, b = torch.randn(2, 256).to(BF16)
    y = torch.empty(256, dtype=BF16)
    _bf16_maths_kernel[(1,)](a, b, y, BLOCK=256)
    assert torch.equal(y, torch.where(a > b, a * b + a, -b) * 0.5)


def test_bf16_reductions() -> None:
    x = torch.randn(256).to(BF16)
    y = torch.empty(2, dtype=BF16)
    _sum_kernel[(1,)](x, y, BLOCK=256)
    assert y[1] == x.max()
    assert abs(y[0].float() - x.float().sum()).item() < 0.05


@triton.jit
def _libdevice_kernel(x_ptr, y_ptr, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tanh(libdevice.rsqrt(tl.load(x_ptr + i))) * scale.to(tl.float32))


def test_libdevice_and_float_arguments() -> None:
    x, y = torch.rand(64) + 0.5, torch.empty(64)
    _libdevice_kernel[(1,)](x, y, 0.1, BLOCK=64)
    torch.testing.assert_close(y, torch.tanh(x.rsqrt()) * 0.1)


@triton.autotune(configs=[triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64})], key=["N"])
@triton.jit
def _autotuned_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < N, other=0.0), mask=i < N)


def test_autotune_runs_the_chosen_configurations() -> None:
    x = torch.randn(100)
    for config, grids in ((0, [7]), (1, [2]), ("all", [7, 2])):
        y = torch.empty(100)
        with observe(config=config) as report:
            _autotuned_kernel[lambda meta: (triton.cdiv(meta["N"], meta["BLOCK"]),)](x, y, 100)
        assert [launch.grid[0] for launch in report.launches] == grids
        assert torch.equal(y, 2 * x)


def test_stock_autotune_fails(stock_interpreter: None) -> None:
    with pytest.raises(RuntimeError, match="active drivers"):
        _autotuned_kernel[(7,)](torch.randn(100), torch.empty(100), 100)


@triton.jit
def _undefined_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + i, mask=i < N), axis=0))


def test_a_masked_load_without_other_is_undefined() -> None:
    y = torch.empty(1)
    _undefined_kernel[(1,)](torch.randn(16), y, 16, BLOCK=16)
    assert y.isfinite()
    _undefined_kernel[(1,)](torch.randn(10), y, 10, BLOCK=16)
    assert y.isnan()


# --- bounds ----------------------------------------------------------------------------------------
@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < N) | (not MASKED)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=inside, other=0.0), mask=i < N)


def test_planted_missing_mask_is_reported() -> None:
    x, y = torch.randn(100), torch.empty(100)
    _copy_kernel[(4,)](x, y, 100, MASKED=True, BLOCK=32)
    assert torch.equal(x, y)
    expected = (
        r"out-of-bounds load in _copy_kernel program \(3, 0, 0\): argument 'x_ptr' has 400 bytes"
    )
    with pytest.raises(OutOfBoundsError, match=expected):
        _copy_kernel[(4,)](x, y, 100, MASKED=False, BLOCK=32)


def test_beyond_a_slice_is_out_of_bounds_too() -> None:
    storage = torch.randn(200)
    with pytest.raises(OutOfBoundsError, match="program \\(3, 0, 0\\): argument 'x_ptr'"):
        _copy_kernel[(4,)](storage[:100], torch.empty(100), 100, MASKED=False, BLOCK=32)


def test_a_pointer_never_reaches_another_argument() -> None:
    both = torch.randn(256)
    with pytest.raises(OutOfBoundsError, match="program \\(4, 0, 0\\): argument 'x_ptr'"):
        _copy_kernel[(5,)](both[:128], both[128:], 128, MASKED=False, BLOCK=32)


# --- races -----------------------------------------------------------------------------------------
@triton.jit
def _accumulate_kernel(x_ptr, y_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + i)
    if ATOMIC:
        tl.atomic_add(y_ptr + i, x)
    else:
        tl.store(y_ptr + i, tl.load(y_ptr + i) + x)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_planted_non_atomic_accumulation_is_reported(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16).to(dtype)
    for atomic in (True, False):
        y = torch.zeros(16, dtype=dtype)
        with observe(races="record") as report:
            _accumulate_kernel[(4,)](x, y, ATOMIC=atomic, BLOCK=16)
        torch.testing.assert_close(y, x[0] + x[1] + x[2] + x[3])  # the value cannot tell
        assert bool(report.races) is not atomic
    expected = r"race in _accumulate_kernel: program \(1, 0, 0\) reads what another stored \(program \(0, 0, 0\)\): argument 'y_ptr', element 0"
    with pytest.raises(RaceError, match=expected):
        _accumulate_kernel[(4,)](x, torch.zeros(16, dtype=dtype), ATOMIC=False, BLOCK=16)


@triton.jit
def _rotate_kernel(x_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + (i + BLOCK) % N))


@triton.jit
def _same_place_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def _lanes_kernel(y_ptr, WIDTH: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(y_ptr + i % WIDTH, i.to(tl.float32))


def test_races_of_other_kinds() -> None:
    with pytest.raises(RaceError, match="stores what another read"):
        _rotate_kernel[(4,)](torch.randn(64), 64, BLOCK=16)
    with pytest.raises(RaceError, match="stores what another stored"):
        _same_place_kernel[(2,)](torch.empty(1))
    _lanes_kernel[(1,)](torch.empty(16), WIDTH=16)
    with pytest.raises(RaceError, match="one store gives an element of argument 'y_ptr' 9 values"):
        _lanes_kernel[(1,)](torch.empty(8), WIDTH=8)


def test_program_order_can_be_shuffled() -> None:
    seen = set()
    for seed in range(8):
        y = torch.empty(1)
        with observe(races="record", shuffle_seed=seed):
            _same_place_kernel[(8,)](y)
        seen.add(y.item())
    assert len(seen) > 1, "the last program was the same in 8 shuffled orders"
    with observe(races="record"):
        _same_place_kernel[(8,)](y)
    assert y.item() == 7


# --- counting --------------------------------------------------------------------------------------
@triton.jit
def _strided_kernel(x_ptr, y_ptr, STRIDE: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(y_ptr + i, tl.load(x_ptr + i * STRIDE) + tl.load(x_ptr + i * STRIDE))


def test_bytes_and_sectors() -> None:
    for stride, sectors in ((1, 2), (8, 16)):
        with observe() as report:
            _strided_kernel[(1,)](torch.randn(128), torch.empty(16), STRIDE=stride)
        (launch,) = report.launches
        assert (launch.kernel, launch.grid) == ("_strided_kernel", (1, 1, 1))
        assert (launch.loaded_bytes, launch.unique_loaded_bytes) == (128, 64)
        assert (launch.stored_bytes, launch.unique_stored_bytes) == (64, 64)
        assert launch.load_sectors == 2 * sectors
        assert launch.requested_bytes == 192
        assert launch.bytes_by_argument == {"x_ptr": 128, "y_ptr": 64}


def test_dot_flops_and_atomic_bytes() -> None:
    with observe() as report:
        dot(torch.randn(16, 32), torch.randn(32, 64))
        _accumulate_kernel[(2,)](torch.randn(2, 16), torch.zeros(16), ATOMIC=True, BLOCK=16)
    assert [launch.dot_flops for launch in report.launches] == [2 * 16 * 32 * 64, 0]
    assert report.launches[1].atomic_bytes == 128
    assert report.launches[1].requested_bytes == 128 + 2 * 128


@triton.jit
def _descriptor_kernel(x_desc, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    y_desc = tl.make_tensor_descriptor(y_ptr, shape=[4, N], strides=[N, 1], block_shape=[1, BLOCK])
    y_desc.store([row, 0], 2 * x_desc.load([row, 0]))


def test_tensor_descriptors() -> None:
    x, y = torch.randn(4, 24).to(BF16), torch.empty(4, 24, dtype=BF16)
    with observe() as report:
        _descriptor_kernel[(4,)](TensorDescriptor.from_tensor(x, [1, 32]), y, 24, BLOCK=32)
    assert torch.equal(y, 2 * x)
    assert report.launches[0].loaded_bytes == report.launches[0].stored_bytes == 4 * 24 * 2


# --- somebody else's kernels -----------------------------------------------------------------------
def test_ligers_rms_norm_in_bf16() -> None:
    ops = pytest.importorskip("liger_kernel.ops.rms_norm")
    x, w = torch.randn(4, 96).to(BF16), torch.rand(96).to(BF16)
    y = ops.rms_norm_forward(x, w, 1e-5, 0.0, "gemma", None)[0]
    expected = torch.nn.functional.rms_norm(x.double(), (96,), w.double(), 1e-5)
    assert relative(y, expected) < 3e-3


def test_the_stock_interpreter_fails_on_ligers_rms_norm(stock_interpreter: None) -> None:
    ops = pytest.importorskip("liger_kernel.ops.rms_norm")
    with pytest.raises(Exception, match="has no attribute"):
        ops.rms_norm_forward(torch.randn(4, 96), torch.rand(96), 1e-5, 0.0, "llama", None)
