"""Time the Python work around the GPU: reading rows, encoding them, packing examples, judging answers.

A row is units of work per second of the process's CPU time, relative to a fixed loop of plain Python in the same rounds.
Rounds go on until every ratio is known (`paired_ratio.Rounds`). Checks in the same run: every example is packed once and
whole, every verdict is the one that the data came with.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from phimini.bench.gate.options import at_least_one, finish, parser
from phimini.bench.gate.paired_ratio import Rounds
from phimini.bench.gate.rows import Row
from phimini.bench.gate.yardsticks import seconds
from phimini.model.io.json_files import read_rows
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.parallel.training.batch import pack
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.curate import curate
from phimini.stages.data.own_rows import own_rollouts
from phimini.stages.data.packing import best_fit, documents
from phimini.stages.data.row_fields import ROLLOUT_FIELDS
from phimini.stages.data.token_files import TokenSet, shards_of, write_shards
from phimini.stages.distill import distill
from phimini.stages.run.outputs import TOKENIZED
from phimini.stages.verify.verdict import verify

ROUNDS = Rounds(seconds=60.0)
QUICK_ROUNDS = Rounds(at_least=8, seconds=5.0)
CPU = torch.device("cpu")
CAPACITY = 256
"""tokens of a packed row, as in the tiny recipe"""


@dataclass(frozen=True, slots=True)
class Work:
    """Timed work: one call of `run` does `amount` units and returns True if its result is right."""

    unit: str
    amount: int
    run: Callable[[], bool]
    rows: int
    megabytes: float
    """of JSON Lines that the work stands for"""


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where a result is wrong."""
    options = parser("data", __doc__)
    options.add_argument("--rounds", type=at_least_one, help="a fixed number of rounds")
    options.add_argument("--quick", action="store_true", help="few rounds, little data")
    args = options.parse_args(argv)
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    if args.rounds is not None:
        rounds = Rounds(at_least=args.rounds, at_most=args.rounds)
    rows = bench(200 if args.quick else 1000, rounds)
    for row in rows:
        band = row.value and f"{row.value.p50:,.0f} {row.unit} ({row.value.p20:,.0f} to {row.value.p80:,.0f})"  # fmt: skip
        print(f"{row.case['work']:8} {band or 'WRONG'}", flush=True)
    return finish(args.json, rows)


def bench(num_problems: int, rounds: Rounds) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="phimini-bench-") as folder:
        run = override(tiny(), [f"out={folder}", f"distill.num_problems={num_problems}", "distill.num_prompts=24",
                                "distill.num_heldout=24", "distill.num_validation=24"])  # fmt: skip
        distill(run)
        curate(run)
        works = works_of(run)
        right = {name: work.run() for name, work in works.items()}  # also the warm-up
        taken: dict[str, list[float]] = {name: [] for name in works}
        wall: dict[str, list[float]] = {name: [] for name in works}
        python: list[float] = []
        start = time.process_time()
        while not python or not all(
            rounds.enough(of_one, python, time.process_time() - start) for of_one in taken.values()
        ):
            for name, work in works.items():
                began = time.perf_counter()
                taken[name].append(seconds(work.run, CPU))
                wall[name].append(time.perf_counter() - began)
            python.append(seconds(plain_python, CPU))
    return [
        Row(
            bench="data", case={"work": name, "amount": work.amount}, provider="phimini", unit=work.unit,
            samples=[work.amount / s for s in taken[name]] if right[name] else [], correct=right[name],
            reference="python", reference_samples=[1 / s for s in python] if right[name] else [],
            info={
                "step": name, "megabytes": work.megabytes, "rows": work.rows, "cpu_seconds": statistics.median(taken[name]),
                "wall_seconds": statistics.median(wall[name]), "workers": 1,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            },
        )
        for name, work in works.items()
    ]  # fmt: skip


def works_of(run: RunConfig) -> dict[str, Work]:
    out = Path(run.out)
    source, path = out / "distill" / "rollouts.jsonl", out / TOKENIZED["midtrain"]
    rollouts = read_rows(source, ROLLOUT_FIELDS)
    tokenizer: Tokenizer = train_tiny_tokenizer(
        [r["response"] for r in rollouts[:200]], vocab_size=256
    )

    def reading() -> bool:
        return sum(1 for _ in own_rollouts(source, "bench", 9)) == len(rollouts)

    def tokenizing() -> bool:
        shards = shards_of(path, out / "tokens")
        written = list(write_shards(shards, tokenizer, run.chat_template, workers=1))
        return len(written) == len(shards)

    tokenizing()
    examples = TokenSet(out / "tokens", path)
    lengths = examples.lengths

    def packing() -> bool:
        rows = best_fit(lengths, CAPACITY)
        batches = [pack(documents([examples[i] for i in row])) for row in rows]
        once = sorted(i for row in rows for i in row) == list(range(len(examples)))
        fits = all(batch.num_tokens <= CAPACITY for batch in batches)
        return once and fits and sum(b.num_tokens for b in batches) == int(lengths.sum())

    def verifying() -> bool:
        return all(bool(verify(r["response"], r["answer"])) == r["correct"] for r in rollouts)

    megabytes = {file: file.stat().st_size / 1e6 for file in (source, path)}
    return {
        "read": Work("rows/cpu_s", len(rollouts), reading, len(rollouts), megabytes[source]),
        "tokenize": Work("rows/cpu_s", len(examples), tokenizing, len(examples), megabytes[path]),
        "pack": Work("tokens/cpu_s", int(lengths.sum()), packing, len(examples), megabytes[path]),
        "verify": Work("rows/cpu_s", len(rollouts), verifying, len(rollouts), megabytes[source]),
    }


def plain_python() -> None:
    """Do some ten milliseconds of plain Python work, the yardstick."""
    counts: dict[str, int] = {}
    for number in range(40_000):
        key = str(number % 997)
        counts[key] = counts.get(key, 0) + number


if __name__ == "__main__":
    sys.exit(main())
