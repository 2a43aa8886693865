"""Numbers in Triton's interpreter: bf16 and fp8 as values, rounding as on a GPU, libdevice in numpy.

The stock interpreter keeps bf16 and fp8 as unsigned integers and computes on those. Here an operation widens
them to fp32 (`values_of`), computes, and rounds to nearest even (`to_bits`). `REPAIRED` lists the methods of
triton's InterpreterBuilder that this replaces; `interpreter.install()` does it.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock

Handle = stock.TensorHandle
Builder = stock.InterpreterBuilder

# name of the triton type -> torch's type, largest finite value (casts to fp8 saturate on NVIDIA GPUs)
_FP8 = {
    "fp8e4nv": (torch.float8_e4m3fn, 448.0),
    "fp8e5": (torch.float8_e5m2, 57344.0),
    "fp8e4b8": (torch.float8_e4m3fnuz, 240.0),
    "fp8e5b16": (torch.float8_e5m2fnuz, 57344.0),
}
NARROW = {"bf16", *_FP8}  # numpy holds these as unsigned integers


def dtype_name(handle: Handle) -> str:
    return str(handle.dtype.scalar.name)


def values_of(handle: Handle) -> np.ndarray:
    """Return bf16 and fp8 widened to fp32, and other types unchanged."""
    name, data = dtype_name(handle), handle.data
    if name not in NARROW or data.dtype == np.bool_:
        return data
    if name == "bf16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    bits = torch.from_numpy(np.ascontiguousarray(data))
    return bits.view(_FP8[name][0]).float().numpy()


def to_bits(values: np.ndarray, dtype: tl.dtype, truncate: bool = False) -> np.ndarray:
    """Return the numpy array that holds `values` in `dtype`, rounded to nearest even (or toward zero)."""
    name = str(dtype.scalar.name)
    if name not in NARROW:
        return values.astype(stock._get_np_dtype(dtype))
    if name == "bf16":
        u = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = u if truncate else u + np.uint32(0x7FFF) + ((u >> 16) & np.uint32(1))
        quiet_nan = (u >> 16) | np.uint32(0x40)
        return np.where(np.isnan(u.view(np.float32)), quiet_nan, rounded >> 16).astype(np.uint16)
    assert not truncate, f"{name}: a cast toward zero is not modelled"
    torch_dtype, largest = _FP8[name]
    clipped = np.clip(np.ascontiguousarray(values, dtype=np.float32), -largest, largest)
    return torch.from_numpy(clipped).to(torch_dtype).view(torch.uint8).numpy()


def make_handle(values: np.ndarray, dtype: tl.dtype) -> Handle:
    return Handle(to_bits(np.asarray(values), dtype), dtype.scalar)


def as_tf32(x: np.ndarray) -> np.ndarray:
    u = np.ascontiguousarray(x).view(np.uint32)
    return ((u + np.uint32(0xFFF) + ((u >> 13) & np.uint32(1))) & np.uint32(0xFFFFE000)).view(
        np.float32
    )


# --- arithmetic ------------------------------------------------------------------------------------
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
_stock_binary, _stock_unary = Builder.binary_op, Builder.unary_op
_stock_ternary, _stock_reduce = Builder.ternary_op, stock.ReduceScanOpInterface.apply


def _binary_op(self, lhs: Handle, rhs: Handle, op) -> Handle:
    if dtype_name(lhs) not in NARROW or op in _BITWISE:
        return _stock_binary(self, lhs, rhs, op)
    result = op(values_of(lhs), values_of(rhs))
    return Handle(result, tl.int1) if result.dtype == np.bool_ else make_handle(result, lhs.dtype)


def _unary_op(self, arg: Handle, op) -> Handle:
    if dtype_name(arg) not in NARROW:
        return _stock_unary(self, arg, op)
    return make_handle(op(values_of(arg)), arg.dtype)


def _ternary_op(self, lhs: Handle, rhs: Handle, other: Handle, op) -> Handle:
    if dtype_name(other) not in NARROW or op is np.where:  # a choice moves bits
        return _stock_ternary(self, lhs, rhs, other, op)
    return make_handle(op(values_of(lhs), values_of(rhs), values_of(other)), other.dtype)


def _fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
    return make_handle(values_of(x) * values_of(y) + values_of(z), z.dtype)


def _cast(self, src: Handle, dst_type) -> Handle:
    return make_handle(values_of(src), dst_type)


def _fp_to_fp(self, src: Handle, dst_type, rounding_mode) -> Handle:
    truncate = rounding_mode is not None and "RTZ" in str(rounding_mode)
    return Handle(to_bits(values_of(src), dst_type, truncate), dst_type.scalar)


def _get_bf16(self, value: float) -> Handle:
    return make_handle(np.array([value], np.float32), tl.bfloat16)


def repaired_reduce(self, input):
    """Compute tl.reduce and tl.associative_scan with narrow types widened to fp32."""
    if not isinstance(input, tuple):
        return self.apply((input,))[0]
    narrow = [dtype_name(t.handle) in NARROW for t in input]
    wide = tuple(
        self.to_tensor(values_of(t.handle), tl.float32) if n else t
        for t, n in zip(input, narrow, strict=True)
    )
    results = _stock_reduce(self, wide)
    return tuple(
        tl.core.tensor(
            make_handle(r.handle.data, t.dtype),
            r.type.with_element_ty(t.dtype) if r.type.is_block() else t.dtype,
        )
        if n
        else r
        for r, t, n in zip(results, input, narrow, strict=True)
    )


REPAIRED: dict[str, Callable] = {
    "binary_op": _binary_op,
    "unary_op": _unary_op,
    "ternary_op": _ternary_op,
    "create_fma": _fma,
    "cast_impl": _cast,
    "create_fp_to_fp": _fp_to_fp,
    "get_bf16": _get_bf16,
}


# --- libdevice -------------------------------------------------------------------------------------
LIBDEVICE: dict[str, Callable] = {
    "rsqrt": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1,
    "log": np.log, "log2": np.log2, "log1p": np.log1p, "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    "pow": np.power, "abs": np.abs, "rint": np.rint, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc,
    "max": np.fmax, "min": np.fmin, "fast_expf": np.exp, "fast_logf": np.log, "div_rn": np.divide,
    "isnan": np.isnan, "isinf": np.isinf, "erf": np.vectorize(math.erf, otypes=[np.float32]),
}  # fmt: skip


def libdevice_twin(name: str) -> Callable:
    def call(*args, **_kwargs):
        handles = [
            a.handle if isinstance(a, tl.tensor) else Handle(np.array([a], np.float32), tl.float32)
            for a in args
        ]
        result = make_handle(LIBDEVICE[name](*[values_of(h) for h in handles]), handles[0].dtype)
        return tl.tensor(result, args[0].type)

    call.__module__ = __name__
    return call
