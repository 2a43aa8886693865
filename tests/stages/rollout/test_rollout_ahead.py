"""Stage 4 with prefetch, and the local engine instead of vLLM's: staleness, and the check of mismatch."""

from pathlib import Path
from typing import Any

import pytest
from fault_runs import interrupt
from forked_ranks import RankFailure, run_ranks
from rl_run import make_run, reinforce, run_config

from phimini.stages import rlvr
from phimini.stages.config.schema import RunConfig
from phimini.stages.rl import groups
from phimini.stages.rl import loss as policy_head
from phimini.stages.rollout.engine import LocalEngine

AHEAD = ("rollout.asynchronous=true", "rlvr.steps=4")


class AtOnce:
    """A prefetch that finishes the next step's answers before this step trains, all from the same weights."""

    def __init__(self, world: Any, action: Any, told: Any) -> None:
        self._result = action()

    def result(self) -> Any:
        return self._result


def ahead(run: RunConfig, factor: float = 1.0) -> tuple[list[dict], set[str]]:
    """Return the log and the modes of the importance weights; from update 2 the engine's weights are times `factor`."""
    modules: Any = rlvr, policy_head, groups
    modules[0].build_engine = lambda run, config, world: LocalEngine(config, world, 16)
    modules[2].Background = AtOnce
    LocalEngine.on_main = property(lambda engine: engine)  # pyright: ignore[reportAttributeAccessIssue]
    sync, weights, modes = LocalEngine.sync, policy_head.importance_weights, set()

    def misled(engine: LocalEngine, model: Any) -> None:
        sync(engine, model)
        if model.num_updates > 1:
            for parameter in engine._model.parameters():
                parameter.data.mul_(factor)

    def noted(d_M: Any, counts_M: Any, mode: str, **more: Any) -> Any:
        modes.add(mode)
        return weights(d_M, counts_M, mode, **more)

    LocalEngine.sync = misled  # pyright: ignore[reportAttributeAccessIssue]
    modules[1].importance_weights = noted
    return reinforce(run), modes


@pytest.mark.parametrize("partial", [False, True], ids=["one-step-off", "partial"])
def test_every_update_measures_answers_of_its_own_weights(tmp_path: Path, partial: bool) -> None:
    run = run_config(make_run(tmp_path / "run"), *AHEAD, f"rollout.partial={partial}")
    rows, modes = run_ranks(ahead, 1, run)[0]
    updates = [row for row in rows if "max_age" in row]
    assert len(updates) == 4 and [row["max_age"] for row in updates] == [0, 1, 1, 1]
    for row in updates:
        assert 0 < row["mismatch"] <= 1e-5 and row["mismatch_max"] <= 1e-4
    assert modes == {"token_truncated"}, "the default, where answers are of older weights"


def test_wrong_weights_stop_a_run_whose_answers_are_still_under_way(tmp_path: Path) -> None:
    run = run_config(make_run(tmp_path / "run"), *AHEAD, "rollout.partial=true")
    with pytest.raises(RankFailure, match="MismatchError.*more than the alarm level"):
        run_ranks(ahead, 1, run, 1.1)


def test_a_killed_run_goes_on_with_the_answers_that_were_ahead(tmp_path: Path) -> None:
    """Those of step 3 are of the weights before the update that the checkpoint of step 2 has."""
    saved = ("rlvr.checkpoint_every=1", "background_checkpoints=false")
    whole, run = (
        run_config(make_run(tmp_path / name), *AHEAD, *saved) for name in ("whole", "killed")
    )

    def killed(run: RunConfig) -> None:
        interrupt("rlvr", 2)()
        ahead(run)

    run_ranks(ahead, 1, whole)
    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(killed, 1, run)
    rows, _ = run_ranks(ahead, 1, run)[0]
    assert [row["max_age"] for row in rows] == [0, 1, 1, 1]
    for name in (*(f"rollouts/00000{n}.parquet" for n in (1, 2, 3, 4)), "model/model.safetensors"):
        one, other = (Path(each.out) / "rlvr" / name for each in (whole, run))
        assert one.read_bytes() == other.read_bytes(), name
