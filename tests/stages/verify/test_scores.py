"""Scores by the verifier and by a user's function: in this process and in others, and each fault of the function."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forked_ranks import run_ranks
from rl_run import make_run, reinforce, run_config

from phimini.model.io.json_files import read_rows
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.parallel.ranks.process import LostWorkerError
from phimini.stages.verify.scorer import Answered, Scorer

SLOW_S = 3.0
FUNCTIONS = f"""
import os, time
SLOW_S = {SLOW_S}
def length(question, answer, response, finish_reason):
    return len(response) * (0.5 if finish_reason == "length" else 1) + len(question) * 100
def even(question, answer, response, finish_reason):
    return 1.5 if len(response) % 2 == 0 else -0.25
def raises(question, answer, response, finish_reason):
    raise KeyError(answer)
def text(question, answer, response, finish_reason):
    return "right"
def infinite(question, answer, response, finish_reason):
    return float("inf")
def huge(question, answer, response, finish_reason):
    return 10**400
def slow(question, answer, response, finish_reason):
    time.sleep(SLOW_S if answer == "slow" else 0)
    return 2 if answer == "slow" else 1
def dies(question, answer, response, finish_reason):
    os._exit(9)
def three(question, answer, response):
    return 1
"""
ITEMS = [
    Answered("1 + 1?", "2", r"\boxed{2}", "stop"),
    Answered("1 + 1?", "2", r"\boxed{3}", "stop"),
    Answered("1 + 1?", "2", r"\boxed{2}", "length"),
] * 7


def scores(scorer: Scorer, items: list[Answered]) -> list[float]:
    return [score().value for score in [scorer.start(item) for item in items]]


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return str(tmp_path / "mine.py")


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_come_in_order(workers: int, file: str) -> None:
    assert scores(Scorer("rlvr.reward", workers=workers), ITEMS) == [1.0, 0.0, 0.0] * 7
    mine = Scorer("rlvr.reward", f"{file}:length", workers)
    assert scores(mine, ITEMS) == [609.0, 609.0, 604.5] * 7


def test_the_verifier_gives_a_reason_and_a_function_none(file: str) -> None:
    for mine, reasons in (
        (None, ["equal", "different", "cut off"]),
        (f"{file}:length", [None] * 3),
    ):
        scorer = Scorer("rlvr.reward", mine)
        assert [scorer.start(item)().reason for item in ITEMS[:3]] == reasons


def test_responses_are_decoded_by_the_workers(file: str) -> None:
    tokenizer = train_tiny_tokenizer([r"1 + 1? \boxed{2}"] * 3, vocab_size=256)
    tokens = [np.array(tokenizer.encode(item.response), np.int32) for item in ITEMS]
    given = [item._replace(response=t) for item, t in zip(ITEMS, tokens, strict=True)]
    for workers in (0, 2):
        scorer = Scorer("rlvr.reward", f"{file}:length", workers, tokenizer.decode)
        assert scores(scorer, given) == [609.0, 609.0, 604.5] * 7
        assert scorer.texts(tokens) == [i.response for i in ITEMS]


def test_an_answer_that_takes_long_delays_no_other(file: str) -> None:
    """The slow one is first, and the workers' start, which takes seconds, is before the clock starts."""
    items = [item._replace(answer="slow" if i == 2 else "2") for i, item in enumerate(ITEMS)]
    scorer = Scorer("rlvr.reward", f"{file}:slow", 2)
    scores(scorer, ITEMS[:8])
    begun = time.monotonic()
    slow, *quick = [scorer.start(item) for item in (items[2], *items[3:])]
    assert [score().value for score in quick] == [1.0] * 18 and time.monotonic() - begun < SLOW_S
    assert slow().value == 2.0 and time.monotonic() - begun >= SLOW_S


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("function", "got"),
    [
        ("raises", "the function raised KeyError('2')"),
        ("text", "the function returned 'right'"),
        ("infinite", "the function returned inf"),
        ("huge", "the function returned 1000"),
        ("three", "takes 3 positional arguments but 4 were given"),
    ],
)
def test_a_function_that_fails_is_named_with_its_question(
    function: str, got: str, workers: int, file: str
) -> None:
    with pytest.raises(ValueError) as caught:
        scores(Scorer("rlvr.reward", f"{file}:{function}", workers), ITEMS)
    text = str(caught.value)
    assert text.startswith(f"rlvr.reward {file}:{function}: expected a finite number")
    assert "'1 + 1?'" in text and got in text


def test_a_worker_that_dies_is_an_error(file: str) -> None:
    with pytest.raises(LostWorkerError, match=r"rlvr\.reward: a process that scores answers died"):
        scores(Scorer("rlvr.reward", f"{file}:dies", 1), ITEMS)


def run_script(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code as a file, which spawned workers can import. Raises TimeoutExpired after a minute."""
    path.write_text(code)
    return subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60)


def test_workers_end_with_a_parent_that_is_killed(file: str) -> None:
    code = (
        "from phimini.stages.verify.scorer import *\n"
        "import os\n"
        "if __name__ == '__main__':\n"
        f"    scorer = Scorer('rlvr.reward', {file + ':length'!r}, 1)\n"
        "    scorer.start(Answered('q', 'a', 'r', 'stop'))()\n"
        "    print(*scorer._pool.processes._processes, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = run_script(Path(file).with_name("killed.py"), code)
    (worker,) = map(int, done.stdout.split())
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} still runs 10 s after its parent was killed")


def test_a_scorer_that_is_collected_while_its_pool_is_given_work_ends(file: str) -> None:
    """The garbage collector may run in any thread, and so inside `submit`, which has the pool's lock."""
    code = (
        "from phimini.stages.verify.scorer import *\n"
        "import gc\n"
        "if __name__ == '__main__':\n"
        f"    scorer = Scorer('rlvr.reward', {file + ':length'!r}, 1)\n"
        "    item = Answered('q', 'a', 'r', 'stop')\n"
        "    scorer.start(item)()\n"
        "    pool, scorer.itself = scorer._pool, scorer\n"
        "    wakeup = pool.processes._executor_manager_thread_wakeup\n"
        "    wakeup.wakeup = lambda wake=wakeup.wakeup: (gc.collect(), wake())\n"
        "    del scorer\n"
        "    pool.ask(item)\n"
        "    print('asked', flush=True)\n"
    )
    done = run_script(Path(file).with_name("collected.py"), code)
    assert (done.returncode, done.stdout) == (0, "asked\n"), done.stderr


def test_stage_4_trains_on_a_reward_of_the_users(file: str, tmp_path: Path) -> None:

    words = [f"rlvr.reward={file}:even", "rollout.judges=1"]
    run = run_config(make_run(tmp_path / "run"), *words)
    (rows,) = run_ranks(reinforce, 1, run, timeout_s=200)
    assert len(rows) == 3
    tables = sorted((tmp_path / "run" / "rlvr" / "rollouts").iterdir())
    written = [row for table in tables for row in read_rows(table, {"reward": float})]
    rewards = {row["reward"] for row in written}
    assert len(tables) == 3 and {row["reason"] for row in written} == {None}
    assert rewards == {1.5, -0.25}, "the verifier gives +1 and -1"
    assert all(row["used_rollouts"] > 0 for row in rows)
