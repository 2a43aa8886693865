r"""The lenient verdict beside ours: math-verify as lighteval uses it, in a worker of its own."""

import pytest

from phimini.stages.verify import symbolic
from phimini.stages.verify.benchmark import judged
from phimini.stages.verify.scorer import Answered, Scorer

LONG = "We know that 3 + 4 = 7 and $x^2 = 9$, so 5/6 of it. " * 2000


@pytest.mark.parametrize(
    ("response", "answer", "strict", "lenient"),
    [
        ("\\boxed{42}", "42", True, True),
        ("\\boxed{6/8}", "3/4", False, True),
        ("<think>it may be \\boxed{42}</think> I do not know.", "42", False, True),
        ("the answer is 42", "42", False, True),
        ("\\boxed{41} no, \\boxed{42}", "42", True, False),
        ("\\boxed{6*7}", "42", False, True),
        ("\\boxed{1/7^30}", "6^30/7^30", False, True),
        ("\\boxed{B}", "B", True, True),
        ("Answer: B", "B", False, True),
        ("A, or rather \\boxed{C}", "A", False, False),
        ("\\boxed{\\frac{\\pi}{2}}", "\\pi/2", True, True),
        ("", "42", False, False),
        (f"{LONG} So \\boxed{{42}}.", "42", True, True),
        ("\\boxed{9^{9^{9^{9}}}}", "\\pi", False, False),
    ],
    ids=range(14),
)
def test_both_verdicts(response: str, answer: str, strict: bool, lenient: bool) -> None:
    got = judged("", answer, response, "stop")
    assert (got.strict, got.lenient) == (strict, lenient), got
    cut = judged("", answer, response, "length")
    assert (cut.strict, cut.lenient, cut.vote, cut.reason) == (False, lenient, None, "cut off")


def test_votes_are_one_for_each_value() -> None:
    votes = [judged("", "42", f"\\boxed{{{x}}}", "stop").vote for x in ("0.5", "\\frac12", "2/4", "x = 1/2", "\\sqrt 2", "\\sqrt2")]  # fmt: skip
    assert votes == ["1/2"] * 4 + ["\\sqrt2"] * 2


def test_a_pool_gives_the_same_verdicts_and_long_responses_are_not_kept() -> None:
    items = [Answered("", "3/4", response, "stop") for response in ("\\boxed{6/8}", LONG, "\\boxed{3/4}")]  # fmt: skip
    here, there = (
        [verdict() for verdict in [scorer.start(item) for item in items]]
        for scorer in (Scorer("t", rule=judged), Scorer("t", workers=1, rule=judged))
    )
    assert here == there == [judged(*item) for item in items]
    assert not [key for key in symbolic.lenient._remembered if key[0] == LONG]
