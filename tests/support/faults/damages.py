"""Damages to the files of a finished or interrupted run, and the answer of the commands that read them."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_runs import command, differences, snapshot, words_of

from phimini.stages.run.progress import PROGRESS
from phimini.stages.run.stage_folder import INPUTS
from phimini.stages.run.status import ENDED

HOW = ("flip", "cut", "delete", "empty", "swap")
# The next reader of a complete stage's files, which are compared by size alone until then.
READERS = {
    "distill": ["curate", "--redo"], "curate": ["tokenize", "--redo"], "base": ["midtrain", "--redo"],
    "tokenize": ["midtrain", "--redo", "midtrain.steps=12"], "tokenize/sft": ["sft", "--redo"], "midtrain": ["sft", "--redo"], "sft": ["rollout_dpo", "--redo"], "rollout_dpo": ["rlvr", "--redo"],
    "rlvr": ["evaluate", "stage=rlvr", "--redo"], "evaluate": ["report"], "results.json": ["report"],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage to one file of a run."""

    run: str
    """finished or the name of an interrupted one"""
    file: str
    how: str
    seed: int

    def do(self, out: Path) -> None:
        """Damage the file in `out`. A swap is with a file of other content and, if there is one, the same suffix."""
        path, rng = out / self.file, random.Random(self.seed)
        content = path.read_bytes()
        if self.how == "delete":
            path.unlink()
        elif self.how == "swap":
            others = [
                p for p in sorted(out.rglob("*")) if p.is_file() and p.read_bytes() != content
            ]
            alike = [p for p in others if p.suffix == path.suffix]
            other = rng.choice(alike or others)
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        elif self.how == "flip":
            at = rng.randrange(len(content))
            flipped = content[at] ^ (1 << rng.randrange(8))
            path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        else:
            path.write_bytes(content[: len(content) // 2] if self.how == "cut" else b"")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a damage: `named`, `made again`, or the reason why it is neither."""

    kind: str
    said: str


def files_of(out: Path) -> list[str]:
    """Return the names of the files of a run that a command may read again."""
    latest = [json.loads(p.read_text())["directory"] for p in out.rglob("latest.json")]
    names = [str(p.relative_to(out)) for p in sorted(out.rglob("*")) if p.is_file()]
    kept = [n for n in names if "/step-" not in n or any(f"/{name}/" in n for name in latest)]
    ours = (".lock", ENDED, PROGRESS)
    return [n for n in kept if n not in ours and not n.endswith(".tmp")]


def damages(run: str, out: Path, count: int, seed: int) -> list[Damage]:
    """Return `count` damages: one of each file, as far as they go, and then more at random.

    run: the interrupted stage, whose files and inputs are damaged, or `finished`.
    """
    rng = random.Random(seed)
    names = [n for n in files_of(out) if (out / n).stat().st_size]
    if run != "finished":
        names = [n for n in names if n.split("/")[0] in (run, *INPUTS[run])]
        # A resumed stage reads only some of the documents, each of which it checks.
        names = [n for n in names if not n.endswith(".bin")]
    first = [(name, rng.choice(HOW)) for name in rng.sample(names, len(names))]
    rest = [(name, how) for name in names for how in HOW if (name, how) not in first]
    chosen = [*first, *rng.sample(rest, len(rest))][:count]
    return [Damage(run, name, how, rng.randrange(2**32)) for name, how in chosen]


def answer(damage: Damage, run: Path, out: Path, reference: dict[str, Any]) -> Answer:
    """Copy `run` to `out`, damage the copy, and give the commands that read the file.

    reference: the snapshot of the finished run without a damage.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run, out)
    damage.do(out)
    log = out.with_suffix(".log")
    for words in commands(damage, out):
        log.unlink(missing_ok=True)
        status = command(words, log)
        said = log.read_text().strip()
        if status:
            return Answer(refusal(damage, out, status, said), said[-600:])
    differing = differences(reference, snapshot(out))
    return Answer("made again" if not differing else f"ACCEPTED, {differing} differ", "")


def commands(damage: Damage, out: Path) -> Iterator[list[str]]:
    """Yield the words of the recipe and, for a finished run, of the next reader of the damaged file."""
    yield words_of(out)
    stage, part = damage.file.split("/")[0], "/".join(damage.file.split("/")[:2])
    reader = READERS.get(part, READERS.get(stage))
    if damage.run == "finished" and reader is not None:
        verb, *more = reader
        yield (
            ["report", "tiny", f"out={out}"]
            if verb == "report"
            else words_of(out, *more, verb=verb)
        )


def refusal(damage: Damage, out: Path, status: int, said: str) -> str:
    """Return `named` for one sentence that names a file of the run and does not advise to make the stage again."""
    last = said.splitlines()[-1] if said else ""
    if "Traceback" in said or status not in (1, 2):
        return f"UNEXPECTED, status {status}"
    if not last.startswith("phimini: ") or f"{out}" not in last:
        return "UNNAMED"
    return "MISLEADING" if "--redo" in last else "named"
