"""The control arms: start model, data, steps and description of each."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phimini.model.io.chat import encode_example
from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.model.io.json_files import read_rows, write_rows
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.stages import controls as module
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig
from phimini.stages.controls import ARMS, WITHOUT, controls, summary
from phimini.stages.data.token_files import TokenSet
from phimini.stages.run.outputs import write_summary

TOKENIZER = train_tiny_tokenizer(["1+2?"] * 9)
NAMES = ("sft", "rollout_dpo", "rlvr")
ALONE: Any = SimpleNamespace(
    is_main=True, rank=0, world_size=1, barrier=lambda: None,
    all_gather_objects=lambda value: [value], broadcast_object=lambda value: value,
)  # fmt: skip
"""a world of one rank"""


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """Make a run whose stages are marked complete."""
    spent = {"sft": (600, 100.0), "rollout_dpo": (60, 30.0), "rlvr": (40, 120.0)}
    rollouts = [
        {"question": "1+1?", "response": "2<|end|>", "correct": True},
        {"question": "1+3?", "response": "4<|endoftext|>", "correct": True},
        {"question": "1+2?", "response": "4<|end|>", "correct": False},
    ]
    write_rows(tmp_path / "rollout_dpo" / "rollouts" / "000001.jsonl", rollouts)
    TOKENIZER.save(tmp_path / "sft" / "model")
    for stage in ("distill", "tokenize", *NAMES):
        steps, cpu = spent.get(stage, (0, 0.0))
        write_summary(
            tmp_path / stage,
            {"id": stage, "steps": steps, "cpu_seconds": cpu, "seconds": cpu / 2},
        )
    return dataclasses.replace(tiny(), out=str(tmp_path))


def evaluation(run: RunConfig, name: str, mean: list[float]) -> None:
    write_sealed(
        Path(run.out) / "evaluate" / f"{name}.json",
        {"mean_at_8": sum(mean) / len(mean), "ci95": [0.0, 1.0], "per_problem_mean": mean,
         "greedy": {"accuracy": 0.5}, "pass_at_8": 0.9},
    )  # fmt: skip


def test_every_arm_trains_what_its_name_says(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, dict[str, Any]] = {}

    def finish(stage: Any, **what: Any) -> None:
        trained[stage.name] = what
        stage.finish({"steps": what["steps"], "seconds": 1.0, "cpu_seconds": 2.0})

    def fine_tune(run: RunConfig, world: Any, stage: Any, start: str, tokens: Path, *, steps: int):
        finish(stage, start=start, tokens=tokens, steps=steps)

    def reinforce(run: RunConfig, world: Any, stage: Any, start: str):
        finish(stage, start=start, config=run.rlvr, steps=run.rlvr.steps)

    monkeypatch.setattr(module, "fine_tune", fine_tune)
    monkeypatch.setattr(module, "reinforce", reinforce)
    monkeypatch.setattr(module, "evaluate", lambda run, world, name, redo: evaluation(run, name, [0.5, 0.7, 0.6]))  # fmt: skip
    for name in NAMES:
        evaluation(run, name, [0.5, 0.6, 0.4])
    controls(run, ALONE)

    out = Path(run.out)
    assert trained["controls/sft_continued"] == {
        "start": "sft", "tokens": out / "tokenize" / "sft", "steps": 900,
    }  # fmt: skip
    own = trained["controls/rejection_sft"]
    assert (own["start"], own["steps"]) == ("sft", 900)
    rows = own["tokens"].with_suffix(".jsonl")
    assert [r["response"] for r in read_rows(rows, {"response": str})] == ["2", "4"]
    assert [e.tokens.tolist() for e in TokenSet(own["tokens"], rows)] == [
        encode_example(TOKENIZER, *asked)[0] for asked in (("1+1?", "2"), ("1+3?", "4"))
    ]
    no_dpo = trained["controls/rl_without_dpo"]
    assert (no_dpo["start"], no_dpo["steps"]) == ("sft", 50)
    assert no_dpo["config"] == dataclasses.replace(run.rlvr, steps=50)
    for arm, off in WITHOUT.items():
        want = dataclasses.replace(run.rlvr, **off)
        assert want != run.rlvr
        assert trained[f"controls/{arm}"] == {"start": "rollout_dpo", "config": want, "steps": 40}

    arms = read_sealed(out / "controls" / "controls.json")["arms"]
    assert [a["arm"] for a in arms] == [*NAMES, *(f"controls/{a}" for a in (*ARMS, *WITHOUT))]
    assert arms[-1]["gain_over_sft"] == pytest.approx(0.1)
    assert arms[0]["against_rlvr"] == 0.0

    trained.clear()
    controls(run, ALONE)
    assert not trained, "complete arms ran again"


def test_an_incomplete_run_is_named(run: RunConfig) -> None:
    (Path(run.out) / "rlvr" / "summary.json").unlink()
    with pytest.raises(ValueError, match="rlvr is not complete; run `phimini rlvr` first"):
        controls(run, ALONE)


def test_the_summary_pairs_each_arm_with_the_same_problems(run: RunConfig) -> None:
    for name in (*NAMES, *(f"controls/{a}" for a in (*ARMS, *WITHOUT))):
        evaluation(run, name, [0.2, 0.9] if name == "sft" else [0.4, 0.8])
    write = lambda name: write_sealed(Path(run.out) / name / "summary.json", {"steps": 1, "seconds": 1.0, "cpu_seconds": 1.0})  # fmt: skip
    for arm in (*ARMS, *WITHOUT):
        write(f"controls/{arm}")
    rows = {row["arm"]: row for row in summary(run)["arms"]}
    assert rows["rlvr"]["gain_over_sft"] == pytest.approx(0.05)
    assert rows["rlvr"]["gain_ci95"][0] < 0 < rows["rlvr"]["gain_ci95"][1]
    assert rows["controls/sft_continued"]["against_rlvr"] == pytest.approx(0.0)


def test_without_sampled_rollouts_no_arm_starts(run: RunConfig) -> None:
    shutil.rmtree(Path(run.out) / "rollout_dpo" / "rollouts")
    teacher = dataclasses.replace(
        run, rollout_dpo=dataclasses.replace(run.rollout_dpo, pairs="teacher")
    )
    with pytest.raises(ValueError, match="rollouts is missing.*pairs=teacher, not policy"):
        controls(teacher, ALONE)
    assert not (Path(run.out) / "controls").exists()
