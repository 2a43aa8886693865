"""Compare the rows of a run with a baseline.

The baseline is a file, a folder of files or, if none is named, the committed one of NEW's device under DIR. Rows with
the same bench, case, provider and unit are compared:

    time      The ratio to the reference provider, which took turns in the same run, so that a slower clock cancels out.
              A row fails if it is more than 5 % slower and the bands of both ratios do not overlap
              (`bench/gate/paired_ratio.py` explains the bands). The absolute value is compared too, with a limit of
              8 %, for rows without a reference and for all rows on a GPU, but only between equal machines and versions.
    memory    peak_bytes: a row fails if it needs more than 1 % more (on a CPU, and more than 1 MiB more).
    correct   A wrong result fails.
    faster    A faster row never fails.

A row whose bands are too wide to show a slow-down of twice the limit passes as `noisy` and is named: measure it again,
for longer. Rows from other projects that have no reference are for information and never fail.
Exit status:

    0  every row passed
    1  a row is slower, needs more memory, is wrong or is missing
    2  the files could not be read
    3  no row failed, but some have no baseline, a stale one (other versions, another reference), or too few rounds
    4  a file has another schema than this version writes
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phimini.bench.gate.environment import Environment
from phimini.bench.gate.options import parser, status_of
from phimini.bench.gate.paired_ratio import typical
from phimini.bench.gate.rows import BETTER, Row, read

BASELINES = Path(__file__).parents[1] / "baselines"
MIN_ROUNDS = 5
"""fewer rounds give no usable band"""
CPU_MEMORY_SLACK_BYTES = 2**20
FAILURES = ("slower", "more memory", "wrong", "gone")
UNDECIDED = ("no baseline", "stale baseline", "too few rounds")
VERDICTS = (*FAILURES, *UNDECIDED, "noisy", "faster", "ok", "yardstick")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The relative increase beyond which a row fails."""

    ratio: float = 0.05
    absolute: float = 0.08
    memory: float = 0.01
    when_absolute: Literal["auto", "always", "never"] = "auto"
    """auto: rows without a reference, and every row on a GPU; no environment records a CPU's clock and neighbours"""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one row. A row that is both slower and larger has two."""

    key: str
    verdict: str
    """one of VERDICTS"""
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    judgements: list[Judgement]

    @property
    def status(self) -> int:
        """0, 1 or 3 as in the file's docstring. A report without rows does not pass."""
        verdicts = {j.verdict for j in self.judgements}
        if verdicts & set(FAILURES):
            return 1
        return 3 if not verdicts - {"yardstick"} or verdicts & set(UNDECIDED) else 0

    def text(self, *, verbose: bool = False) -> str:
        """Return a line per row that is not simply ok (`verbose`: per row), and the sums."""
        shown = [j for j in self.judgements if verbose or j.verdict not in ("ok", "yardstick")]
        shown.sort(key=lambda j: VERDICTS.index(j.verdict))
        counts = Counter(j.verdict for j in self.judgements)
        sums = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or "no rows"
        word = {0: "PASS", 1: "FAIL", 3: "NO VERDICT"}[self.status]
        return "\n".join([*(f"{j.verdict:14} {j.key}: {j.text}" for j in shown), f"{word}: {sums}"])


# --- one row ---------------------------------------------------------------------------------------
def judge(base: Row | None, new: Row, limits: Limits) -> list[Judgement]:
    """Compare `new` with `base`, the row with the same key."""
    if not new.correct:
        verdict, text = "wrong", f"error {'not finite' if new.error is None else new.error}"
    elif not new.held:
        verdict, text = "yardstick", "not compared"
    elif base is None:
        verdict, text = "no baseline", "no row of this key in the base"
    elif not base.samples:
        verdict, text = "no baseline", "the baseline's result was wrong"
    else:
        then, now = _environments(base, new)
        if then.slug == now.slug and not (changes := _stale(base, new)):
            return [_time(base, new, limits), *_memory(base, new, limits)]
        if then.slug != now.slug:
            verdict, text = "no baseline", f"the base was measured on {then.device}, this on {now.device}"  # fmt: skip
        else:
            verdict, text = "stale baseline", f"{'; '.join(changes)} (`phimini bench bless`)"
    return [Judgement(new.key, verdict, text)]


def _stale(base: Row, new: Row) -> list[str]:
    """Describe the changes besides our code that could explain a slower row."""
    then, now = _environments(base, new)
    packages = [p for p in now.versions if new.reference and p.startswith(new.reference)]
    changes = then.changes(now, ["torch", "triton", *packages, "threads"])
    if base.reference != new.reference:
        changes.append(f"the reference was {base.reference}, is {new.reference}")
    return changes


def _time(base: Row, new: Row, limits: Limits) -> Judgement:
    rounds = len(base.samples), len(new.samples)
    if min(rounds) < MIN_ROUNDS:
        text = f"expected at least {MIN_ROUNDS}, got {rounds[0]} and {rounds[1]}"
        return Judgement(new.key, "too few rounds", text)
    then, now = _environments(base, new)
    pairs: list[tuple[str, list[float], list[float], float]] = []
    if base.ratios and new.ratios:
        pairs.append((f"ratio to {new.reference}", base.ratios, new.ratios, limits.ratio))
    by_itself = limits.when_absolute == "auto" and (not pairs or now.device_kind == "cuda")
    if limits.when_absolute == "always" or by_itself:
        if not (changes := then.changes(now)):
            pairs.append((new.unit, base.samples, new.samples, limits.absolute))
        elif not pairs:
            return Judgement(new.key, "no baseline", f"no reference, and {changes[0]}")
    if not pairs:
        text = "no reference, and absolute values are not compared"
        return Judgement(new.key, "no baseline", text)
    found = [_compare(new, *pair, run_to_run=base.run_to_run) for pair in pairs]
    return next((j for j in found if j.verdict == "slower"), found[0])


def _compare(
    row: Row, what: str, then: list[float], now: list[float], limit: float, run_to_run: float
) -> Judgement:
    base, new = typical(then, run_to_run), typical(now)
    change = (new.mid / base.mid if BETTER[row.unit] == "lower" else base.mid / new.mid) - 1
    apart = new.low > base.high or new.high < base.low
    bands = " to ".join(f"{b.mid:.4g} ({b.low:.4g}-{b.high:.4g})" for b in (base, new))
    text = f"{what} {bands}, {100 * change:+.1f} % time"
    if apart and change > limit:
        return Judgement(row.key, "slower", f"{text}, limit {100 * limit:g} %")
    if apart and change < -limit:
        return Judgement(row.key, "faster", text)
    if base.reach * new.reach > 1 + 2 * limit:
        return Judgement(row.key, "noisy", f"{text}; bands too wide to show one of {200 * limit:g} %")  # fmt: skip
    return Judgement(row.key, "ok", text)


def _memory(base: Row, new: Row, limits: Limits) -> Iterable[Judgement]:
    if base.peak_bytes is None:
        return
    if new.peak_bytes is None:
        yield Judgement(new.key, "no baseline", "the base has peak_bytes, the new row has not")
        return
    slack = CPU_MEMORY_SLACK_BYTES if _environments(base, new)[1].device_kind == "cpu" else 0
    if new.peak_bytes - base.peak_bytes > max(limits.memory * base.peak_bytes, slack):
        mib = f"{base.peak_bytes / 2**20:.2f} to {new.peak_bytes / 2**20:.2f} MiB"
        yield Judgement(new.key, "more memory", f"{mib}, limit {100 * limits.memory:g} %")


def _environments(base: Row, new: Row) -> tuple[Environment, Environment]:
    assert base.environment is not None and new.environment is not None, "rows come from files"
    return base.environment, new.environment


# --- files -----------------------------------------------------------------------------------------
def compare(
    base: Iterable[Row], new: Iterable[Row], limits: Limits | None = None, *, partial: bool = False
) -> Report:
    """Compare every row of `new` with the row of `base` that has its key; both come from `rows.read`.

    `partial`: rows that only `base` has were not measured, and are not missing.
    """
    then, now = ({row.key: row for row in rows} for rows in (base, new))
    judgements = [j for k, r in now.items() for j in judge(then.get(k), r, limits or Limits())]
    if not partial:
        missing = [key for key in then if key not in now]
        judgements += [Judgement(k, "gone", "in the base, not in the new rows") for k in missing]
    return Report(judgements)


def read_base(path: Path) -> list[Row]:
    """Return the rows of a file, or of every .jsonl file of a folder; no rows if it does not exist."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    return [row for file in files for row in read(file)]


def baseline_of(new: list[Row], baselines: Path = BASELINES) -> list[Row]:
    """Return the committed rows of the device of `new`. ValueError if its rows come from several devices."""
    return read_base(baselines / slug_of_rows(new))


def slug_of_rows(rows: list[Row]) -> str:
    """Return the folder name of the one device that `rows` were measured on. ValueError for several, or no rows."""
    slugs = sorted({row.environment.slug for row in rows if row.environment})
    if len(slugs) != 1:
        raise ValueError(f"expected rows of one device, got {slugs or 'no rows'}")
    return slugs[0]


def main(argv: list[str] | None = None) -> int:
    options = parser("compare", __doc__, json=False)
    options.add_argument("base", nargs="?", type=Path, metavar="BASE")
    options.add_argument("new", type=Path, metavar="NEW")
    options.add_argument("--baselines", type=Path, default=BASELINES)
    options.add_argument("--absolute", choices=("auto", "always", "never"), default="auto")
    options.add_argument("--partial", action="store_true", help="rows that NEW lacks were not measured")  # fmt: skip
    options.add_argument("--verbose", action="store_true", help="print a line for every row")
    args = options.parse_args(argv)

    def run() -> int:
        new = read(args.new)
        base = read_base(args.base) if args.base else baseline_of(new, args.baselines)
        report = compare(base, new, Limits(when_absolute=args.absolute), partial=args.partial)
        print(report.text(verbose=args.verbose))
        return report.status

    return status_of("compare", run)


if __name__ == "__main__":
    sys.exit(main())
