"""Scores of a benchmark against numbers by hand; the problem is the unit of every interval."""

import pytest

from phimini.stages.benchmarks.scores import lengths, majority, scores
from phimini.stages.report.intervals import mean_interval, wilson_interval

VERDICTS = {"a": "1111", "b": "1100", "c": "0001", "d": "0000"}
"""of four samples of each problem, by our rule; the lenient one also pays the last sample of d"""


def rows() -> list[dict]:
    return [
        {"problem": problem, "sample": k, "question": "q", "answer": "1", "subject": "odd" if problem in "ac" else "even",
         "level": 0, "response": "", "finish_reason": "length" if (problem, k) == ("d", 0) else "stop", "tokens": 10 * (k + 1),
         "extracted": None, "vote": "1" if right == "1" else f"wrong {k // 2}", "strict": right == "1", "reason": "equal",
         "lenient": right == "1" or (problem, k) == ("d", 3)}
        for problem, verdicts in VERDICTS.items()
        for k, right in enumerate(verdicts)
    ]  # fmt: skip


def test_means_and_their_intervals_are_of_problems() -> None:
    found = scores(rows(), [1, 2, 4])
    assert (found["num_questions"], found["k"]) == (4, 4)
    assert found["strict"] == list(mean_interval([1.0, 0.5, 0.25, 0.0], 4))
    assert found["lenient"][0] == 0.5 and found["strict"][0] == 7 / 16
    low, high = wilson_interval(7, 16)
    assert found["strict"][2] - found["strict"][1] > high - low, "four samples are no four problems"


def test_pass_at_k_is_unbiased() -> None:
    found = scores(rows(), [1, 2, 4])["pass_at"]
    assert found["1"]["strict"][0] == pytest.approx(7 / 16)
    # Of two samples drawn without replacement, neither is right: b 1/6, c 3/6.
    assert found["2"]["strict"][0] == pytest.approx((1 + 5 / 6 + 3 / 6 + 0) / 4)
    assert found["4"]["strict"][0] == pytest.approx(3 / 4)
    assert found["4"]["lenient"][0] == 1


def test_the_most_frequent_answer_decides_and_a_tie_is_shared() -> None:
    groups = {p: [row for row in rows() if row["problem"] == p] for p in VERDICTS}
    # b: two right ones against two equal wrong ones; c: two equal wrong ones lead.
    assert [majority(groups[p]) for p in VERDICTS] == [1, 0.5, 0, 0]
    silent = [row | {"vote": None} for row in groups["a"]]
    assert majority(silent) == 0


def test_lengths_and_groups() -> None:
    found = scores(rows(), [1])
    assert found["truncated"] == 1 / 16
    assert {kind: of["n"] for kind, of in lengths(rows()).items()} == {"right": 7, "wrong": 8, "cut off": 1}  # fmt: skip
    assert found["tokens"]["cut off"]["mean"] == 10
    assert {name: (of["n"], of["strict"][0]) for name, of in found["subjects"].items()} == {
        "odd": (2, 0.625), "even": (2, 0.25)
    }  # fmt: skip
    assert found["levels"] == {}, "one level is no group"
