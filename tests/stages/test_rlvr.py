"""Stage 4 as a whole: its reports of steps without an update and of unused rollouts."""

from pathlib import Path

import pytest
from forked_ranks import RankFailure, run_ranks
from rl_run import make_run, reinforce, run_config

from phimini.model.io.json_files import read_json
from phimini.stages import rlvr
from phimini.stages.config.schema import RunConfig
from phimini.stages.verify import verdict as scorer


def rewarded(run: RunConfig, value: float) -> list[dict]:
    """Give every answer in training the same reward, but not those of the probe."""
    select = rlvr.select_prompts

    def then_equal(*args):
        pool = select(*args)
        scorer.is_right = lambda *answered: value > 0
        return pool

    rlvr.select_prompts = then_equal
    return reinforce(run)


@pytest.mark.parametrize(
    ("value", "words", "said"),
    [
        (1.0, [], "Of 12 groups 0 had no right answer, 12 were too easy"),
        (-1.0, [], "Of 12 groups 12 had no right answer, 0 were too easy"),
        (-1.0, ["rlvr.max_new_tokens=1", "rlvr.truncated=masked", "rlvr.uniform_length=false"], r"and [1-9]\d* were cut off at rlvr.max_new_tokens=1"),
    ],
    ids=["all right", "all wrong", "cut off"],
)  # fmt: skip
def test_a_stage_without_an_update_says_why(
    tmp_path: Path, value: float, words: list[str], said: str
) -> None:
    run = run_config(make_run(tmp_path / "run"), *words)
    with pytest.raises(
        RankFailure, match=f"ValueError.*rlvr: no update was made in 3 steps.*{said}"
    ):
        run_ranks(rewarded, 1, run, value)
    assert not (Path(run.out) / "rlvr" / "summary.json").exists()
    assert not (Path(run.out) / "rlvr" / "model").exists()


def test_too_few_rollouts_for_an_update_are_named(tmp_path: Path) -> None:
    run = run_config(make_run(tmp_path / "run"), "rlvr.min_rollouts=5000")
    with pytest.raises(RankFailure, match=r"no update .* \d\d usable rollouts were left at the end, fewer than rlvr.min_rollouts=5000"):  # fmt: skip
        run_ranks(reinforce, 1, run)


def test_rollouts_that_wait_at_the_end_are_reported(tmp_path: Path) -> None:
    """With 16 rollouts a step and 20 needed, the second of three steps updates, and the third's rollouts wait."""
    run = run_config(make_run(tmp_path / "run"), "rlvr.min_rollouts=20")
    rows = run_ranks(reinforce, 1, run)[0]
    summary = read_json(Path(run.out) / "rlvr" / "summary.json")
    assert [row["waiting"] > 0 for row in rows] == [True, False, True]
    assert summary["waiting"] == rows[-1]["waiting"] == rows[-1]["used_rollouts"]
    assert summary["updates"] == sum("loss" in row for row in rows) == 1
    assert "unused" not in summary
