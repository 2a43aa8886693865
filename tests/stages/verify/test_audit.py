r"""The second check of verdicts: its own reading of answers, its limits, and that it finds faults of the first."""

import json
import subprocess
import sys

import pytest

from phimini.stages.verify import audit, verdict
from phimini.stages.verify.scorer import Answered, Scorer

RIGHT = [
    ("42", "42"), ("1,000", "1000"), (r"\frac{3}{7}", "3/7"), ("½", "0.5"), ("1½", r"\frac32"), ("４２", "42"), (r"50\%", "0.5"),
    (r"\sqrt{12}", r"2\sqrt{3}"), ("(x-1)(x+1)", "x^2-1"), (r"\frac{\sqrt5-1}{2}", r"\frac{-1+\sqrt{5}}{2}"), ("x=5", "5"),
    (r"(3, \pi/2)", r"\left(3,\frac{\pi}{2}\right)"), (r"1, 2", r"\{2, 1\}"), (r"\pm 5", "5,-5"), ("(B)", r"\text{B}"), (r"42\text{ cm}", "42"),
    (r"\tfrac12", "1/2"), (r"2\sin^2 x+2\cos^2 x+y-y", "2"), ("e^{2i}", r"\mathrm{e}^{2\mathrm{i}}"),
]  # fmt: skip
WRONG = [
    ("43", "42"), ("4.2", "42"), ("1,000", "100"), (r"\frac{7}{3}", "3/7"), (r"\sqrt{11}", r"2\sqrt{3}"), ("x^2+1", "x^2-1"), (r"(\pi/2, 3)", r"(3,\pi/2)"),
    ("1,3", "1,2"), ("A", "B"), (r"\frac{1}{7^{30}}", r"\frac{6^{30}}{7^{30}}"), ("", "42"),
]  # fmt: skip
UNDECIDED = [
    ("6*7", "42"), ("2/4", "1/2"), (r"\frac{84}{2}", "42"), ("x<3", r"(-\infty,3)"), ("2x=84", "42"), (r"42\text{ million}", "42"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("5e-1", "0.5"), ("4 2", "42"), (r"42\text{ cm}", r"42\text{ m}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("response", "answer", "equal"),
    [(*pair, verdict) for table, verdict in ((RIGHT, True), (WRONG, False), (UNDECIDED, None)) for pair in table],
)  # fmt: skip
def test_answers(response: str, answer: str, equal: bool | None) -> None:
    assert audit.are_equal(rf"So \boxed{{{response}}}.", answer) is equal


@pytest.mark.parametrize(
    ("response", "equal"),
    [
        (r"<think>it may be \boxed{42}</think> I do not know.", False), (r"<think>\boxed{41}</think> \boxed{42}", True),
        (r"it may be \boxed{42}</think> no", False), (r"<think>\boxed{42}", False), (r"\boxed{42} <think>\boxed{41}", True),
        (r"\boxed{42} or \boxed{41", False), (r"\boxed{ hm \boxed{42}", True), (r"\boxed{\boxed{42}}", True), (r"\boxed 42", True),
        (r"\boxed ４２", True), ("42", False), (r"\boxed{42\}", False), (r"\boxed{41} \boxed{42}", True), (r"\boxed{42} \boxed{41}", False),
    ],
)  # fmt: skip
def test_the_box_that_counts(response: str, equal: bool) -> None:
    assert audit.are_equal(response, "42") is equal
    assert verdict.verify(response, "42") == equal, "the first check"


@pytest.mark.parametrize("workers", [0, 1])
def test_the_scorer_asks_it_beside_the_score_and_ends_a_bomb(workers: int) -> None:
    scorer = Scorer("rlvr.reward", workers=workers)
    items = [
        Answered("?", "42", r"\boxed{42}", "stop"),
        Answered("?", "42", r"\boxed{42}", "length"),
        Answered("?", "42", r"\boxed{6*7}", "stop"),
        Answered("?", r"\sqrt2", r"\boxed{9^{9^{9^9}}}", "stop"),
        Answered("?", "42", r"\boxed{41}", "stop"),
    ]
    waiting = [scorer.second(item) for item in items]
    assert scorer.start(items[0])().value == 1.0
    assert [wait() for wait in waiting] == ["right", "wrong", "undecided", "undecided", "wrong"]


def test_it_shares_no_code_with_the_verdict() -> None:
    """Nor with math-verify: a fault of one cannot be in the other."""
    code = (
        "import sys, phimini.stages.verify.audit\n"
        "names = [n for n in sys.modules if n.startswith('phimini.stages.verify.') or 'math_verify' in n or 'latex2sympy' in n]\n"
        "import json; print(json.dumps(sorted(names)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == [
        "phimini.stages.verify.audit",
        "phimini.stages.verify.audit_parser",
    ]
