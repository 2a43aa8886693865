"""Time several providers of one op in one run, after checking that each gives the right result.

The same code on a CPU and on a GPU. One sample is one call (several where a call is too short for the clock);
the providers take turns, a different one first in each round, and before every sample a buffer larger than the
last cache is written, so that inputs come from memory. `ms` is wall time on a CPU and device time on CUDA;
`cpu_seconds` is the process's CPU time, the number to compare on a shared machine. `peak_extra_bytes` is what
a call needs beyond its inputs: the allocator's peak on CUDA, the growth of the resident set on a CPU.

    percent_of_peak = the time the hardware needs at best / the median measured time
    at best         = max(min_bytes / peak bandwidth, min_flops / peak dense 16-bit FLOP/s)

A result that is wrong is not timed: its row has the error and no times.
"""

import ctypes
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# dense bf16 FLOP/s, HBM bytes/s, from the data sheets. A device that is not listed gets no percentage.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA B200": (2250e12, 8.0e12),
}
# Largest |error| / max|truth| of a result that may be timed; the tests of each op are stricter.
ERROR_LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PASSES = ("fwd", "bwd", "fwd+bwd")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one shape. Providers and reference are called with the inputs by name."""

    op: str
    shape: dict[str, int]
    inputs: dict[str, Tensor]
    providers: dict[str, Callable[..., Any]]
    """name -> function of the inputs that returns a tensor or a tuple of tensors"""
    reference: Callable[..., Any]
    """the definition: called with fp64 (for 16-bit inputs fp32) inputs"""
    min_bytes: dict[str, int]
    """by pass ("fwd" without gradients, "bwd", "fwd+bwd"), which also says which passes are timed"""
    min_flops: dict[str, int]
    frozen: tuple[str, ...] = ()
    """floating-point inputs that get no gradient"""
    error_limits: dict[str, float] = field(default_factory=dict)
    """by provider, where it may be further off than ERROR_LIMITS says"""
    target: str = ""
    """what this shape is meant to reach on this device: printed as a target, never as a result"""

    def __post_init__(self) -> None:
        unknown = [p for p in self.min_bytes if p not in PASSES]
        if unknown or self.min_bytes.keys() != self.min_flops.keys():
            raise ValueError(
                f"Case {self.op}: min_bytes and min_flops: expected the same passes among {PASSES}, "
                f"got {list(self.min_bytes)} and {list(self.min_flops)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.inputs.values() if t.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Rounds of samples: at least `min_rounds`, then until `seconds` of wall time per case and pass are used."""

    min_rounds: int = 5
    max_rounds: int = 50
    seconds: float = 5.0
    sample_ms: float = 1.0
    """calls are repeated within a sample until it takes this long (CPU only)"""


QUICK = Timing(min_rounds=5, max_rounds=5, seconds=0.0)


# --- one call --------------------------------------------------------------------------------------
def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def _leaves(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of the inputs, so that an op in place changes nothing that another provider sees."""
    leaves = {}
    for name, t in case.inputs.items():
        t = t.detach().clone()
        if t.is_floating_point():
            t = t if dtype is None else t.to(dtype)
            t.requires_grad_(name not in case.frozen)
        leaves[name] = t
    return leaves


def _backward(
    outputs: list[Tensor], leaves: dict[str, Tensor], upstream: list[Tensor] | None = None
) -> list[Tensor]:
    outputs = [t for t in outputs if t.requires_grad]
    wanted = [t for t in leaves.values() if t.requires_grad]
    return list(torch.autograd.grad(outputs, wanted, upstream or _upstream(outputs)))


def _upstream(outputs: list[Tensor]) -> list[Tensor]:
    """The same pseudo-random gradients for every provider, exact in every dtype; 1 for a loss."""

    def gradient(y: Tensor) -> Tensor:
        if y.ndim == 0:
            return torch.ones_like(y)
        numbers = torch.arange(y.numel(), device=y.device).remainder(251).sub(125).to(y.dtype)
        return (numbers / 128).view(y.shape)

    return [gradient(t) for t in outputs if t.requires_grad]


@dataclass(frozen=True, slots=True)
class _Call:
    """One pass of one provider: what is done before the clock starts, and what is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def _call(case: Case, provider: Callable[..., Any], which: str) -> _Call:
    leaves = _leaves(case)
    if which == "fwd":
        plain = {name: t.detach() for name, t in leaves.items()}

        def forward(_nothing: None) -> Any:
            with torch.no_grad():
                return provider(**plain)

        return _Call(lambda: None, forward)
    upstream = _upstream(_outputs(provider(**leaves)))
    if which == "fwd+bwd":
        return _Call(
            lambda: None, lambda _: _backward(_outputs(provider(**leaves)), leaves, upstream)
        )
    # a new graph for every backward: a compiled one may use its buffers once only
    return _Call(
        lambda: _outputs(provider(**leaves)),
        lambda outputs: _backward(outputs, leaves, upstream),
    )


def relative_errors(case: Case) -> dict[str, float]:
    """Per provider: the largest |error| / max|truth| over all outputs and gradients."""
    with_grads = set(case.min_bytes) != {"fwd"}

    def results(fn: Callable[..., Any], dtype: torch.dtype | None) -> list[Tensor]:
        leaves = _leaves(case, dtype)
        outputs = _outputs(fn(**leaves))
        grads = _backward(outputs, leaves) if with_grads else []
        return [t.detach() for t in (*outputs, *grads)]

    truth_dtype = torch.float64 if case.dtype == torch.float32 else torch.float32
    truth = results(case.reference, truth_dtype)
    errors = {}
    for name, provider in case.providers.items():
        got = results(provider, None)
        assert len(got) == len(truth), (
            f"{case.op}, {name}: {len(got)} results, reference {len(truth)}"
        )
        errors[name] = max(_relative_error(g, t) for g, t in zip(got, truth, strict=True))
    return errors


def _relative_error(got: Tensor, truth: Tensor) -> float:
    if truth.numel() == 0:
        return 0.0
    largest = truth.abs().max().item()
    error = (got.to(truth.dtype) - truth).abs().nan_to_num(nan=torch.inf).max().item()
    return error / largest if largest > 0 else error


# --- clocks and memory -----------------------------------------------------------------------------
@functools.cache
def _cache_filler(device: torch.device) -> Tensor:
    size = 64 * 2**20 if device.type == "cpu" else 256 * 2**20  # beyond any last-level cache
    return torch.ones(size // 4, dtype=torch.int32, device=device)


def _sample(call: _Call, device: torch.device, repeats: int) -> tuple[float, float]:
    """(milliseconds, CPU seconds) of one call, inputs cold."""
    prepared = [call.prepare() for _ in range(repeats)]
    _cache_filler(device).add_(1)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        for state in prepared:
            call.run(state)
        end.record()
        cpu = time.process_time() - cpu
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeats, cpu / repeats
    wall, cpu = time.perf_counter(), time.process_time()
    for state in prepared:
        call.run(state)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return 1e3 * wall / repeats, cpu / repeats


def _peak_extra_bytes(call: _Call, device: torch.device) -> int | None:
    """What one call holds at its peak beyond what was there before it; None where the system cannot say."""
    state = call.prepare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.run(state)
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps would hide the next growth
    reset.write_text("5")  # the peak of the resident set starts anew (Linux, man 5 proc)
    before = _resident_bytes("VmRSS")
    call.run(state)
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def percent_of_peak(case: Case, which: str, ms: float) -> float | None:
    """None for a device without an entry in PEAKS, and for dtypes whose peak is not there."""
    name = device_name(case.device)
    if name not in PEAKS or case.dtype.itemsize != 2:
        return None
    peak_flops, peak_bandwidth = PEAKS[name]
    best_s = max(case.min_bytes[which] / peak_bandwidth, case.min_flops[which] / peak_flops)
    return 100 * best_s / (ms / 1e3)


# --- cases -----------------------------------------------------------------------------------------
def run_case(case: Case, timing: Timing) -> list[Row]:
    """One row per provider and pass; its `samples` are (milliseconds, CPU seconds), round by round."""
    errors = relative_errors(case)
    limit = ERROR_LIMITS[case.dtype]
    right = [p for p in case.providers if errors[p] <= case.error_limits.get(p, limit)]
    rows = []
    for which in case.min_bytes:
        calls = {p: _call(case, case.providers[p], which) for p in right}
        memory = {p: _peak_extra_bytes(call, case.device) for p, call in calls.items()}
        samples = _alternate(calls, case.device, timing)
        for provider in case.providers:
            row: Row = {
                "op": case.op,
                "provider": provider,
                "pass": which,
                "shape": case.shape,
                "dtype": str(case.dtype).removeprefix("torch."),
                "device": device_name(case.device),
            }
            times = {"ms_p20": None, "ms_p50": None, "ms_p80": None, "cpu_seconds": None}
            if provider in right:
                times = _quantiles(samples[provider])
            ms = times["ms_p50"]
            row |= times
            row["peak_extra_bytes"] = memory.get(provider)
            # JSON has no infinity; a result with a NaN has no finite error
            row["max_relative_error"] = errors[provider] if errors[provider] < torch.inf else None
            row["percent_of_peak"] = None if ms is None else percent_of_peak(case, which, ms)
            row["samples"] = [list(sample) for sample in samples.get(provider, [])]
            rows.append(row)
    return rows


def _alternate(
    calls: dict[str, _Call], device: torch.device, timing: Timing
) -> dict[str, list[tuple[float, float]]]:
    repeats = {}
    for provider, call in calls.items():  # also the warm-up
        ms, _cpu = _sample(call, device, 1)
        repeats[provider] = (
            1 if device.type == "cuda" else 1 + int(timing.sample_ms / max(ms, 1e-3))
        )
    samples: dict[str, list[tuple[float, float]]] = {p: [] for p in calls}
    order, start = list(calls), time.perf_counter()
    for round_number in range(timing.max_rounds):
        if round_number >= timing.min_rounds and time.perf_counter() - start > timing.seconds:
            break
        for provider in order:
            samples[provider].append(_sample(calls[provider], device, repeats[provider]))
        order = order[1:] + order[:1]
    return samples


def _quantiles(samples: list[tuple[float, float]]) -> dict[str, float | None]:
    ms = sorted(ms for ms, _cpu in samples)
    fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else [ms[0]] * 4
    return {
        "ms_p20": fifths[0],
        "ms_p50": statistics.median(ms),
        "ms_p80": fifths[3],
        "cpu_seconds": statistics.median(cpu for _ms, cpu in samples),
    }


def print_rows(case: Case, rows: Iterable[Row]) -> None:
    """The table: also GB/s and TFLOP/s, which follow from the case's bytes and FLOPs."""
    shape = " ".join(f"{k}={v}" for k, v in case.shape.items())
    rows = list(rows)
    for row in rows:
        head = f"{row['op']:22} {shape:24} {row['dtype']:9} {row['pass']:8} {row['provider']:14}"
        ms, memory = row["ms_p50"], row["peak_extra_bytes"]
        if ms is None:
            print(
                f"{head} WRONG, not timed: relative error {row['max_relative_error']}", flush=True
            )
            continue
        gb_s = case.min_bytes[row["pass"]] / ms / 1e6
        tflop_s = case.min_flops[row["pass"]] / ms / 1e9
        percent = (
            "" if row["percent_of_peak"] is None else f" {row['percent_of_peak']:5.1f} % of peak"
        )
        print(
            f"{head} {ms:9.3f} ms ({row['ms_p20']:.3f} to {row['ms_p80']:.3f}) {row['cpu_seconds']:8.4f} cpu-s "
            f"{gb_s:7.1f} GB/s {tflop_s:7.3f} TFLOP/s "
            f"{'?' if memory is None else f'{memory / 2**20:.1f}':>7} MiB  error {row['max_relative_error']:.0e}{percent}",
            flush=True,
        )
    for text in _ratios(rows, "cuda" if case.device.type == "cuda" else "cpu"):
        print(f"{case.op:22} {text}", flush=True)
    if case.target:
        print(f"{case.op:22} target, not a result: {case.target}", flush=True)


def _ratios(rows: list[Row], device: str) -> list[str]:
    """Ours over each other provider, per pass: CPU seconds (on CUDA device time), and extra memory."""
    clock = "ms_p50" if device == "cuda" else "cpu_seconds"
    timed = {(row["pass"], row["provider"]): row for row in rows if row["ms_p50"] is not None}
    texts = []
    for (which, provider), row in timed.items():
        ours = timed.get((which, "phimini"))
        if ours is None or provider == "phimini":
            continue
        memory = ours["peak_extra_bytes"], row["peak_extra_bytes"]
        share = f"{memory[0] / memory[1]:.3f}" if all(memory) else "?"
        time_share = ours[clock] / row[clock] if row[clock] else float("inf")
        texts.append(f"{which:8} phimini / {provider}: {clock} {time_share:.3f}, memory {share}")
    return texts
