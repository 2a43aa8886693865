"""Scores of one benchmark from its samples: means with intervals, curves, majorities, lengths and groups.

The unit of every interval is the problem (`report.intervals`): k samples of one question are not k questions.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from phimini.model.io.json_files import Row
from phimini.stages.report.intervals import mean_interval, pass_at_k
from phimini.stages.run.audits import Audited, audit_of

RULES = ("strict", "lenient")
RESULTS = "benchmarks.json"


def scores(rows: Sequence[Row], pass_at: Sequence[int]) -> dict[str, Any]:
    """Return all scores of a benchmark from the rows of its samples; as many samples of each problem."""
    problems: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        problems[row["problem"]].append(row)
    groups = list(problems.values())
    k = len(groups[0])
    right = {rule: np.array([sum(r[rule] for r in group) for group in groups]) for rule in RULES}
    curve = lambda rule, n: [pass_at_k(k, int(count), n) for count in right[rule]]
    return {
        "num_questions": len(groups),
        "k": k,
        **{rule: interval(right[rule] / k, k) for rule in RULES},
        "pass_at": {str(n): {rule: interval(curve(rule, n), k) for rule in RULES} for n in pass_at},
        "majority": interval([majority(group) for group in groups], 1),
        "truncated": float(np.mean([row["finish_reason"] == "length" for row in rows])),
        "tokens": lengths(rows),
        "subjects": by_group(groups, k, lambda row: row["subject"] or "(none)"),
        "levels": by_group(groups, k, lambda row: str(row["level"])),
        "problems": [
            {"id": group[0]["problem"], "question": group[0]["question"], "answer": group[0]["answer"]}
            | {rule: int(right[rule][i]) for rule in RULES}
            for i, group in enumerate(groups)
        ],
        "examples": examples(rows),
        "audit": audit_of([
            (row | {"id": f"{row['problem']}/{row['sample']}"}, Audited(row["strict"], row["second"]))
            for row in rows if row.get("second") is not None
        ]),
    }  # fmt: skip


def examples(rows: Sequence[Row]) -> list[Row]:
    """Return the first sample of each pair of verdicts, for the page; the middle of a long response is left out."""
    found: dict[tuple[bool, ...], Row] = {}
    for row in rows:
        found.setdefault(tuple(row[rule] for rule in RULES), row)
    fields = ("question", "answer", "tokens", "finish_reason", "reason", *RULES)
    shortened = lambda text: text if len(text) <= 4000 else f"{text[:2000]}\n[...]\n{text[-2000:]}"
    return [{f: row[f] for f in fields} | {"response": shortened(row["response"])} for row in found.values()]  # fmt: skip


def interval(values: Iterable[Any], num_samples: int) -> list[float]:
    """Return mean, low and high of per-problem values, clustered by problem; a single problem has no interval."""
    values = [float(value) for value in values]
    return list(mean_interval(values, num_samples)) if len(values) > 1 else values


def majority(group: Sequence[Row]) -> float:
    """Return the share of the most frequent answers to a problem that are right by our rule: 0 or 1 but for a tie.

    Responses without a boxed answer, and those that were cut off, have no vote.
    """
    votes = Counter(row["vote"] for row in group if row["vote"] is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leading = [vote for vote, count in votes.items() if count == most]
    is_right = [any(row["strict"] for row in group if row["vote"] == vote) for vote in leading]
    return sum(is_right) / len(leading)


def lengths(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return number, mean and median of the sampled tokens of right, wrong and cut-off responses."""
    tokens: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        of_whole = "right" if row["strict"] else "wrong"
        tokens["cut off" if row["finish_reason"] == "length" else of_whole].append(row["tokens"])
    return {
        verdict: {"n": len(each), "mean": float(np.mean(each)), "median": float(np.median(each))}
        for verdict, each in tokens.items()
    }


def by_group(
    groups: Sequence[Sequence[Row]], k: int, group_of: Callable[[Row], str]
) -> dict[str, dict[str, Any]]:
    """Return the number of problems and both means of each subject or level; no group if all are of one."""
    found: dict[str, list[Sequence[Row]]] = defaultdict(list)
    for group in groups:
        found[group_of(group[0])].append(group)
    if len(found) == 1:
        return {}
    return {
        name: {"n": len(members)}
        | {rule: interval([np.mean([r[rule] for r in m]) for m in members], k) for rule in RULES}
        for name, members in sorted(found.items())
    }
