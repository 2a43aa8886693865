"""`phimini bench compare [BASE] NEW [--baselines DIR] [--absolute auto|always|never] [--partial]`.

Holds the rows of a run to a baseline: a file, a folder of files, or, if none is named, what is committed for NEW's
device under DIR (bench/baselines). What is held to what, row by row (the same bench, case, provider and unit):

    time      the ratio to the reference provider, measured in turns in the same run, so that a slower clock cancels
              out. Fails past 5 % if the bands of both ratios do not overlap either (`bench/gate/paired_ratio.py` says how a
              ratio and its band come from the rounds). A row without a reference, or on a GPU any row: also the
              absolute value, past 8 %, and only between equal machines and versions.
    memory    peak_bytes, past 1 % (on a CPU, whose resident set is counted in pages, also past 1 MiB)
    correct   a wrong result fails
    faster    never fails

A row whose bands are so wide that a slow-down of twice the limit would hide in them passes as `noisy`, and is named:
measure it again, for longer. A row of another project's provider that is held to nothing is a yardstick and never fails.
Exit status:

    0  every row passed
    1  a row is slower, needs more memory, is wrong or is gone
    2  the files could not be read
    3  nothing failed, but rows have no baseline, a stale one (other versions, another reference), or too few rounds
    4  a file has another schema than this version writes
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from phimini.bench.gate.environment import Environment
from phimini.bench.gate.paired_ratio import Typical, typical
from phimini.bench.gate.rows import BETTER, Row, SchemaError, read

BASELINES = Path("bench/baselines")
MIN_ROUNDS = 5
"""fewer have no band to speak of"""
CPU_MEMORY_SLACK_BYTES = 2**20
FAILURES = ("slower", "more memory", "wrong", "gone")
UNDECIDED = ("no baseline", "stale baseline", "too few rounds")
SCHEMA_STATUS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much worse a row may be, as a share; beyond it, it fails."""

    ratio: float = 0.05
    absolute: float = 0.08
    memory: float = 0.01
    when_absolute: Literal["auto", "always", "never"] = "auto"
    """auto: rows without a reference, and every row on a GPU. A CPU's clock and neighbours are in no fingerprint"""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of one row. A row that is both slower and larger has two."""

    key: str
    verdict: str
    """ok, faster, noisy, yardstick, or one of FAILURES or UNDECIDED"""
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    judgements: list[Judgement] = field(default_factory=list)

    @property
    def status(self) -> int:
        """0, 1 or 3 as in the file's docstring. No row at all is no pass."""
        verdicts = {j.verdict for j in self.judgements}
        if verdicts & set(FAILURES):
            return 1
        return 3 if not verdicts - {"yardstick"} or verdicts & set(UNDECIDED) else 0

    def text(self, *, verbose: bool = False) -> str:
        """A line per row that is not simply ok (with `verbose` per row), and the sums."""
        shown = [j for j in self.judgements if verbose or j.verdict not in ("ok", "yardstick")]
        order = [*FAILURES, *UNDECIDED, "noisy", "faster", "ok", "yardstick"]
        shown.sort(key=lambda j: order.index(j.verdict))
        counts = Counter(j.verdict for j in self.judgements)
        sums = ", ".join(f"{counts[v]} {v}" for v in order if counts[v]) or "no rows"
        word = {0: "PASS", 1: "FAIL", 3: "NO VERDICT"}[self.status]
        return "\n".join([*(f"{j.verdict:14} {j.key}: {j.text}" for j in shown), f"{word}: {sums}"])


# --- one row ---------------------------------------------------------------------------------------
def judge(base: Row, new: Row, limits: Limits) -> list[Judgement]:
    """`new` held to `base`, a row with the same key."""
    if not new.correct:
        return [
            _said(new, "wrong", f"error {new.error if new.error is not None else 'not finite'}")
        ]
    if new.reference is None and new.provider != "phimini":
        return [_said(new, "yardstick", "held to nothing")]
    if not base.samples or not new.samples:
        return [_said(new, "no baseline", "the baseline's result was wrong")]
    then, now = _environments(base, new)
    if then.slug != now.slug:
        return [
            _said(
                new, "no baseline", f"the base was measured on {then.device}, this is {now.device}"
            )
        ]
    if changes := _what_makes_it_stale(base, new):
        return [_said(new, "stale baseline", f"{'; '.join(changes)} (`phimini bench bless`)")]
    return [_time(base, new, limits), *_memory(base, new, limits)]


def _time(base: Row, new: Row, limits: Limits) -> Judgement:
    if min(base.num_samples, new.num_samples) < MIN_ROUNDS:
        rounds = f"{base.num_samples} and {new.num_samples}"
        return _said(new, "too few rounds", f"expected at least {MIN_ROUNDS}, got {rounds}")
    then, now = _environments(base, new)
    pairs = []
    if base.ratios and new.ratios:
        pairs.append((f"ratio to {new.reference}", base.ratios, new.ratios, limits.ratio))
    wanted = limits.when_absolute == "always" or (
        limits.when_absolute == "auto" and (not pairs or now.device_kind == "cuda")
    )
    if wanted and then.same_machine(now):
        pairs.append((new.unit, base.samples, new.samples, limits.absolute))
    if not pairs:
        return _said(
            new, "no baseline", f"no reference, and {_difference(then, now)}: nothing to hold it to"
        )
    pairs = [(what, typical(b, base.run_to_run), typical(n), limit) for what, b, n, limit in pairs]
    changes = [(what, _slowdown(new.unit, b, n), limit, b, n) for what, b, n, limit in pairs]
    for what, (change, apart), limit, b, n in changes:
        if change > limit and apart:
            return _said(
                new, "slower", _described(what, change, b, n) + f", limit {100 * limit:g} %"
            )
    what, (change, apart), limit, b, n = changes[0]
    said = _described(what, change, b, n)
    if change < -limit and apart:
        return _said(new, "faster", said)
    if b.reach * n.reach > 1 + 2 * limit:
        return _said(new, "noisy", f"{said}; bands too wide to show one of {200 * limit:g} %")
    return _said(new, "ok", said)


def _slowdown(unit: str, base: Typical, new: Typical) -> tuple[float, bool]:
    """(how much more time the new one takes, as a share; whether the bands are apart)"""
    apart = new.low > base.high or new.high < base.low
    factor = new.mid / base.mid if BETTER[unit] == "lower" else base.mid / new.mid
    return factor - 1, apart


def _memory(base: Row, new: Row, limits: Limits) -> Iterable[Judgement]:
    if base.peak_bytes is None:
        return
    if new.peak_bytes is None:
        yield _said(new, "no baseline", "the base has peak_bytes, the new row has none")
        return
    more = new.peak_bytes - base.peak_bytes
    slack = CPU_MEMORY_SLACK_BYTES if _environments(base, new)[1].device_kind == "cpu" else 0
    if more > max(limits.memory * base.peak_bytes, slack):
        share = f" ({100 * more / base.peak_bytes:+.1f} %)" if base.peak_bytes else ""
        text = f"{base.peak_bytes / 2**20:.2f} to {new.peak_bytes / 2**20:.2f} MiB{share}"
        yield _said(new, "more memory", f"{text}, limit {100 * limits.memory:g} %")


def _what_makes_it_stale(base: Row, new: Row) -> list[str]:
    """What changed besides our code, so that a slower row would not be our code's fault."""
    then, now = _environments(base, new)
    packages = ["torch", "triton"]
    packages += [p for p in now.versions if new.reference and p.startswith(new.reference)]
    changes = [f"{p} was {then.versions.get(p)}, is {now.versions.get(p)}" for p in packages
               if then.versions.get(p) != now.versions.get(p)]  # fmt: skip
    if then.threads != now.threads:
        changes.append(f"threads were {then.threads}, are {now.threads}")
    if base.reference != new.reference:
        changes.append(f"the reference was {base.reference}, is {new.reference}")
    return changes


def _difference(then: Environment, now: Environment) -> str:
    for name in ("driver", "power_cap_w", "versions"):
        a, b = getattr(then, name), getattr(now, name)
        if name == "versions" and a != b:
            changed = next(
                (k for k in sorted(a | b) if a.get(k) != b.get(k) and k != "phimini"), ""
            )
            a, b, name = a.get(changed), b.get(changed), changed
        if a != b:
            return f"{name} was {a}, is {b}"
    return "absolute values are not compared"


def _environments(base: Row, new: Row) -> tuple[Environment, Environment]:
    assert base.environment is not None and new.environment is not None, "rows come from files"
    return base.environment, new.environment


def _described(what: str, change: float, base: Typical, new: Typical) -> str:
    bands = " to ".join(f"{b.mid:.4g} ({b.low:.4g}-{b.high:.4g})" for b in (base, new))
    return f"{what} {bands}, {100 * change:+.1f} % time"


def _said(row: Row, verdict: str, text: str) -> Judgement:
    return Judgement(row.key, verdict, text)


# --- files -----------------------------------------------------------------------------------------
def compare(
    base: Iterable[Row], new: Iterable[Row], limits: Limits | None = None, *, partial: bool = False
) -> Report:
    """Every row of `new` held to the row of `base` with its key; both come from `rows.read`.

    `partial`: rows that only `base` has were not asked for, instead of gone.
    """
    limits = limits or Limits()
    then, now = ({row.key: row for row in rows} for rows in (base, new))
    judgements: list[Judgement] = []
    for key, row in now.items():
        if key in then:
            judgements += judge(then[key], row, limits)
        elif not row.correct:
            judgements.append(_said(row, "wrong", f"error {row.error}"))
        elif row.reference is not None or row.provider == "phimini":
            judgements.append(_said(row, "no baseline", "no row of this key in the base"))
    if not partial:
        gone = [then[key] for key in then if key not in now]
        judgements += [_said(row, "gone", "in the base, not in the new rows") for row in gone]
    return Report(judgements)


def read_base(path: Path) -> list[Row]:
    """The rows of a file, or of every .jsonl file of a folder; none if it does not exist."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    return [row for file in files for row in read(file)]


def baseline_of(new: list[Row], baselines: Path) -> list[Row]:
    """What is committed for the device of `new`. ValueError if the rows are of several devices."""
    slugs = {row.environment.slug for row in new if row.environment}
    if len(slugs) != 1:
        raise ValueError(
            f"bench compare: expected rows of one device, got {sorted(slugs) or 'no rows'}"
        )
    return read_base(baselines / slugs.pop())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="phimini bench compare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="[BASE] NEW")
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    parser.add_argument("--absolute", choices=("auto", "always", "never"), default="auto")
    parser.add_argument(
        "--partial", action="store_true", help="rows that NEW lacks were not measured"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for every row")
    args = parser.parse_args(argv)
    if len(args.files) > 2:
        parser.error(f"expected [BASE] NEW, got {len(args.files)} files")
    try:
        new = read(args.files[-1])
        base = (
            baseline_of(new, args.baselines) if len(args.files) == 1 else read_base(args.files[0])
        )
    except SchemaError as problem:
        print(f"schema change: {problem}", file=sys.stderr)
        return SCHEMA_STATUS
    except (OSError, ValueError) as problem:
        print(f"bench compare: {problem}", file=sys.stderr)
        return 2
    report = compare(base, new, Limits(when_absolute=args.absolute), partial=args.partial)
    print(report.text(verbose=args.verbose))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
