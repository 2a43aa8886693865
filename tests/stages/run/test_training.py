"""The schedule of a stage from its settings, also with skipped updates of stage 4."""

import types
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import RankFailure, run_ranks
from parity_cases import config
from rl_run import even_length, make_run, reinforce, run_config

from phimini.parallel.megatron.builder import build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.stages.config.schema import OptimizerSettings
from phimini.stages.rl.remedies import temperature_at
from phimini.stages.run.training import start_optimizer


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_last_step_of_a_stage_of_any_length_trains(decay: Any) -> None:
    """Down to stages of one step, with any share of warm-up."""

    def rank() -> list[tuple[int, float, float, float]]:
        world = initialize(Layout(), config())
        run: Any = types.SimpleNamespace(distributed_optimizer=False)
        found = []
        for steps in (1, 2, 5):
            for warmup in (0.0, 0.1, 0.9):
                model = build_model(config(), world, seed=0)
                settings = OptimizerSettings(lr=1e-3, decay=decay, warmup_ratio=warmup)
                optimizer = start_optimizer(run, model, settings, steps)
                for _ in range(steps):
                    before = [p.detach().clone() for _, p in model.named_parameters()]
                    optimizer.zero_grad()
                    for _, p in model.named_parameters():
                        p.main_grad.fill_(1e-3)  # pyright: ignore[reportAttributeAccessIssue]
                    lr = optimizer.step().lr
                after = [p.detach() for _, p in model.named_parameters()]
                moved = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))  # pyright: ignore[reportPossiblyUnboundVariable]
                found.append((steps, warmup, lr, moved))  # pyright: ignore[reportPossiblyUnboundVariable]
        return found

    (found,) = run_ranks(rank, 1, timeout_s=200)
    assert len(found) == 9
    for steps, warmup, lr, moved in found:
        assert lr > 0 and moved > lr / 2, (steps, warmup)
    assert {lr for steps, _, lr, _ in found if steps == 1} == {1e-3}


def test_skipped_updates_move_learning_rate_and_temperature_alike(tmp_path: Path) -> None:
    """Both follow the steps, and steps with too few rollouts for an update count too."""
    settings = [
        "rlvr.steps=6", "rlvr.min_rollouts=17", "rlvr.optimizer.decay=linear", "rlvr.optimizer.lr=1e-3",
        "rlvr.start_temperature=1.0", "rlvr.end_temperature=0.6",
    ]  # fmt: skip
    run = run_config(make_run(tmp_path / "run"), *settings)
    (rows,) = run_ranks(reinforce, 1, run, timeout_s=200)
    updated = [step for step, row in enumerate(rows) if "lr" in row]
    assert 0 < len(updated) < 6 and updated[-1] > len(updated) - 1, "an update after a skipped one"
    for step, row in enumerate(rows):
        assert row["temperature"] == pytest.approx(temperature_at(step, 6, 1.0, 0.6))
        if step in updated:
            assert row["lr"] == pytest.approx(1e-3 * (1 - step / 6))


def test_a_stage_resumed_after_a_skipped_update_has_the_same_steps(tmp_path: Path) -> None:
    """Its schedule has gone two steps, its weights one update."""
    settings = ["rlvr.steps=4", "rlvr.min_rollouts=17", "rlvr.optimizer.decay=cosine", "rlvr.checkpoint_every=1",
                "background_checkpoints=false"]  # fmt: skip
    whole, broken = (run_config(make_run(tmp_path / name), *settings) for name in "ab")
    (want,) = run_ranks(reinforce, 1, whole, timeout_s=200)

    def stop_in_step_3(*arguments: Any) -> bool:
        asked.append(1)
        if len(asked) > 32 + 2 * 16:  # the probe's and two steps'
            raise ValueError("stopped")
        return even_length(*arguments)

    asked: list[int] = []
    with pytest.raises(RankFailure, match="stopped"):
        run_ranks(reinforce, 1, broken, None, stop_in_step_3, timeout_s=200)
    (got,) = run_ranks(reinforce, 1, broken, timeout_s=200)
    assert [row.get("lr") for row in want][:1] == [None] and len(got) == 4
    for name in ("lr", "loss", "temperature", "step"):
        assert [row.get(name) for row in got] == [row.get(name) for row in want], name
