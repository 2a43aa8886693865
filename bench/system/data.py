"""`phimini bench data [--rounds N] [--quick] [--json PATH]`.

What a stage does before its first GPU second, and stage 4 after each answer: reading examples, packing them, judging
answers. Units of work per second of the process's CPU time. All of it is Python, so each is held to a fixed loop of
plain Python measured in the same rounds, which go on until every ratio is known (`paired.Rounds`). Checked in the same
run: every example is packed once and whole, every verdict is the one that the data came with.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from phimini.bench.gate.paired_ratio import Rounds
from phimini.bench.gate.rows import Row, measured, write
from phimini.bench.gate.yardsticks import seconds
from phimini.model.io.json_files import read_rows
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.parallel.training.batch import pack
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.curate import curate
from phimini.stages.data.packing import best_fit, documents
from phimini.stages.data.row_fields import ROLLOUT_FIELDS
from phimini.stages.distill import distill
from phimini.stages.run.training import read_examples
from phimini.stages.verify.verdict import verify

ROUNDS = Rounds(seconds=60.0)
QUICK_ROUNDS = Rounds(at_least=8, seconds=5.0)
CPU = torch.device("cpu")
CAPACITY = 256
"""tokens of a packed row, as in the tiny recipe"""


@dataclass(frozen=True, slots=True)
class Work:
    """`run` is timed; it returns whether what it made is right. `amount` units of work are in one call."""

    unit: str
    amount: int
    run: Callable[[], bool]


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a result was wrong."""
    parser = argparse.ArgumentParser(prog="phimini bench data", description=__doc__)
    parser.add_argument("--rounds", type=int, help="as many, instead of as many as it takes")
    parser.add_argument("--quick", action="store_true", help="few rounds, little data")
    parser.add_argument(
        "--json", type=Path, help="write the rows here, as `bench compare` reads them"
    )
    args = parser.parse_args(argv)
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    if args.rounds is not None:
        rounds = Rounds(at_least=args.rounds, at_most=args.rounds)
    rows = bench(200 if args.quick else 1000, rounds)
    for row in rows:
        value = (
            "WRONG"
            if row.value is None
            else f"{row.value.p50:,.0f} {row.unit} ({row.value.p20:,.0f} to {row.value.p80:,.0f})"
        )
        print(f"{row.case['work']:8} {value}", flush=True)
    if args.json is not None:
        write(args.json, rows)
    return 0 if all(row.correct for row in rows) else 1


def bench(num_problems: int, rounds: Rounds) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="phimini-bench-") as folder:
        run = override(tiny(), [f"out={folder}", f"distill.num_problems={num_problems}", "distill.num_prompts=24",
                                "distill.num_heldout=24", "distill.num_validation=24"])  # fmt: skip
        distill(run)
        curate(run)
        works = works_of(run)
        right = {name: work.run() for name, work in works.items()}  # also the warm-up
        taken: dict[str, list[float]] = {name: [] for name in works}
        python: list[float] = []
        start = time.process_time()
        while not python or not all(
            rounds.enough(of_one, python, time.process_time() - start) for of_one in taken.values()
        ):
            for name, work in works.items():
                taken[name].append(seconds(work.run, CPU))
            python.append(seconds(plain_python, CPU))
    return [
        measured(
            bench="data", case={"work": name, "amount": work.amount}, provider="phimini", unit=work.unit,
            samples=[work.amount / s for s in taken[name]] if right[name] else [], correct=right[name],
            reference="python", reference_samples=[1 / s for s in python] if right[name] else [],
        )
        for name, work in works.items()
    ]  # fmt: skip


def works_of(run: RunConfig) -> dict[str, Work]:
    path = Path(run.out) / "curate" / "midtrain.jsonl"
    rollouts = read_rows(Path(run.out) / "distill" / "rollouts.jsonl", ROLLOUT_FIELDS)
    tokenizer: Tokenizer = train_tiny_tokenizer(
        [r["response"] for r in rollouts[:200]], vocab_size=256
    )
    examples = read_examples(path, tokenizer, run.chat_template)
    lengths = [len(e) for e in examples]

    def packing() -> bool:
        rows = best_fit(lengths, CAPACITY)
        batches = [pack(documents([examples[i] for i in row])) for row in rows]
        once = sorted(i for row in rows for i in row) == list(range(len(examples)))
        fits = all(batch.num_tokens <= CAPACITY for batch in batches)
        return once and fits and sum(batch.num_tokens for batch in batches) == sum(lengths)

    def reading() -> bool:
        return len(read_examples(path, tokenizer, run.chat_template)) == len(examples)

    def verifying() -> bool:
        return all(bool(verify(r["response"], r["answer"])) == r["correct"] for r in rollouts)

    return {
        "read": Work("rows/cpu_s", len(examples), reading),
        "pack": Work("tokens/cpu_s", sum(lengths), packing),
        "verify": Work("rows/cpu_s", len(rollouts), verifying),
    }


def plain_python() -> None:
    """The yardstick: dictionaries, strings and integers, some ten milliseconds."""
    counts: dict[str, int] = {}
    for number in range(40_000):
        key = str(number % 997)
        counts[key] = counts.get(key, 0) + number


if __name__ == "__main__":
    sys.exit(main())
