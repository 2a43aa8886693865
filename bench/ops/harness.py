"""Time several providers of one op in one run, after checking the result of each.

The same code runs on a CPU and on a GPU. One sample is one call (several where a call is too short for the clock).
Providers take turns, a different one first in each round. Each round copies the inputs, because their place in memory
decides up to 30 % of a short op's time, and before every sample a buffer larger than the last cache is written. Rounds
go on until the ratio of ours to eager is known (`paired_ratio.Rounds`). `ms` is wall time on a CPU and device time on
CUDA. Compare `cpu_seconds`, the process's CPU time, on a shared machine. `peak_extra_bytes` is a call's memory beyond
its inputs.

    percent_of_peak = the time the hardware needs at best / the median measured time
    at best         = max(min_bytes / peak bandwidth, min_flops / peak dense 16-bit FLOP/s)
A wrong result is not timed: its row has the error and no times.
"""

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phimini.bench.gate.paired_ratio import Rounds
from phimini.bench.gate.peak_memory import peak_extra_bytes
from phimini.bench.gate.rows import Band
from phimini.parallel.ranks.machine import cpu_name

# dense bf16 FLOP/s, HBM bytes/s, from the data sheets. Other devices get no percentage.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA B200": (2250e12, 8.0e12),
}
# Largest |error| / max|truth| of a timed result; the tests of each op are stricter.
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
    """the definition, called in fp64 (in fp32 for 16-bit inputs)"""
    min_bytes: dict[str, int]
    """by pass ("fwd" without gradients, "bwd", "fwd+bwd"), which also says which passes are timed"""
    min_flops: dict[str, int]
    frozen: tuple[str, ...] = ()
    """floating-point inputs that get no gradient"""
    error_limits: dict[str, float] = field(default_factory=dict)
    """by provider, where its limit is not that of ERROR_LIMITS"""
    target: str = ""
    """the goal for this shape on this device, printed as a target and not as a result"""

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
    """The duration of the measurement of one case and pass."""

    rounds: Rounds = Rounds(seconds=20.0)
    sample_ms: float = 1.0
    """calls are repeated within a sample until it takes this long (CPU only)"""


QUICK = Timing(rounds=Rounds(at_least=8, seconds=1.5))


# --- one call --------------------------------------------------------------------------------------
def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def _leaves(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return copies of the inputs, because an op may work in place."""
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
    """Return the same pseudo-random gradients for every provider, exact in every dtype; 1 for a loss."""

    def gradient(y: Tensor) -> Tensor:
        if y.ndim == 0:
            return torch.ones_like(y)
        numbers = torch.arange(y.numel(), device=y.device).remainder(251).sub(125).to(y.dtype)
        return (numbers / 128).view(y.shape)

    return [gradient(t) for t in outputs if t.requires_grad]


@dataclass(frozen=True, slots=True)
class _Call:
    """One pass of one provider: its preparation, which is not timed, and the timed part."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def _call(
    case: Case, provider: Callable[..., Any], which: str, upstream: list[Tensor] | None
) -> _Call:
    """Return one pass of `provider`. `upstream`: the gradients of the outputs; None for the forward alone."""
    leaves = _leaves(case)
    if upstream is None:
        plain = {name: t.detach() for name, t in leaves.items()}

        def forward(_nothing: None) -> Any:
            with torch.no_grad():
                return provider(**plain)

        return _Call(lambda: None, forward)
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
    """Return, per provider, the largest |error| / max|truth| over all outputs and gradients."""
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
    """Return (milliseconds, CPU seconds) of one call with cold inputs."""
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


def _extra_bytes(call: _Call, device: torch.device) -> int | None:
    state = call.prepare()
    return peak_extra_bytes(lambda: call.run(state), device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def percent_of_peak(case: Case, which: str, ms: float) -> float | None:
    """Return the share of the hardware's best time; None for a device or dtype without an entry in PEAKS."""
    name = device_name(case.device)
    if name not in PEAKS or case.dtype.itemsize != 2:
        return None
    peak_flops, peak_bandwidth = PEAKS[name]
    best_s = max(case.min_bytes[which] / peak_bandwidth, case.min_flops[which] / peak_flops)
    return 100 * best_s / (ms / 1e3)


# --- cases -----------------------------------------------------------------------------------------
def run_case(case: Case, timing: Timing) -> list[Row]:
    """Return one row per provider and pass; its `samples` are (milliseconds, CPU seconds), round by round."""
    errors = relative_errors(case)
    limit = ERROR_LIMITS[case.dtype]
    right = [p for p in case.providers if errors[p] <= case.error_limits.get(p, limit)]
    rows = []
    for which in case.min_bytes:
        calls = _Calls(case, which, right)
        memory = {p: _extra_bytes(call, case.device) for p, call in calls.fresh().items()}
        samples = _alternate(calls, timing)
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
            # JSON has no infinity, which is the error of a result with a NaN
            row["max_relative_error"] = errors[provider] if errors[provider] < torch.inf else None
            row["percent_of_peak"] = None if ms is None else percent_of_peak(case, which, ms)
            row["samples"] = [list(sample) for sample in samples.get(provider, [])]
            rows.append(row)
    return rows


class _Calls:
    """The calls of one case and pass, built again for each round on inputs at other addresses."""

    def __init__(self, case: Case, which: str, providers: list[str]) -> None:
        self.case, self.which, self.providers = case, which, providers
        self._upstream: dict[str, list[Tensor] | None] = dict.fromkeys(providers)
        if which != "fwd":
            for p in providers:
                self._upstream[p] = _upstream(_outputs(case.providers[p](**_leaves(case))))

    def fresh(self) -> dict[str, _Call]:
        ballast = [torch.empty(random.randrange(1, 2**20)) for _ in range(3)]
        shuffled = random.sample(self.providers, len(self.providers))
        calls = {
            p: _call(self.case, self.case.providers[p], self.which, self._upstream[p])
            for p in shuffled
        }
        del ballast  # after the copies, which must not reuse its memory
        return calls


def _repeats(case: Case, which: str, sample_ms: float) -> int:
    """Return the calls per sample: one on CUDA, else from the case's least work on a slow core (5 GB/s, 50 GFLOP/s).

    The number is the same for all providers and in every run, because only the first call finds cold inputs.
    """
    if case.device.type == "cuda":
        return 1
    call_ms = 1e3 * max(case.min_bytes[which] / 5e9, case.min_flops[which] / 50e9)
    return min(50, 1 + int(sample_ms / call_ms))


def _alternate(calls: _Calls, timing: Timing) -> dict[str, list[tuple[float, float]]]:
    device, providers = calls.case.device, calls.providers
    repeats = _repeats(calls.case, calls.which, timing.sample_ms)
    for call in calls.fresh().values():  # the warm-up
        _sample(call, device, 1)
    samples: dict[str, list[tuple[float, float]]] = {p: [] for p in providers}
    clock = 0 if device.type == "cuda" else 1
    order, start = list(providers), _clock(device)
    while order:
        these = calls.fresh()
        for p in order:
            samples[p].append(_sample(these[p], device, repeats))
        order = order[1:] + order[:1]
        ours, reference = ([sample[clock] for sample in samples[p]] for p in _held(providers))
        if timing.rounds.enough(ours, reference, _clock(device) - start):
            break
    return samples


def _clock(device: torch.device) -> float:
    """Return seconds; on a CPU the process's own, so that a busy machine makes as many rounds as an idle one."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def _held(providers: list[str]) -> list[str]:
    """Return the two providers whose ratio ends the rounds: ours and eager, or the first ones of the case."""
    by_rank = sorted(providers, key=lambda p: ("phimini", "eager", p).index(p))
    return (by_rank * 2)[:2]


def _quantiles(samples: list[tuple[float, float]]) -> dict[str, float | None]:
    ms = Band.of([ms for ms, _cpu in samples])
    cpu = statistics.median(cpu for _ms, cpu in samples)
    return {"ms_p20": ms.p20, "ms_p50": ms.p50, "ms_p80": ms.p80, "cpu_seconds": cpu}


def print_rows(case: Case, rows: Iterable[Row]) -> None:
    """Print the rows with GB/s and TFLOP/s, which follow from the case's bytes and FLOPs."""
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
    """Return a line per pass and other provider: ours over it, in CPU seconds (on CUDA device time) and memory."""
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
