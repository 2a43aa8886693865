"""`phimini bench readme [--write] [--baselines DIR]`: the README's table of speeds, from the committed baselines.

Prints it, or with `--write` puts it between the two comments of the README that name this command. Nobody types a
number: a test holds the README to the committed rows.
"""

import argparse
import sys
from pathlib import Path

from phimini.bench.gate.compare import BASELINES
from phimini.bench.gate.rows import Band, Row, read
from phimini.model.io.json_files import write_text

START = "<!-- the output of `phimini bench readme`, which `--write` puts here -->"
END = "<!-- end of `phimini bench readme` -->"
ORDER = ("train", "rollout", "weight-sync", "data", "kernels")


def tables(baselines: Path) -> str:
    """One table per device, with what its rows were measured on and with."""
    parts = [_table(folder) for folder in sorted(p for p in baselines.glob("*") if p.is_dir())]
    return "\n\n".join(part for part in parts if part)


def _table(folder: Path) -> str:
    rows = [
        row for path in folder.glob("*.jsonl") for row in read(path) if row.provider == "phimini"
    ]
    rows = [row for row in rows if row.value is not None]
    if not rows:
        return ""
    known = [bench for bench in ORDER if any(row.bench == bench for row in rows)]
    order = known + sorted({row.bench for row in rows} - set(known))
    rows.sort(key=lambda row: (order.index(row.bench), row.key))
    head = [
        _caption(rows),
        "",
        "| bench | case | median (p20 to p80) | against | memory |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(head + [_line(row) for row in rows])


def _caption(rows: list[Row]) -> str:
    environments = [row.environment for row in rows if row.environment]
    here = environments[0]
    dates = sorted({e.date for e in environments})
    commits = sorted({(e.commit or "no commit")[:7] for e in environments})
    power = "" if here.power_cap_w is None else f", {here.power_cap_w:.0f} W"
    versions = ", ".join(
        f"{k} {v}"
        for k, v in here.versions.items()
        if v and k in ("torch", "triton", "megatron-core", "vllm")
    )
    return (
        f"{here.device}{power}, threads {here.threads}, {' and '.join(dates)}, commit {' and '.join(commits)}, {versions}. "
        f"{_rounds(rows)} rounds; a ratio is the median over the rounds, of what was measured in the same one."
    )


def _rounds(rows: list[Row]) -> str:
    low, high = (pick(row.num_samples for row in rows) for pick in (min, max))
    return f"{low}" if low == high else f"{low} to {high}"


def _line(row: Row) -> str:
    case = ", ".join(f"{k} {v}" for k, v in row.case.items())
    assert row.value is not None
    against = "" if row.ratio is None else f"{row.ratio.p50:.3g} of {row.reference}"
    memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB"
    return f"| {row.bench} | {case} | {_band(row.value)} {row.unit} | {against} | {memory} |"


def _band(band: Band) -> str:
    digits = 0 if band.p50 >= 1000 else 1 if band.p50 >= 10 else 3
    return f"{band.p50:,.{digits}f} ({band.p20:,.{digits}f} to {band.p80:,.{digits}f})"


def replaced(text: str, table: str) -> str:
    """`text` with `table` between the comments. ValueError if they are not there, once each and in order."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(
            f"README.md: expected the lines {START!r} and {END!r} once each, in this order"
        )
    before, rest = text.split(START)
    return f"{before}{START}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="phimini bench readme", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the README")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    args = parser.parse_args(argv)
    try:
        table = tables(args.baselines)
        if args.write:
            write_text(args.readme, replaced(args.readme.read_text(), table))
        else:
            print(table)
    except (OSError, ValueError) as problem:
        print(f"phimini: bench readme: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
