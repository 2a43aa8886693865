"""Seconds and bytes of a weight sync into the real vLLM, by phase, over every layout and transport of this machine.

A row is the median of N syncs after a first one. The trainer's peak extra memory is counted allocation by allocation in
a separate sync, because counting costs time. On a CPU seconds are wall time: use an idle machine, or read the shares,
which are medians of each sync's own share. Status 1 where a trainer's rank needs more than two buckets.

"checksums" is the time that a sync waits for the checksums of the sent and the arrived tensors; the target is 5 % of it.
On two idle cores of an Intel Xeon (29 November 2026, 15 syncs) the tiny model keeps the target everywhere (3.1 to
4.2 %), the mid one does not (5.3 to 13.7 %). Syncs with checksums in turns with syncs without (31 each, inproc, one
rank) differ by 5 to 7 % with the tiny model and by 12 to 14 % with the mid one. A plain sum of each tensor would already
cost 8 % there: it reads 112 MiB from memory at 14 GB/s while the sync is bound by memory too. No GPU was measured.
"""

import dataclasses
import os
import statistics
import sys
import time
from concurrent.futures import Future
from typing import Any

import torch

from phimini.bench.gate import rows as bench_rows
from phimini.bench.gate.options import at_least_one, finish, parser
from phimini.bench.gate.peak_memory import AllocationMeter
from phimini.model.config import ModelConfig, preset
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import initialize
from phimini.parallel.weight_sync.cpu_transports import InprocTransport
from phimini.parallel.weight_sync.deadline import completed
from phimini.parallel.weight_sync.sync import SyncReport, WeightSync
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.rollout.colocated_vllm import ColocatedVllm
from phimini.stages.rollout.launch import KEY, EngineProcess, own_key
from phimini.stages.rollout.separate_vllm import SeparateVllm
from phimini.stages.rollout.vllm_settings import (
    EngineSettings,
    bucket_bytes,
    engine_settings,
    require_vllm,
)

LAYOUTS = {"tp1": Layout(), "tp2": Layout(tensor=2), "pp2": Layout(pipeline=2)}
TRANSPORTS = ("inproc", "shm", "gloo")
PHASES = ("gather_s", "pack_s", "transfer_s", "load_s", "verify_s", "checksum_s", "total_s")
FIELDS = (
    "transport", "layout", "parameters", "bytes", "gather_s", "pack_s", "transfer_s", "load_s", "verify_s", "total_s",
    "peak_extra_bytes",
)  # fmt: skip
"""of a plain row"""
SHARES = ("checksum_share", "verify_share")
"""medians of a sync's shares of its seconds"""
Row = dict[str, Any]

# 30 million parameters: large enough that bytes count, small enough for a CPU.
MID = dataclasses.replace(
    preset("tiny"), num_layers=8, model_dim=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1536,
    vocab_size=8192, short_factor=(1.0,) * 24, long_factor=tuple(1 + i / 8 for i in range(24)),
)  # fmt: skip
MODELS = {"tiny": preset("tiny"), "mid": MID, "phi-4-mini": preset("phi-4-mini")}
BUCKETS_MIB = {"tiny": 1, "mid": 64, "phi-4-mini": 3072}
"""several buckets per model, each large enough for its largest tensor"""
TARGETS = (
    "Targets, not yet measured: Phi-4-mini in bfloat16 (7.7 GB) on 8 H100: colocated at most 0.3 s, "
    "disaggregated over NCCL at most 0.15 s, checksums at most 5 % of a sync."
)


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where a rank needs more than two buckets."""
    options = parser("weight-sync", __doc__)
    options.add_argument("--model", choices=MODELS, action="append", help="default: tiny and mid")
    options.add_argument("--repeats", type=at_least_one, default=9)
    options.add_argument("--quick", action="store_true", help="the tiny model from one rank")
    args = options.parse_args(argv)
    require_vllm()
    models = ["tiny"] if args.quick else args.model or ["tiny", "mid"]
    layouts = ["tp1"] if args.quick else list(LAYOUTS)
    rows = [row for name in models for row in bench(name, layouts, args.repeats)]
    for row in rows:
        print(line(row))
    print(TARGETS)
    finish(args.json, [to_row(row) for row in rows], [plain(row) for row in rows])
    return 1 if any(row["peak_extra_bytes"] > 2 * row["bucket_bytes"] for row in rows) else 0


def to_row(row: Row) -> bench_rows.Row:
    """Return the row for `bench compare`: the whole sync, relative to a plain copy of as many bytes. A wrong sync raises."""
    return bench_rows.Row(
        bench="weight-sync", case={k: row[k] for k in ("model", "transport", "layout", "bytes")}, provider="phimini",
        unit="ms", samples=row["total_ms"], reference="copy", reference_samples=row["copy_ms"],
        peak_bytes=row["peak_extra_bytes"], info={k: row[k] for k in ("parameters", "bucket_bytes", *SHARES, *PHASES)},
    )  # fmt: skip


def plain(row: Row) -> Row:
    return {name: row[name] for name in FIELDS}


def bench(name: str, layouts: list[str], repeats: int) -> list[Row]:
    config, rows = MODELS[name], []
    for transport in TRANSPORTS:
        bucket = f"rollout.bucket_mib={BUCKETS_MIB[name]}"
        run = override(tiny(), ["rollout.engine=vllm", "rollout.max_batch=8", bucket])
        settings = engine_settings(run, config, transport)
        server = None
        if transport != "inproc":
            os.environ[KEY] = own_key()
            server = EngineProcess(config, settings, os.environ[KEY])
            server.wait()
            run = override(run, [f"rollout.addresses={server.url}"])
        for layout in layouts:
            size = LAYOUTS[layout].model_size
            ranks = run_ranks(measure, size, run, config, settings, LAYOUTS[layout], repeats)
            case = {"model": name, "transport": transport, "layout": layout}
            rows.append(case | slowest(ranks) | {"bucket_bytes": BUCKETS_MIB[name] << 20})
        if server is not None:
            server.close()
    return rows


def measure(
    run: RunConfig, config: ModelConfig, settings: EngineSettings, layout: Layout, repeats: int
) -> Row:
    """Return one rank's medians over its syncs, and the peak memory of one more."""
    model = build_model(config, initialize(layout, config), seed=0)
    engine: ColocatedVllm | SeparateVllm
    if settings.transport == "inproc":
        size = bucket_bytes(run, config, settings)
        engine = ColocatedVllm(
            config, settings, model.world, run.rollout.deadline_s, bucket_bytes=size
        )
    else:
        engine = SeparateVllm(run, config, settings, model.world)
    reports: list[SyncReport] = []
    copies: list[float] = []
    for _ in range(1 + repeats):
        engine.sync(model)
        assert engine.last_sync is not None
        reports.append(engine.last_sync)
        copies.append(copy_ms(engine.last_sync.bytes, model.world.device))
    with AllocationMeter() as meter:
        if settings.transport == "inproc":
            sync_without_engine(
                model, size
            )  # the engine's allocations in this process do not count
        else:
            engine.sync(model)
    if isinstance(engine, SeparateVllm):
        engine.close()
    last = reports[-1]
    medians = {phase: statistics.median(getattr(r, phase) for r in reports[1:]) for phase in PHASES}
    shares = {
        f"{key}_share": statistics.median(getattr(r, f"{key}_s") / r.total_s for r in reports[1:])
        for key in ("checksum", "verify")
    }
    counts = {"parameters": last.parameters, "bytes": last.bytes, "copy_ms": copies[1:]}
    counts["total_ms"] = [1e3 * r.total_s for r in reports[1:]]
    return counts | medians | shares | {"peak_extra_bytes": meter.peak_bytes + own_bucket(engine)}


class NullReceiver:
    """A receiver that accepts every tensor and drops it."""

    name = "null"

    def __init__(self) -> None:
        self.checksums: dict[str, int] = {}

    def call(self, phase: str, info: dict[str, Any]) -> "Future[list[dict[str, Any]]]":
        entries = info["entries"] if phase == "update" else []
        self.checksums |= {entry["name"]: entry["checksum"] for entry in entries}
        seconds = dict.fromkeys(("load_s", "verify_s", "checksum_s"), 0.0)
        answer = {"where": self.name, "checksums": self.checksums} | seconds
        return completed(lambda: [answer])


def sync_without_engine(model: Model, size: int) -> None:
    """Run the trainer's part of an inproc sync."""
    transport = InprocTransport()
    sync = WeightSync(model.config, transport, [NullReceiver()], bucket_bytes=size, deadline_s=60.0)
    sync.sync(to_hf(model), 1)


def copy_ms(num_bytes: int, device: torch.device) -> float:
    """Return the wall time of a plain copy, the machine's yardstick."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    source.clone()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def own_bucket(engine: ColocatedVllm | SeparateVllm) -> int:
    """Return the bytes of a transport's bucket that was allocated before the counted sync."""
    sync = engine._sync
    buffer = None if sync is None else sync.transport.buffer()
    return 0 if buffer is None else buffer.numel()


def slowest(ranks: list[Row]) -> Row:
    """Return the row of the slowest rank, with the largest rank's memory."""
    row = max(ranks, key=lambda rank: rank["total_s"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = max(rank["peak_extra_bytes"] for rank in ranks)
    return row | {"peak_extra_bytes": peak, "device": device, "torch": torch.__version__}


def line(row: Row) -> str:
    phases = "  ".join(f"{p[:-2]} {1e3 * row[p]:.1f}" for p in PHASES)
    checksums, verify = (100 * row[f"{key}_share"] for key in ("checksum", "verify"))
    return (
        f"{row['model']:<6}{row['transport']:<7}{row['layout']:<4}{row['bytes'] / 1e6:>8.1f} MB   ms: {phases}   "
        f"checksums {checksums:.1f} %, verify {verify:.1f} %   peak extra {row['peak_extra_bytes'] / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
