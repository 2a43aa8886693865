"""Make the rows of a run the baseline of their device.

Bless several runs together: of each row the run whose ratio lies in the middle is kept, and its band covers the others,
so that a difference between processes is no slow-down.

Writes DIR/<device>/<bench>.jsonl, one file per bench. A row replaces the one with its key, the others stay, and the file
keeps the reason with the commit, the date and the number of rows. Commit the files.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from phimini.bench.gate.compare import BASELINES, MIN_ROUNDS, slug_of_rows
from phimini.bench.gate.environment import environment
from phimini.bench.gate.options import parser, status_of
from phimini.bench.gate.paired_ratio import typical
from phimini.bench.gate.rows import Row, SchemaError, read, read_all, write


def bless(new: list[Row], reason: str, baselines: Path = BASELINES) -> list[Path]:
    """Write the baseline files, each whole or not at all, and return their paths.

    ValueError for a run that is no baseline: without a reason, with uncommitted changes, with a wrong result of ours,
    with fewer than MIN_ROUNDS rounds, or of several devices.
    """
    if not reason.strip():
        raise ValueError("--reason: expected a sentence, got nothing")
    folder = baselines / slug_of_rows(new)
    for row in new:
        _check(row)
    paths = []
    for bench in sorted({row.bench for row in new}):
        mine = {row.key: row for row in new if row.bench == bench}
        here = next(iter(mine.values())).environment
        assert here is not None
        path = folder / f"{bench}.jsonl"
        old, blessings = _before(path)
        blessings.append({"reason": reason, "date": here.date, "commit": here.commit, "rows": len(mine)})  # fmt: skip
        merged = {row.key: row for row in old} | mine
        write(path, [merged[key] for key in sorted(merged)], blessings)
        paths.append(path)
    return paths


def together(runs: list[list[Row]]) -> list[Row]:
    """Return one row per key: the middle one of several runs, with half the distance between the outermost two."""
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
    """Return the file's rows and blessings. Rows of another schema are dropped with a warning: no run compares with them."""
    try:
        return read_all(path) if path.exists() else ([], [])
    except SchemaError as problem:
        print(f"bench bless: the old file is replaced: {problem}", file=sys.stderr)
        return [], []


def _check(row: Row) -> None:
    assert row.environment is not None, "rows come from files"
    if row.environment.dirty:
        text = f"uncommitted changes on {row.environment.commit}; commit, then measure again"
        raise ValueError(f"{row.key}: measured with {text}")
    if row.held and not row.correct:
        raise ValueError(f"{row.key}: a wrong result (error {row.error})")
    if row.held and len(row.samples) < MIN_ROUNDS:
        rounds = len(row.samples)
        raise ValueError(f"{row.key}: expected at least {MIN_ROUNDS} rounds, got {rounds}")


def folder_to_bless(baselines: Path) -> Path:
    """Return `baselines`. ValueError for the default where phimini is installed: its own folder is not the user's."""
    if baselines == BASELINES and environment().commit is None:
        raise ValueError("--baselines: expected a folder of your project; phimini is installed here, not a checkout")  # fmt: skip
    return baselines


def main(argv: list[str] | None = None) -> int:
    """Return 0; 2 where no baseline was written, 4 for another schema."""
    options = parser("bless", __doc__, json=False)
    options.add_argument("new", nargs="+", type=Path, metavar="NEW")
    options.add_argument("--reason", required=True, help="why later runs are compared with this one")  # fmt: skip
    options.add_argument("--baselines", type=Path, default=BASELINES)
    args = options.parse_args(argv)

    def run() -> int:
        rows = together([read(path) for path in args.new])
        for path in bless(rows, args.reason, folder_to_bless(args.baselines)):
            print(f"wrote {path}")
        return 0

    return status_of("bless", run)


if __name__ == "__main__":
    sys.exit(main())
