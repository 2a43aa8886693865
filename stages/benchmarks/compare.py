"""`phimini compare A B`: paired differences of two evaluations, and the problems that changed; or two runs side by side."""

from pathlib import Path
from typing import Any

from phimini.model.io.checked_files import read_sealed
from phimini.stages.benchmarks.scores import RESULTS, RULES
from phimini.stages.config.options import CompareOptions
from phimini.stages.report.intervals import paired_gain
from phimini.stages.report.side_by_side import RESULTS as RUN_RESULTS
from phimini.stages.report.side_by_side import compare_runs


def compare(verb: str, settings: CompareOptions) -> int:
    """Compare two runs, if A and B are folders of runs, or two evaluations.

    Of evaluations: print, for each benchmark that both evaluations have, the difference by both rules with its interval.

    Raises ValueError if one has no results, they share no benchmark, or the same benchmark has other questions.
    """
    runs = [Path(folder, RUN_RESULTS).is_file() for folder in (settings.before, settings.after)]
    if all(runs):
        compare_runs(settings.before, settings.after, settings.page)
        return 0
    a, b = (_results(folder) for folder in (settings.before, settings.after))
    shared = [name for name in a["benchmarks"] if name in b["benchmarks"]]
    if not shared:
        raise ValueError(f"{verb}: {settings.before} has {', '.join(a['benchmarks'])} and {settings.after} has {', '.join(b['benchmarks'])}: no benchmark of both")  # fmt: skip
    for key, value in a["settings"].items():
        other = b["settings"][key]
        if key in ("temperature", "top_p", "max_new_tokens", "k", "seed") and value != other:
            print(f"other settings: {key} {value} and {other}")
    for name in shared:
        of_one, of_other = (_problems(each["benchmarks"][name]) for each in (a, b))
        if of_one.keys() != of_other.keys():
            differing = next(iter(of_one.keys() ^ of_other.keys()))
            raise ValueError(f"{verb}: {name}: expected the same questions, got only one with {differing[0]!r:.100}")  # fmt: skip
        _print_benchmark(name, of_one, of_other, settings.shown)
    return 0


def _results(folder: str) -> dict[str, Any]:
    path = Path(folder, RESULTS)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; `phimini evaluate MODEL benchmarks=...` writes it, or name two runs' folders, with {RUN_RESULTS}"
        )
    return read_sealed(path)


def _problems(of_one: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return each problem's share of right samples by both rules, by its question and answer."""
    return {
        (p["question"], p["answer"]): {"id": p["id"], **{rule: p[rule] / of_one["k"] for rule in RULES}}
        for p in of_one["problems"]
    }  # fmt: skip


def _print_benchmark(name: str, a: dict[Any, Any], b: dict[Any, Any], shown: int) -> None:
    print(f"{name}: {len(a)} questions")
    for rule in RULES:
        before, after = [p[rule] for p in a.values()], [b[key][rule] for key in a]
        gain, low, high = (100 * x for x in paired_gain(before, after))
        means = [100 * sum(each) / len(each) for each in (before, after)]
        print(f"  {rule:<8} {means[0]:.2f} -> {means[1]:.2f}: {gain:+.2f} [{low:+.2f}, {high:+.2f}], paired by question, 95 %")  # fmt: skip
    change = {key: b[key]["strict"] - p["strict"] for key, p in a.items()}
    changed = sorted((k for k in change if change[k]), key=lambda k: -abs(change[k]))
    gained = sum(change[key] > 0 for key in changed)
    print(f"  changed by our rule: {gained} gained, {len(changed) - gained} lost, {len(a) - len(changed)} stayed")  # fmt: skip
    for key in changed[:shown]:
        question = " ".join(key[0].split())
        print(f"    {a[key]['strict']:.3f} -> {b[key]['strict']:.3f}  {a[key]['id']}: {question[-80:]}")  # fmt: skip
    if len(changed) > shown:
        print(f"    and {len(changed) - shown} more; shown={len(changed)} lists them")
