"""The step of `phimini bench step` run and timed: on a GPU, or with a small model on a CPU to try the command out.

A row's `micro_batch_ms` is the median over steps of MICRO_BATCHES micro-batches each: forward, backward, and the gradients'
scaling. The steps follow each other without a wait, as in training. `step_ms` adds the micro-batch's share of an
optimizer's update in the paper's recipe, 1 of UPDATE_SHARE, where the state fits into the memory that is left; else
`optimizer_ms` is None and `step_ms` is without it. Model FLOPs are counted as in `model/config.py`. MFU is relative to
the device's dense bf16 peak, whatever the precision, and None for a device without a known peak. Weights are random.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from phimini.bench.gate.peak_memory import peak_allocated_bytes
from phimini.bench.ops.harness import PEAKS, device_name
from phimini.bench.system.step_work import batch_of, head_of, planned_peak_bytes
from phimini.model.config import preset, training_flops
from phimini.parallel.attention.core import attention_name
from phimini.parallel.megatron.builder import Model, Recompute, build_model
from phimini.parallel.megatron.fp8 import Fp8Mode, choose
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.optimizer import OptimizerConfig, build_optimizer
from phimini.parallel.training.step import start_step

MICRO_BATCHES = 2
UPDATE_SHARE = 16
"""micro-batches of an update: 128 rows on 8 GPUs"""
UPDATES = 3
STATE_BYTES = 12
"""of a parameter in the optimizer: fp32 master and two moments"""
SHARES = 12
"""kernels that a row names with their share of the time"""
Row = dict[str, Any]


class TimedStep:
    """A model with random weights on this device, whose steps are timed stage by stage."""

    def __init__(self, name: str, recompute: Recompute, fp8: Fp8Mode) -> None:
        self.name = name
        self.recompute: Recompute = recompute
        self.config = preset(name)  # pyright: ignore[reportArgumentType]
        self.world = initialize(Layout(), self.config)
        self.device = self.world.device
        self.fp8 = choose(fp8, "auto", self.device)
        self.model = build_model(
            self.config, self.world, seed=None, recompute=recompute, fp8=self.fp8
        )
        draw_weights(self.model)

    def row(self, stage: str, lengths: list[int], rounds: int, trace: Path | None) -> Row:
        """Return the measurements of one stage. Raises NonFiniteError where a loss is not finite."""
        batch, head = batch_of(stage, lengths, self.config.vocab_size), head_of(stage)

        def step(micro_batches: int = MICRO_BATCHES) -> None:
            nonlocal running
            running = start_step(self.model, [batch] * micro_batches, head)

        running: Any = None
        self.model.zero_grad()
        step()  # compiles
        loss = running.metrics().loss
        self.model.zero_grad()
        step_s = seconds_of(self.device, step, rounds)
        micro_batch_ms = 1e3 * statistics.median(step_s) / MICRO_BATCHES
        running.metrics()
        peak = peak_allocated_bytes(lambda: step(1), self.device)
        shares = self.shares(lambda: step(1), trace and trace / f"{stage}.json.gz")
        running = None
        optimizer_ms = self.optimizer_ms
        step_ms = micro_batch_ms + (optimizer_ms or 0.0) / UPDATE_SHARE
        flops = training_flops(self.config, torch.tensor([0, *lengths]).cumsum(0))
        rate = flops / (step_ms / 1e3)
        device = device_name(self.device)
        peak_flops = PEAKS.get(device, (None,))[0]
        return {
            "stage": stage, "model": self.name, "lengths": lengths, "layout": "tensor=1", "recompute": self.recompute,
            "dtype": str(next(p for _, p in self.model.named_parameters()).dtype).removeprefix("torch."),
            "fp8": None if self.fp8 is None else self.fp8.recipe, "attention": attention_name(self.device),
            "device": device, "step_ms": round(step_ms, 3), "micro_batch_ms": round(micro_batch_ms, 3),
            "samples_ms": [round(1e3 * s / MICRO_BATCHES, 3) for s in step_s],
            "optimizer_ms": None if optimizer_ms is None else round(optimizer_ms, 3),
            "tokens_per_second": round(sum(lengths) / (step_ms / 1e3), 1), "model_tflops": round(rate / 1e12, 3),
            "mfu": None if peak_flops is None else round(rate / peak_flops, 4), "peak_bytes": peak,
            "planned_peak_bytes": planned_peak_bytes(
                self.config, stage, sum(lengths), self.recompute, "none" if self.fp8 is None else self.fp8.recipe
            ),
            "share": shares, "loss": loss,
        }  # fmt: skip

    @functools.cached_property
    def optimizer_ms(self) -> float | None:
        """The median time of an update, or None where its state does not fit into the GPU beside the rest."""
        cuda = self.device.type == "cuda"
        needed = STATE_BYTES * sum(p.numel() for _, p in self.model.named_parameters())
        if cuda:
            torch.cuda.empty_cache()
            if torch.cuda.mem_get_info(self.device)[0] < 1.2 * needed:
                return None
        optimizer = build_optimizer(self.model, OptimizerConfig(lr=1e-6, total_steps=100))
        optimizer.step()
        spent = seconds_of(self.device, optimizer.step, UPDATES)
        del optimizer
        gc.collect()  # its state, before the next stage needs the memory
        if cuda:
            torch.cuda.empty_cache()
        return 1e3 * statistics.median(spent)

    def shares(self, run: Callable[[], None], trace: Path | None) -> dict[str, float]:
        """Return the share of the largest kernels, by name, in the time of all; write the profiler's trace."""
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as profiled:
            run()
            if cuda:
                torch.cuda.synchronize()
        if trace is not None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(trace))
        # On a GPU only the kernels themselves: the host's events have the time of the kernels that they launch.
        kind = DeviceType.CUDA if cuda else DeviceType.CPU
        times = {
            event.key: float(event.self_device_time_total if cuda else event.self_cpu_time_total)
            for event in profiled.key_averages()
            if event.device_type == kind
        }
        total = sum(times.values()) or 1.0
        largest = sorted(times.items(), key=lambda item: -item[1])[:SHARES]
        shares = {name[:80]: round(spent / total, 4) for name, spent in largest}
        return shares | {"others": round(1 - sum(shares.values()), 4)}


@torch.no_grad()
def draw_weights(model: Model) -> None:
    """Fill matrices with small random numbers and norms with ones, on their device: a CPU would take a minute."""
    for _, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)


def seconds_of(device: torch.device, run: Callable[[], object], rounds: int) -> list[float]:
    """Return the seconds of each of `rounds` calls that follow each other: a GPU's time, or a CPU's wall time."""
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(rounds):
            run()
            moments.append(time.perf_counter())
        return [b - a for a, b in zip(moments[:-1], moments[1:], strict=True)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events[:-1], events[1:], strict=True)]


def describe(row: Row) -> str:
    mfu = "no known peak" if row["mfu"] is None else f"MFU {row['mfu']:.1%} of dense bf16"
    update = "without the optimizer" if row["optimizer_ms"] is None else f"a {UPDATE_SHARE}th of an update of {row['optimizer_ms']:.1f} ms"  # fmt: skip
    return (
        f"{row['stage']:<12} {row['step_ms']:.1f} ms ({update}), {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['model_tflops']:.1f} model TFLOP/s, {mfu}, with {row['attention']}; {row['dtype']}, fp8 {row['fp8'] or 'none'}, "
        f"recompute {row['recompute']}; peak {row['peak_bytes'] / 2**30:.2f} GiB (planned {row['planned_peak_bytes'] / 2**30:.2f}) "
        f"on {row['device']}"
    )
