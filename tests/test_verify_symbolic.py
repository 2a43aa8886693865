"""math-verify in its own process: right answers, hard limits, any thread, any fork."""

import importlib.util
import os
import resource
import threading
from pathlib import Path

import pytest

from phimini.stages.verify import judge
from phimini.stages.verify_symbolic import SymbolicVerifier, shared

EQUAL = {
    r"2\sqrt{3}": [
        r"\sqrt{12}",
        r"2 \sqrt 3",
        r"$2\sqrt{3}$",
        r"2\sqrt{3}\text{ cm}",
        r"x = 2\sqrt{3}",
    ],
    "x+1": ["1+x", r"\left(x + 1\right)"],
    "x^2-1": ["(x-1)(x+1)"],
    r"\frac{1}{2^{100}}": ["2^{-100}"],
    "x=1,y=2": ["y=2, x=1"],
    r"\frac{\pi}{2}": [r"\pi/2", r"\frac{1}{2}\pi"],
    r"\frac{-1+\sqrt{5}}{2}": [r"\frac{\sqrt5-1}{2}"],
    r"1+2\sqrt{3}": [r"1 + 2 \sqrt 3", r"\sqrt{12}+1"],
    "(x-1)(x+1)": ["x^2-1", "-1+x^2"],
    r"\frac{2+\pi}{2}": [r"\pi/2+1"],
    r"(1,\sqrt{2})": [r"(1,\sqrt2)"],
    r"[0,\infty)": [r"[0, \infty)"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
}
DIFFERENT = {
    r"2\sqrt{3}": [r"\sqrt{11}", "3.4641", r"\sqrt{12}, 1", "2", "", "yes", r"\text{two root three}", r"$1$ or $2\sqrt3$"],
    "x+1": ["x-1", "x+1+2-2", "y+1"],
    r"(1,\sqrt{2})": [r"(\sqrt{2},1)", r"[1,\sqrt2]"],
    r"\frac{1}{2^{100}}": [r"\frac{1}{2^{98}}", "0", "0.0000001"],
    r"\frac{\pi}{10^7}": ["0.0000003"],
    r"\frac{\pi}{2}": ["1.5708", r"\int_0^{\pi/2} 1 dx", r"\pi"],
}  # fmt: skip


@pytest.mark.parametrize("answer", EQUAL)
def test_the_same_expression(answer: str) -> None:
    for response in EQUAL[answer]:
        verdict = judge(f"so \\boxed{{{response}}}", answer)
        assert verdict.correct, (response, verdict)


@pytest.mark.parametrize("answer", DIFFERENT)
def test_another_expression(answer: str) -> None:
    for response in DIFFERENT[answer]:
        verdict = judge(f"so \\boxed{{{response}}}", answer)
        assert not verdict.correct, (response, verdict)


def test_a_bomb_ends_counted_and_logged_and_the_next_answer_is_right(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")  # so that a worker runs
    assert shared._worker is not None
    worker_before = cpu_seconds(shared._worker.pid)
    before, given_up = resource.getrusage(resource.RUSAGE_CHILDREN), shared.num_given_up
    verdict = judge(r"\boxed{9^{9^{9^9}}}", r"\sqrt{2}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (verdict.correct, verdict.reason) == (False, "timed out")
    lifetime = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 0.5 < lifetime - worker_before < 1.5, "CPU seconds for one comparison"
    assert shared.num_given_up == given_up + 1
    assert "verify: gave up on '9^{9^{9^9}}'" in caplog.text, "a time-out must not be silent"
    assert judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}"), "the next question needs a new worker"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_threads_ask_in_turn() -> None:
    """math-verify's own limit raises outside the main thread."""
    answers = [rf"{k}\sqrt{{3}}" for k in range(2, 8)]
    verdicts: dict[str, bool] = {}

    def ask(k: int) -> None:
        verdicts[answers[k - 2]] = judge(rf"\boxed{{\sqrt{{{3 * k * k}}}}}", answers[k - 2]).correct

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert verdicts == dict.fromkeys(answers, True)


def test_a_fork_does_not_read_its_parents_answers() -> None:
    assert judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
    worker = shared._worker
    pid = os.fork()
    if pid == 0:
        fresh = shared._worker is None
        right = judge(r"\boxed{\sqrt{27}}", r"3\sqrt{3}").correct
        apart = shared._worker is not worker
        shared.close()
        os._exit(0 if fresh and right and apart else 1)
    assert judge(r"\boxed{\sqrt{13}}", r"2\sqrt{3}").reason == "different"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert shared._worker is worker and worker is not None and worker.poll() is None


def test_a_worker_that_was_killed_from_outside_is_replaced() -> None:
    assert judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
    assert shared._worker is not None
    shared._worker.kill()
    shared._worker.wait()
    assert judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")


def test_without_math_verify_a_symbolic_answer_is_an_error_and_a_number_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name)
    )
    monkeypatch.setattr("phimini.stages.verify_symbolic.shared", SymbolicVerifier())
    assert judge(r"\boxed{42}", "42")
    assert judge(r"\boxed{2\sqrt 3}", r"2\sqrt 3")  # the same text needs nobody's help
    with pytest.raises(
        ImportError, match="symbolic answer needs math-verify.*pip install math-verify"
    ):
        judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
