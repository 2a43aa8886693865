"""math-verify in its worker process: right answers, hard limits, any thread, any fork."""

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from phimini.stages.verify.symbolic import SymbolicVerifier, second, shared
from phimini.stages.verify.verdict import judge

EQUAL = {
    r"2\sqrt{3}": [
        r"\sqrt{12}",
        r"2 \sqrt 3",
        r"$2\sqrt{3}$",
        r"2\sqrt{3}\text{ cm}",
        r"\sqrt 3 \cdot 2",
        r"x = 2\sqrt{3}",
    ],
    "x+1": ["1+x", r"\left(x + 1\right)"],
    "x^2-1": ["(x-1)(x+1)"],
    r"\frac{1}{2^{100}}": ["2^{-100}"],
    "x=1,y=2": ["y=2, x=1"],
    r"\frac{\pi}{2}": [r"\pi/2", r"\frac{1}{2}\pi"],
    r"\frac{-1+\sqrt{5}}{2}": [r"\frac{\sqrt5-1}{2}", r"\frac{\sqrt 5-1}{2}"],
    r"1+2\sqrt{3}": [r"1 + 2 \sqrt 3", r"\sqrt{12}+1"],
    "(x-1)(x+1)": ["x^2-1", "-1+x^2"],
    r"\frac{2+\pi}{2}": [r"\pi/2+1"],
    r"(1,\sqrt{2})": [r"(1,\sqrt2)"],
    r"[0,\infty)": [r"[0, \infty)"],
    r"1-\frac{1}{\mathrm{e}}": [r"1-\frac{1}{e}", r"1-e^{-1}"],
    r"\mathrm{e}^2": ["e^2", r"\text{e}^2"],
    "14-i": ["14.0-1.0i", r"14-\mathrm{i}", "-i+14"],
    r"2+3\mathrm{i}": ["2+3i", r"2+3\text{i}"],
    r"\mathrm{e}^{\mathrm{i}\pi/3}": [r"\frac12+\frac{\sqrt3}{2}i"],
    r"\arctan 2": [r"\operatorname{arctan}(2)", r"\mathrm{arctan} 2", r"\boldsymbol{\arctan 2}"],
    r"\frac{3\pi}{4}": [r"\arctan 2+\arctan 3"],
    r"3\pm2\sqrt2": [r"3+2\sqrt2, 3-2\sqrt2", r"3-2\sqrt2 \text{ and } 3+\sqrt8"],
    r"\frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}": [
        r"\frac{1\pm\sqrt5}{2}",
        r"x=\frac{1\pm\sqrt{5}}{2}",
    ],
    r"\{1\pm\sqrt5,-2\}": [r"\{-2,1+\sqrt5,1-\sqrt5\}"],
    "a,b,c": ["a, b, and c", "c and a and b", r"a, b \text{ and } c"],
    r"\{x^2-1,x\}": [r"\{(x-1)(x+1), x\}"],
    "y=2x+3": ["2x-y+3=0", "y-2x=3", "y=3+2x", "2x+3", "2y=4x+6"],
    "2x+3y=6": [r"y=-\frac23x+2", r"\frac{x}{3}+\frac{y}{2}=1", "3y+2x=6"],
    "x^2-y=0": ["y=x^2"],
    "x=y": ["y=x"],
    "f(x)=2x": ["2x", "f(x)=x+x"],
    r"\left(\frac56\right)^{25}": [r"\frac{5^{25}}{6^{25}}"],
    r"1-\frac{1}{2^{60}}": ["1-2^{-60}"],
    r"\sqrt{2}": ["1.41421356", r"\sqrt 2", "√2", r"\frac{2}{\sqrt{2}}"],
    r"\frac{x+1}{2}": ["0.5x+0.5", "½(x+1)"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
}
DIFFERENT = {
    r"2\sqrt{3}": [r"\sqrt{11}", "3.4641", r"\sqrt{12}, 1", "2", "", "yes", r"\text{two root three}", r"$1$ or $2\sqrt3$", r"5=2\sqrt3", r"2\sqrt3\mathrm{i}",
                   r"2\sqrt3x"],
    "x+1": ["x-1", "x+1+2-2", "y+1"],
    r"\frac{6^{30}}{7^{30}}": [r"\frac{1}{7^{30}}", r"\frac{6^{30}+1}{7^{30}}"],
    r"1-\frac{1}{2^{61}}": [r"1-\frac{1}{2^{60}}"],
    r"2^{-61}x": ["2^{-60}x", "0x"],
    r"\frac{\sqrt2}{2^{61}}": [r"\frac{\sqrt2}{2^{60}}"],
    r"(\sqrt2,\frac{1}{2^{99}})": [r"(\sqrt{2}, \frac{1}{2^{100}})"],
    r"[10^{-21},\sqrt2]": [r"[10^{-20}, \sqrt2]", r"[10^{-21},\sqrt2)"],
    r"\{2^{-61}\sqrt2,x\}": [r"\{2^{-60}\sqrt2, x\}"],
    r"(0,10^{-21})\cup(\sqrt2,3)": [r"(0,10^{-20})\cup(\sqrt2,3)"],
    r"\begin{pmatrix}10^{-21}\sqrt2\\1\end{pmatrix}": [r"\begin{pmatrix}10^{-20}\sqrt2\\1\end{pmatrix}"],
    "y=10^{-21}x": ["y=10^{-20}x"],
    r"10^{-21}+i": ["10^{-20}+i", "i"],
    r"(\frac13,\sqrt2)": [r"(0.33333333,\sqrt2)"],
    r"640320^3+744": [r"e^{\pi\sqrt{163}}"],
    r"1+e^{-101}": ["1+e^{-100}", "1"],
    "2i": ["2j", r"2\mathrm{e}", "2"],
    r"x=\sqrt{2}": [r"y=\sqrt{2}", r"2x=2\sqrt2", r"x^2=2", r"x-\sqrt2=0"],
    "y=2x+3": ["2x-y+4=0", "z=2x+3", "2x+4", "y=2x-3", "3"],
    "x+y=3": ["3", "x-y=3", "x+y=4"],
    "x=1,y=2": ["x=2,y=1"],
    r"3\pm2\sqrt2": [r"3+2\sqrt2", r"3\pm2\sqrt3", r"3+2\sqrt2,3+2\sqrt2"],
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
        assert second.compare(rf"\boxed{{{response}}}", answer) != "different", response


@pytest.mark.parametrize("answer", DIFFERENT)
def test_another_expression(answer: str) -> None:
    for response in DIFFERENT[answer]:
        verdict = judge(f"so \\boxed{{{response}}}", answer)
        assert not verdict.correct, (response, verdict)
        assert second.compare(rf"\boxed{{{response}}}", answer) != "equal", response


BOMBS = [
    r"2^{2^{2^{2^{2^2}}}}", r"\frac{1}{9^{9^9}}", "(" * 400 + "x" + ")" * 400, r"\cos(10^{10^8})",
    r"\lfloor 10^{10^9}\rfloor", "x^" * 450 + "x", r"(x+1)^{10^{10}}",
]  # fmt: skip


def test_a_bomb_costs_its_limit_once_and_the_next_answer_is_right(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")  # so that a worker runs
    worker, given_up, asked = shared._worker, shared.num_given_up, shared.num_asked
    assert worker is not None
    before = cpu_seconds(worker.pid)
    verdict = judge(r"\boxed{9^{9^{9^9}}}", r"\sqrt{2}")
    assert (verdict.correct, verdict.reason) == (False, "timed out")
    assert shared.num_given_up == given_up + 1
    assert "verify: gave up on '9^{9^{9^9}}' against '\\\\sqrt{2}': timed out" in caplog.text
    assert judge(r"\boxed{\sqrt{12}}", r"3\sqrt{3}").reason == "different"
    assert shared._worker is worker, "a bomb needs no new worker"
    assert 0.5 < cpu_seconds(worker.pid) - before < 1.2, "CPU seconds for two comparisons"
    assert judge(r"\boxed{9^{9^{9^9}}}", r"\sqrt{2}") == verdict
    assert (shared.num_given_up, shared.num_asked) == (given_up + 1, asked + 2), "asked once"


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_no_bomb_costs_more_than_a_second(bomb: str) -> None:
    assert judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
    assert shared._worker is not None
    own, before = time.process_time(), cpu_seconds(shared._worker.pid)
    for response, answer in ((bomb, r"\pi"), (r"\pi", bomb)):
        assert not judge(rf"\boxed{{{response}}}", answer)
    spent = time.process_time() - own + cpu_seconds(shared._worker.pid) - before
    assert spent < 2.0, f"two comparisons took {spent:.2f} CPU seconds"


def test_a_child_that_crashes_is_replaced_and_named() -> None:
    """A child ended by anything but its limit gets a second try, then the answer is too large."""
    verifier = SymbolicVerifier()
    assert verifier.compare(r"\sqrt{12}", r"2\sqrt{3}") == "equal"
    assert verifier._worker is not None
    for child in children_of(verifier._worker.pid):
        os.kill(child, signal.SIGKILL)
    assert verifier.compare(r"\sqrt{12}", r"3\sqrt{3}") == "different"
    verifier.close()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and its children, also of ended ones."""
    own = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = sum(int(field) for field in own[11:15]) / os.sysconf("SC_CLK_TCK")
    return ticks + sum(cpu_seconds(child) for child in children_of(pid))


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
    monkeypatch.setattr("phimini.stages.verify.symbolic.shared", SymbolicVerifier())
    assert judge(r"\boxed{42}", "42")
    assert judge(r"\boxed{2\sqrt 3}", r"2\sqrt 3")  # the same text needs nobody's help
    with pytest.raises(
        ImportError, match="symbolic answer needs math-verify.*pip install math-verify"
    ):
        judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
