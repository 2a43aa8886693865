"""reasoning-gym as a source of questions, through a stand-in with its interface and, if installed, the real package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from phimini.model.io.json_files import read_rows
from phimini.stages.cli import main
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.data.arithmetic_problems import generate_problems
from phimini.stages.data.gym_prompts import gym_prompts
from phimini.stages.data.row_fields import PROBLEM_FIELDS
from phimini.stages.distill import distill
from phimini.stages.verify.verdict import verify

SMALL = ["distill.num_problems=20", "distill.num_heldout=21", "distill.num_validation=21", "distill.num_prompts=12"]  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for reasoning-gym 0.1.25's `create_dataset`: an indexable data set, ValueError for a wrong name."""

    def create_dataset(name: str, size: int, seed: int) -> list[dict]:
        if name not in ("sums", "grids", "copies"):
            raise ValueError(f"Dataset '{name}' not registered")
        answer = lambda i: (
            str(i + seed) if name == "sums" else None
        )  # as tasks with a scorer of their own
        if name == "copies":
            held = generate_problems(tiny().distill.heldout_seed, 21, balanced=True)
            entries = [{"question": f"Please: {p.question}", "answer": p.answer} for p in held[:6]]
            return entries + create_dataset("sums", size - 6, seed)
        return [{"question": f"{name}: {i} + {seed} =", "answer": answer(i), "metadata": {}} for i in range(size)]  # fmt: skip

    module = ModuleType("reasoning_gym")
    module.create_dataset = create_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_questions_are_different_verifiable_and_of_the_seed(stand_in: None) -> None:
    rows = gym_prompts(("sums",), 10, seed=1)
    assert len({row["question"] for row in rows}) == len(rows) == 10
    assert all(verify(f"\\boxed{{{row['answer']}}}", row["answer"]) for row in rows)
    assert rows == gym_prompts(("sums",), 10, seed=1) != gym_prompts(("sums",), 10, seed=2)


def test_a_task_named_twice_and_more_tasks_than_questions(stand_in: None) -> None:
    once = gym_prompts(("sums",), 10, seed=1)
    assert gym_prompts(("sums", "sums"), 10, seed=1) == once
    assert gym_prompts(("sums", "grids"), 1, seed=1) == once[:1]


@pytest.mark.parametrize(
    ("task", "message"),
    [("nope", "distill.gym_tasks: 'nope': Dataset 'nope' not registered"), ("grids", "0 of 32 questions have an answer that can be verified, 3 are wanted")],
)  # fmt: skip
def test_a_task_that_cannot_serve_is_named(stand_in: None, task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym_prompts((task,), 3, seed=1)


def test_the_stage_writes_them_without_what_is_held_out(stand_in: None, tmp_path: Path) -> None:
    run = override(tiny(), [f"out={tmp_path}", *SMALL, "distill.gym_tasks=copies"])
    offered = gym_prompts(("copies",), 12, run.seed)
    prompts = read_rows(distill(run) / "prompts.jsonl", PROBLEM_FIELDS)
    assert [row["question"].startswith("Please") for row in offered] == [True] * 6 + [False] * 6
    assert prompts == offered[6:]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'phimini\[prompts\]'"):
        gym_prompts(("sums",), 3, seed=1)


@pytest.mark.optin
@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra `prompts`"
)
def test_the_real_package(tmp_path: Path) -> None:
    words = ["distill", "tiny", f"out={tmp_path}", *SMALL, "distill.gym_tasks=chain_sum,gcd"]
    assert main(words) == 0
    prompts = read_rows(tmp_path / "distill" / "prompts.jsonl", PROBLEM_FIELDS)
    assert {row["family"] for row in prompts} == {"chain_sum", "gcd"}
    assert all(verify(f"\\boxed{{{row['answer']}}}", row["answer"]) for row in prompts)
