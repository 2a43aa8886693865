"""The cost of a training step of the tiny model as the work grows, along one axis at a time.

    sequence_length      one document of 256 to 8,192 tokens
    documents_per_pack   4,096 tokens cut into 1 to 64 documents
    vocabulary           256 to 65,536 words, 1,024 tokens
    batch                1 to 64 rows of 256 tokens in one micro-batch
    data_size            1,000 to 64,000 documents: packing them into rows and drawing the rows of a step

A step is forward, backward and optimizer, as the stages call them. Points take turns, so that a slower clock reaches all
of them. `phimini plan` estimates other GPUs and sizes.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from phimini.bench.gate.options import finish, parser
from phimini.bench.gate.peak_memory import peak_allocated_bytes
from phimini.bench.gate.rows import Row
from phimini.bench.gate.yardsticks import gemm_factors, gemm_flops, python_rate, seconds
from phimini.model.config import ModelConfig, preset, training_flops
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import World, initialize
from phimini.parallel.training.batch import Document, PackedBatch, next_token_targets, pack
from phimini.parallel.training.optimizer import Optimizer, OptimizerConfig, build_optimizer
from phimini.parallel.training.step import forward_backward
from phimini.stages.data.packing import EpochSampler, best_fit
from phimini.stages.run.training import cross_entropy_head

LONGEST = 8192
ROUNDS = 8
QUICK_FLOPS = 15e9
"""--quick leaves out the points whose steps are larger"""
QUICK_DOCUMENTS = 4000
LOSS_LIMIT = 0.1
"""relative distance of a new model's loss from ln(vocabulary)"""


@dataclass(frozen=True, slots=True)
class Point:
    """One step on a micro-batch of documents of these lengths."""

    axis: str
    x: int
    lengths: tuple[int, ...]
    vocabulary: int = 256

    @property
    def config(self) -> ModelConfig:
        tiny = preset("tiny")
        return dataclasses.replace(tiny, vocab_size=self.vocabulary, max_positions=LONGEST)

    def batch(self) -> PackedBatch:
        generator = torch.Generator().manual_seed(0)
        documents = []
        for n in self.lengths:
            tokens = torch.randint(0, self.vocabulary, (n,), generator=generator).tolist()
            targets = next_token_targets(tokens, [True] * n)
            documents.append(Document(tokens=tokens, targets=targets))
        return pack(documents)


POINTS = (
    *(Point("sequence_length", n, (n,)) for n in (256, 512, 1024, 2048, 4096, 8192)),
    *(Point("documents_per_pack", n, (4096 // n,) * n) for n in (1, 4, 16, 64)),
    *(Point("vocabulary", v, (256,) * 4, v) for v in (256, 1024, 4096, 16384, 65536)),
    *(Point("batch", n, (256,) * n) for n in (1, 4, 16, 64)),
)
DATA_SIZES = (1000, 4000, 16000, 64000)


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where a loss is wrong."""
    options = parser("scaling", __doc__)
    options.add_argument("--quick", action="store_true", help="only the points that take a moment")
    args = options.parse_args(argv)
    points = [p for p in POINTS if not args.quick or _flops(p.config, p.batch()) <= QUICK_FLOPS]
    sizes = [n for n in DATA_SIZES if not args.quick or n <= QUICK_DOCUMENTS]
    rows = [*run_ranks(measure_steps, 1, points)[0], *measure_data(sizes)]
    for row in rows:
        print(describe(row), flush=True)
    return finish(args.json, rows)


def _flops(config: ModelConfig, batch: PackedBatch) -> int:
    return training_flops(config, batch.cu_seqlens, int((batch.targets_T >= 0).sum()))


@dataclass(frozen=True, slots=True)
class _Prepared:
    point: Point
    batch: PackedBatch
    step: Callable[[], float]
    """returns the loss"""


def measure_steps(points: Sequence[Point]) -> list[Row]:
    """Time each point's step on one rank, in turns."""
    world = initialize(Layout(), preset("tiny"))
    trainers: dict[ModelConfig, tuple[Model, Optimizer]] = {}
    prepared = [_prepare(point, world, trainers) for point in points]
    factors = gemm_factors(world.device)
    first_losses = [p.step() for p in prepared]  # also the warm-up
    spent: list[list[float]] = [[] for _ in prepared]
    gemms: list[list[float]] = [[] for _ in prepared]
    for number in range(ROUNDS):
        for i in range(len(prepared))[:: 1 if number % 2 else -1]:
            spent[i].append(seconds(prepared[i].step, world.device))
            gemms[i].append(gemm_flops(*factors))
    rows = []
    for i, p in enumerate(prepared):
        expected = math.log(p.point.vocabulary)
        error = abs(first_losses[i] / expected - 1)
        peak = peak_allocated_bytes(p.step, world.device)
        tokens, flops = p.batch.num_tokens, _flops(p.point.config, p.batch)
        right = error <= LOSS_LIMIT
        rows.append(
            Row(
                bench="scaling",
                case={"axis": p.point.axis, "x": p.point.x},
                provider="phimini",
                unit="tokens/cpu_s" if world.device.type == "cpu" else "tokens/s",
                samples=[tokens / s for s in spent[i]] if right else [],
                correct=right,
                reference="gemm",
                reference_samples=[g * tokens / flops for g in gemms[i]] if right else [],
                peak_bytes=peak,
                error=error,
                info={"tokens": tokens, "flops": flops},
            )
        )
    world.close()
    return rows


def _prepare(
    point: Point, world: World, trainers: dict[ModelConfig, tuple[Model, Optimizer]]
) -> _Prepared:
    if point.config not in trainers:
        model = build_model(point.config, world, seed=0)
        # The rate is so small that every step of a point is the same work with the same loss.
        trainers[point.config] = model, build_optimizer(model, OptimizerConfig(lr=1e-9, total_steps=10**6))  # fmt: skip
    model, optimizer = trainers[point.config]
    batch = point.batch()

    def step() -> float:
        optimizer.zero_grad()
        metrics = forward_backward(model, [batch], cross_entropy_head)
        optimizer.step()
        return metrics.loss

    return _Prepared(point, batch, step)


def measure_data(sizes: Sequence[int]) -> list[Row]:
    """Time packing `n` documents into rows of 256 tokens, and drawing the rows of a step."""
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    lengths = torch.randint(20, 200, (max(sizes),), generator=generator).tolist()
    packing: dict[int, list[float]] = {n: [] for n in sizes}
    yard: dict[int, list[float]] = {n: [] for n in sizes}
    right = {}
    for _ in range(ROUNDS):
        for n in sizes:
            rows: list[list[int]] = []
            packing[n].append(seconds(lambda n=n, rows=rows: rows.extend(best_fit(lengths[:n], 256)), cpu))  # fmt: skip
            yard[n].append(python_rate())
            right[n] = sorted(i for row in rows for i in row) == list(range(n)) and all(
                sum(lengths[i] for i in row) <= 256 for row in rows
            )
    draw = {n: _draw_seconds(n) for n in sizes}
    return [
        Row(
            bench="scaling",
            case={"axis": "data_size", "x": n},
            provider="phimini",
            unit="rows/cpu_s",
            samples=[n / s for s in packing[n]] if right[n] else [],
            correct=right[n],
            reference="python",
            reference_samples=yard[n] if right[n] else [],
            info={"draw_ms": 1e3 * draw[n]},
        )
        for n in sizes
    ]


def _draw_seconds(num_rows: int) -> float:
    sampler = EpochSampler(num_rows, 4, 0)
    times = [seconds(lambda step=step: sampler.batch(step), torch.device("cpu")) for step in range(1, 12)]  # fmt: skip
    return statistics.median(times)


def describe(row: Row) -> str:
    name = f"{row.case['axis']:<19}{row.case['x']:>7,}"
    if row.value is None or row.ratio is None:
        return f"{name}  WRONG, not timed: error {row.error}"
    text = (
        f"{name}  {row.value.p50:>10,.0f} {row.unit} ({row.value.p20:,.0f} to {row.value.p80:,.0f})"
    )
    if row.reference == "gemm":
        return f"{text}  {100 * row.ratio.p50:.0f} % of a matrix product  peak {(row.peak_bytes or 0) / 2**20:.1f} MiB"
    return f"{text}  a step's draw {row.info['draw_ms']:.2f} ms"


if __name__ == "__main__":
    sys.exit(main())
