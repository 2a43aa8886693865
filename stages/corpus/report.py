"""The report of `clean`: what went and why, and what was added, with examples; after it the rows are in OUT/rows and OUT/dropped."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phimini.model.io.checked_files import write_sealed
from phimini.model.io.json_files import Row
from phimini.stages.config.cleaning import DOMAINS, CleanOptions
from phimini.stages.corpus.questions import UNKNOWN
from phimini.stages.corpus.shards import read_back
from phimini.stages.corpus.steps import JUDGED

EXAMPLES, SHOWN = 5, 200
"""rows of each reason, and characters of their questions"""
MOVED = {"final/rollouts": "rows", "checked/dropped": "dropped/checked", "final/dropped": "dropped/near"}  # fmt: skip


def make_report(options: CleanOptions, out: Path) -> None:
    """Write report.json, and move the rows to their places. It may be called again after it was ended at any point."""
    for name, place in MOVED.items():
        if (out / "work" / name).exists():
            (out / place).parent.mkdir(exist_ok=True)
            os.replace(out / "work" / name, out / place)
    kept: Counter[str] = Counter()
    judge: Counter[str] = Counter()
    for row in _rows(out / "rows"):
        kept[row["verdict"]] += 1
        if "judge" in row:
            judge[row["judge"].get("verdict") or "invalid reply"] += 1
    went: Counter[str] = Counter()
    examples: dict[str, list[Row]] = {}
    for row in _rows(out / "dropped"):
        kind = row["reason"].partition(" question ")[0]
        went[kind] += 1
        if len(some := examples.setdefault(kind, [])) < EXAMPLES:
            some.append({name: row[name] for name in ("id", "origin", "reason")} | {"question": row["question"][:SHOWN]})  # fmt: skip
    facts = np.load(out / "work" / "questions.npy")
    report: dict[str, Any] = {
        "rows": kept.total(), "correct": kept["equal"] + kept[JUDGED], "verdicts": dict(sorted(kept.items())),
        "dropped": {kind: {"rows": went[kind], "examples": examples[kind]} for kind in sorted(went)},
        "questions": len(facts), "decontaminated": bool(options.heldout), "judge": dict(sorted(judge.items())),
    }  # fmt: skip
    if options.label.model is not None:
        is_valid = facts["domain"] != UNKNOWN
        domains = np.bincount(facts["domain"][is_valid], minlength=len(DOMAINS)).tolist()
        report["labels"] = {
            "valid": int(is_valid.sum()),
            "invalid reply": int((~is_valid).sum()),
        } | {name: number for name, number in zip(DOMAINS, domains, strict=True) if number}
    write_sealed(out / "report.json", report)


def _rows(folder: Path) -> Iterator[Row]:
    return (row for path in sorted(folder.rglob("*.parquet")) for row in read_back(path))


def lines(report: dict[str, Any], out: Path) -> list[str]:
    """Return the report as lines."""
    counts = lambda some: ", ".join(f"{name} {number:,}" for name, number in some.items()) or "none"
    went = {kind: found["rows"] for kind, found in report["dropped"].items()}
    said = [
        f"clean: {out / 'rows'}: {report['rows']:,} rows of {report['questions']:,} questions, {report['correct']:,} correct",
        f"clean: verdicts: {counts(report['verdicts'])}",
        f"clean: {out / 'dropped'}: {counts(went)}{'' if report['decontaminated'] else '; no held-out questions were given'}",
    ]  # fmt: skip
    for name in ("judge", "labels"):
        if report.get(name):
            said.append(f"clean: {name}: {counts(report[name])}")
    return said
