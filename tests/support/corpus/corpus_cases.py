"""A small corpus with every kind of row that `phimini clean` keeps or drops, and what it made of it."""

import random
from hashlib import sha256
from pathlib import Path
from typing import Any

from phimini.model.io.json_files import write_rows
from phimini.stages.cli import main
from phimini.stages.corpus.shards import read_back

SETTINGS = ("max_repetition=0.5", "shard_mb=0.04", "near.buckets=10")
LOOP = "we add the numbers in this line once more and " * 20
WORDS = "so then we take both sides and divide them by the number which gives half of what was there before as a check of the last line now".split()  # fmt: skip


def corpus(folder: Path, number: int = 40) -> Path:
    """Write rollouts of sums in two files: right ones, copies in capitals, wrong, cut off, in a loop; and held-out questions."""
    for name, numbers in {"a": range(100, 100 + number), "b": range(300, 300 + number)}.items():
        rows = []
        for n in numbers:
            rng = random.Random(n)
            text = " ".join(rng.choices(WORDS, k=60))
            for kind, response in {
                "right": f"{text} so \\boxed{{{4 * n}}}", "near": f"{text.upper()}  so\n\\boxed{{{4 * n}}}", "wrong": f"{text} so \\boxed{{1}}",
                "other": f"{' '.join(rng.choices(WORDS, k=60))} so \\boxed{{{4 * n}.0}}", "loop": f"{LOOP} {n} \\boxed{{{4 * n}}}", "cut": f"{text} and",
            }.items():  # fmt: skip
                rows.append({"id": f"r{n}.{kind}", "question": f"What is {n} + {3 * n}?", "answer": str(4 * n), "level": n % 3, "family": "sums",
                             "license": "MIT", "sampling": {"temperature": 0.6}, "seed": n, "response": response})  # fmt: skip
        write_rows(folder / "source" / f"{name}.jsonl", rows)
    asked = ["Add $101$ and $303$: what is the sum?", "what  is 110+330?"]
    write_rows(folder / "held.jsonl", [{"question": q, "answer": "1"} for q in asked])
    return folder / "source"


def clean(folder: Path, *words: str) -> Path:
    out = folder / "out"
    words = (f"heldout={folder / 'held.jsonl'}", *SETTINGS, *words)
    assert main(["clean", str(folder / "source"), str(out), *words]) == 0
    return out


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.rglob("*.parquet")) for row in read_back(path)]


def digests(out: Path) -> dict[str, str]:
    files = [*(out / "rows").rglob("*"), *(out / "dropped").rglob("*"), out / "report.json"]
    return {str(p.relative_to(out)): sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}  # fmt: skip
