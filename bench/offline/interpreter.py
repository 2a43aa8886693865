"""Triton's CPU interpreter, repaired: kernels give a GPU's numbers, and their mistakes are reported.

    import os; os.environ["TRITON_INTERPRET"] = "1"     # before any kernel is decorated
    from phimini.bench.offline import interpreter
    interpreter.install()                               # from now on every launch is checked
    with interpreter.observe(shuffle_seed=1) as report:
        op(x)
    report.launches[0].requested_bytes, report.races

The stock interpreter of triton 3.6.0 and 3.7.1, and this one:

    bf16, fp8                  multiplies and compares bit patterns; casts truncate    true values, rounded to
                                                                                       nearest even, fp8 saturates
    fp32 tl.dot                always exact                                            tf32, unless "ieee" is asked
    autotune                   needs a GPU                                             first, i-th or every config
    libdevice                  returns None                                            numpy
    Python float arguments     stay Python floats                                      fp32, as on a GPU
    masked load, no `other=`   zeros                                                   NaN: they are undefined
    out of bounds              reads and writes foreign memory                         OutOfBoundsError
    races between programs     invisible                                               RaceError
    order of the programs      z fastest                                               x fastest, or shuffled

Not modelled: num_stages, warp specialisation, layouts, shared-memory limits, barriers inside a program.
Method: attributes of triton's interpreter classes are replaced; `uninstall()` puts them back.
"""

import inspect
import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import autotuner
from triton.runtime import interpreter as stock

from phimini.bench.offline.interpreter_memory import (
    Access,
    Launch,
    MemoryMonitor,
    OutOfBoundsError,
    RaceError,
    Region,
)
from phimini.bench.offline.interpreter_numerics import (
    LIBDEVICE,
    REPAIRED,
    Builder,
    Handle,
    as_tf32,
    dtype_name,
    libdevice_twin,
    make_handle,
    repaired_reduce,
    to_bits,
    values_of,
)

__all__ = [
    "Launch",
    "OutOfBoundsError",
    "RaceError",
    "Report",
    "install",
    "observe",
    "uninstall",
]

SUPPORTED_TRITON = ("3.6.", "3.7.")


@dataclass(slots=True, kw_only=True)
class Report:
    """The launches and races inside one `observe`."""

    launches: list[Launch] = field(default_factory=list)
    races: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    tf32: bool = True
    config: int | Literal["all"] = 0
    shuffle_seed: int | None = None
    races: Literal["raise", "record"] = "raise"
    report: Report | None = None


_options = _Options()
_monitor: MemoryMonitor | None = None  # of the launch that runs now
_originals: list[tuple[object, str, Any]] = []


@contextmanager
def observe(
    *,
    tf32: bool = True,
    config: int | Literal["all"] = 0,
    shuffle_seed: int | None = None,
    races: Literal["raise", "record"] = "raise",
) -> Iterator[Report]:
    """Run the launches inside with these options and collect what they did.

    tf32: round fp32 inputs of `tl.dot` to tf32 where the kernel does not ask for "ieee", as a GPU does.
    config: which autotune configuration runs; "all" runs each, one after the other.
    shuffle_seed: run the programs of a launch in a random order instead of x fastest.
    races: "record" puts a race into the report instead of raising RaceError.
    """
    global _options
    if not _originals:
        raise RuntimeError("interpreter.observe: call interpreter.install() first")
    outer = _options
    report = Report()
    _options = replace(
        outer, tf32=tf32, config=config, shuffle_seed=shuffle_seed, races=races, report=report
    )
    try:
        yield report
    finally:
        _options = outer


# --- memory ----------------------------------------------------------------------------------------
_stock_load, _stock_store = Builder.create_masked_load, Builder.create_masked_store
_stock_rmw, _stock_cas = Builder.create_atomic_rmw, Builder.create_atomic_cas


def _watch(kind: Access, ptrs: Handle, mask: Handle, value: Handle | None = None) -> None:
    if _monitor is None:
        return
    active = np.broadcast_to(mask.data, ptrs.data.shape)
    addresses = ptrs.data[active]
    region = ptrs.attr.get("region")
    item_bytes = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    _monitor.access(kind, addresses, item_bytes, region)
    if value is not None:
        _monitor.check_lanes(addresses, np.broadcast_to(value.data, active.shape)[active], region)


def _mask_handle(mask: Handle | np.ndarray) -> Handle:
    return Handle(mask, tl.int1) if isinstance(mask, np.ndarray) else mask


def _masked_load(self, ptrs, mask, other, *args, **kwargs) -> Handle:
    mask = _mask_handle(mask)
    _watch("load", ptrs, mask)
    element = ptrs.get_element_ty()
    if other is None and element.is_floating() and not mask.data.all():
        undefined = to_bits(np.full(ptrs.data.shape, np.nan, np.float32), element)
        other = Handle(undefined, element)
    return _stock_load(self, ptrs, mask, other, *args, **kwargs)


def _masked_store(self, ptrs, value, mask, *args, **kwargs):
    mask = _mask_handle(mask)
    _watch("store", ptrs, mask, value)
    return _stock_store(self, ptrs, value, mask, *args, **kwargs)


def _atomic_rmw(self, op, ptr, value, mask, sem, scope) -> Handle:
    _watch("atomic", ptr, mask)
    if dtype_name(value) != "bf16":
        return _stock_rmw(self, op, ptr, value, mask, sem, scope)
    if "FADD" not in str(op):
        raise NotImplementedError(f"atomic {op} on bf16: a GPU has only add")
    ptrs, masks, addends = np.broadcast_arrays(ptr.data, mask.data, values_of(value))
    old = np.zeros(ptrs.shape, np.uint16)
    one = np.ones(1, np.bool_)
    for i in np.argwhere(masks):
        at = tuple(i)
        address = np.array([ptrs[at]], np.uint64)
        bits = stock._interpreter.load(address, one, np.zeros(1, np.uint16), np.dtype(np.uint16))
        total = values_of(Handle(bits, tl.bfloat16)) + addends[at]
        stock._interpreter.store(address, to_bits(total, tl.bfloat16), one)
        old[at] = bits[0]
    return Handle(old, tl.bfloat16)


def _atomic_cas(self, ptr, cmp, value, sem, scope) -> Handle:
    _watch("atomic", ptr, Handle(np.ones(ptr.data.shape, np.bool_), tl.int1))
    return _stock_cas(self, ptr, cmp, value, sem, scope)


def _keeps_region(name: str) -> Callable:
    """Return a builder method whose result keeps the region of the pointer that it is computed from."""
    original = getattr(Builder, name)

    def create(self, *args):
        result = original(self, *args)
        source = next((a for a in args if isinstance(a, Handle)), None)
        if source is not None and "region" in source.attr:
            result.set_attr("region", source.attr["region"])
        return result

    return create


# --- matrix products, libdevice ---------------------------------------------------------------------
def _dot(self, a: Handle, b: Handle, d: Handle, input_precision, max_num_imprecise_acc) -> Handle:
    x, y, accumulator = values_of(a), values_of(b), values_of(d)
    if _monitor is not None:
        batch = x.shape[0] if x.ndim == 3 else 1
        _monitor.launch.dot_flops += 2 * batch * x.shape[-2] * x.shape[-1] * y.shape[-1]
    if a.dtype.scalar.is_int():
        return Handle(np.matmul(x, y, dtype=accumulator.dtype) + accumulator, d.dtype.scalar)
    if x.dtype == np.float64:
        return make_handle(x @ y + accumulator, d.dtype)
    if dtype_name(a) == "fp32" and _options.tf32 and str(input_precision).upper().endswith("TF32"):
        x, y = as_tf32(x), as_tf32(y)
    product = x.astype(np.float32, copy=False) @ y.astype(np.float32, copy=False)
    return make_handle(product + accumulator.astype(np.float32), d.dtype)


def _replace_libdevice(namespace: dict[str, Any]) -> None:
    """Replace libdevice functions in a kernel's globals, whether imported by name or through the module."""
    for key, value in list(namespace.items()):
        if isinstance(value, types.ModuleType) and value.__name__.endswith(".libdevice"):
            for name in LIBDEVICE:
                if getattr(getattr(value, name, None), "__module__", __name__) != __name__:
                    _patch(value, name, libdevice_twin(name))
        elif getattr(value, "__module__", "").endswith(".libdevice"):
            name = getattr(value, "__name__", key)
            if name in LIBDEVICE:
                namespace[key] = libdevice_twin(name)


# --- launch ----------------------------------------------------------------------------------------
_stock_cvt, _stock_device_call = stock._implicit_cvt, stock.InterpretedFunction.__call__
# triton patches the language modules it finds in a function's globals: this one shows it both
_sees_the_language = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})


def _implicit_cvt(arg):
    """Convert a kernel argument as for a GPU: a Python float becomes an fp32 scalar."""
    if type(arg) is float:
        return tl.tensor(Handle(np.array([arg], np.float32), tl.float32), tl.float32)
    if type(arg) is bool:
        return tl.tensor(Handle(np.array([arg], np.bool_), tl.int1), tl.int1)
    return _stock_cvt(arg)


def _tensors(name: str, arg: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(arg, tuple):
        for i, item in enumerate(arg):
            yield from _tensors(f"{name}[{i}]", item)
    elif hasattr(arg, "base") and hasattr(arg, "block_shape"):  # a TensorDescriptor
        yield name, arg.base
    elif hasattr(arg, "data_ptr"):
        yield name, stock._unwrap_tensor(arg)


def _run_grid(self, *args, **kwargs) -> None:
    """Launch one kernel; replaces GridExecutor.__call__."""
    kwargs = {k: v for k, v in kwargs.items() if k in inspect.getfullargspec(self.fn).args}
    for hook in self.pre_run_hooks:
        hook(*args, **kwargs)
    given = inspect.getcallargs(self.fn, *args, **kwargs)
    grid: Any = self.grid(given) if callable(self.grid) else self.grid
    x, y, z = (*(int(g) for g in grid), 1, 1)[:3]
    _replace_libdevice(self.fn.__globals__)
    scope = stock._patch_lang(_sees_the_language)
    # triton 3.6 passes numpy an array of one element, which numpy 2.4 refuses
    scope.set_attr(tl.tensor, "__index__", lambda scalar: scalar.handle.data.item())
    try:
        with _disable_current_modes():  # a mode that counts torch's operations must not see ours
            _run_programs(self.fn, given, self.constexprs, (x, y, z))
    finally:
        scope.restore()


def _run_programs(
    fn: Callable, given: dict[str, Any], constexprs: list[str], grid: tuple[int, int, int]
) -> None:
    global _monitor
    tensors = [pair for name, arg in given.items() for pair in _tensors(name, arg)]
    launch = Launch(kernel=fn.__name__, grid=grid)
    monitor = MemoryMonitor(launch, tensors, _options.races)
    args = {k: v if k in constexprs else _implicit_cvt(v) for k, v in given.items()}
    _mark_regions(args, monitor.regions)
    programs = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    if _options.shuffle_seed is not None:
        random.Random(_options.shuffle_seed).shuffle(programs)
    stock.interpreter_builder.set_grid_dim(*grid)
    outer, _monitor = _monitor, monitor
    try:
        with np.errstate(all="ignore"):
            for program in programs:
                stock.interpreter_builder.set_grid_idx(*program)
                monitor.program = program
                fn(**args)
    except (OutOfBoundsError, RaceError):
        raise
    except Exception as error:
        raise stock.InterpreterError(
            f"{launch.kernel} program {monitor.program}: {error!r}"
        ) from error
    finally:
        _monitor = outer
    monitor.finish()
    if _options.report is not None:
        _options.report.launches.append(launch)
        _options.report.races.extend(sorted(monitor.races))


def _mark_regions(args: dict[str, Any], regions: list[Region]) -> None:
    by_name = {r.name: r for r in regions}
    for name, arg in args.items():
        handle = getattr(arg, "handle", None)
        if isinstance(handle, Handle) and name in by_name:
            handle.set_attr("region", by_name[name])


def _device_call(self, *args, **kwargs):
    """Call a jit function from a kernel; outside a launch as triton does."""
    if _monitor is None:
        return _stock_device_call(self, *args, **kwargs)
    _replace_libdevice(self.fn.__globals__)
    return self.rewrite()(*args, **kwargs)


def _autotuner_run(self, *args, **kwargs):
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.configs
    if self.early_config_prune:
        configs = self.early_config_prune(configs, self.nargs, **kwargs)
    chosen = configs if _options.config == "all" else [configs[_options.config % len(configs)]]
    result = None
    for config in chosen:
        named = {**self.nargs, **kwargs, **config.all_kwargs()}
        self.pre_hook(named, reset_only=True)
        if config.pre_hook is not None:
            config.pre_hook(named)
        result = self.fn.run(*args, **kwargs, **config.all_kwargs())
        self.best_config = config
    return result


# --- install ---------------------------------------------------------------------------------------
def _patch(owner: object, name: str, value: Any) -> None:
    _originals.append((owner, name, getattr(owner, name, None)))
    setattr(owner, name, value)


def install() -> None:
    """Repair triton's interpreter in this process, once.

    Raises RuntimeError where triton was imported without TRITON_INTERPRET=1, which is read when a kernel is
    decorated, or where triton's version is not one whose interpreter this file knows.
    """
    if _originals:
        return
    if not triton.__version__.startswith(SUPPORTED_TRITON):
        raise RuntimeError(
            f"interpreter: expected triton {' or '.join(f'{v}x' for v in SUPPORTED_TRITON)}, got {triton.__version__}"
        )
    if not isinstance(tl.standard.sum, stock.InterpretedFunction):
        raise RuntimeError(
            "interpreter: set TRITON_INTERPRET=1 before triton is imported; it was not set when "
            "triton's own functions were decorated"
        )
    memory = {
        "create_masked_load": _masked_load, "create_masked_store": _masked_store, "create_dot": _dot,
        "create_atomic_rmw": _atomic_rmw, "create_atomic_cas": _atomic_cas,
    }  # fmt: skip
    for name, method in (REPAIRED | memory).items():
        _patch(Builder, name, method)
    for name in ("addptr", "splat", "broadcast", "expand_dims", "reshape", "trans", "bitcast"):
        _patch(Builder, f"create_{name}", _keeps_region(f"create_{name}"))
    _patch(stock.ReduceScanOpInterface, "apply", repaired_reduce)
    _patch(stock, "_implicit_cvt", _implicit_cvt)
    _patch(stock.GridExecutor, "__call__", _run_grid)
    _patch(stock.InterpretedFunction, "__call__", _device_call)
    _patch(autotuner.Autotuner, "run", _autotuner_run)


def uninstall() -> None:
    """Put triton's own interpreter back."""
    while _originals:
        owner, name, value = _originals.pop()
        if value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
