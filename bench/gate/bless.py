"""`phimini bench bless NEW [NEW ...] --reason TEXT [--baselines DIR]`: rows of a run become the baseline of their device.

Of several runs each row is the one whose ratio lies in the middle, and its band takes in the others': what differs from
process to process is then no slow-down.

Writes DIR/<device>/<bench>.jsonl, a file per bench: a row replaces the one with its key, the others stay, and the
reason is kept in the file with the commit, the day and how many rows it was for. Commit the files.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from phimini.bench.gate.compare import BASELINES, MIN_ROUNDS, SCHEMA_STATUS
from phimini.bench.gate.paired_ratio import typical
from phimini.bench.gate.rows import Row, SchemaError, read, read_all, write


def bless(new: list[Row], reason: str, baselines: Path = BASELINES) -> list[Path]:
    """The files that were written, each whole or not at all.

    ValueError for a run that no later one should be held to: without a reason, of a tree with uncommitted changes,
    with a wrong result of ours, with fewer than MIN_ROUNDS rounds, or of several devices.
    """
    if not reason.strip():
        raise ValueError("bench bless: reason: expected a sentence, got nothing")
    if not new:
        raise ValueError("bench bless: expected rows, got none")
    if len({row.environment.slug for row in new if row.environment}) != 1:
        raise ValueError("bench bless: expected rows of one device, got several")
    for row in new:
        _check(row)
    paths = []
    for bench in sorted({row.bench for row in new}):
        mine = [row for row in new if row.bench == bench]
        here = mine[0].environment
        assert here is not None
        path = baselines / here.slug / f"{bench}.jsonl"
        old, blessings = _before(path)
        keys = {row.key for row in mine}
        kept = [row for row in old if row.key not in keys]
        blessings.append(
            {"reason": reason, "date": here.date, "commit": here.commit, "rows": len(mine)}
        )
        write(path, sorted([*kept, *mine], key=lambda row: row.key), blessings)
        paths.append(path)
    return paths


def together(runs: list[list[Row]]) -> list[Row]:
    """One row per key: of those of several runs the middle one, with half of what lies between the outermost two."""
    keyed: dict[str, list[Row]] = {}
    for row in (row for run in runs for row in run):
        keyed.setdefault(row.key, []).append(row)
    return [_middle(rows) for rows in keyed.values()]


def _middle(rows: list[Row]) -> Row:
    wrong = [row for row in rows if not row.correct]
    if wrong or len(rows) == 1:
        return (wrong or rows)[0]
    mids = sorted((typical(row.ratios or row.samples).mid, i) for i, row in enumerate(rows))
    middle = rows[mids[len(mids) // 2][1]]
    return dataclasses.replace(middle, run_to_run=math.log(mids[-1][0] / mids[0][0]) / 2)


def _before(path: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """What the file has. Rows of another schema are dropped, which is said: nothing could be held to them any more."""
    try:
        return read_all(path) if path.exists() else ([], [])
    except SchemaError as problem:
        print(f"bench bless: the old file is replaced: {problem}", file=sys.stderr)
        return [], []


def _check(row: Row) -> None:
    assert row.environment is not None, "rows come from files"
    if row.environment.dirty:
        raise ValueError(
            f"bench bless: {row.key}: measured with uncommitted changes on {row.environment.commit}; commit, then "
            "measure again"
        )
    ours = row.provider == "phimini" or row.reference is not None
    if ours and not row.correct:
        raise ValueError(f"bench bless: {row.key}: a wrong result (error {row.error})")
    if ours and row.num_samples < MIN_ROUNDS:
        raise ValueError(
            f"bench bless: {row.key}: expected at least {MIN_ROUNDS} rounds, got {row.num_samples}"
        )


def main(argv: list[str] | None = None) -> int:
    """0; 2 where nothing was written, 4 for another schema."""
    parser = argparse.ArgumentParser(prog="phimini bench bless", description=__doc__)
    parser.add_argument("new", nargs="+", type=Path, metavar="NEW")
    parser.add_argument("--reason", required=True, help="why later runs are held to this one")
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    args = parser.parse_args(argv)
    try:
        new = together([read(path) for path in args.new])
        for path in bless(new, args.reason, args.baselines):
            print(f"wrote {path}")
    except SchemaError as problem:
        print(f"schema change: {problem}", file=sys.stderr)
        return SCHEMA_STATUS
    except (OSError, ValueError) as problem:
        print(
            f"bench bless: {problem}".replace("bench bless: bench bless:", "bench bless:"),
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
