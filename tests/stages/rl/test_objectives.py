"""Each option of stage 4's objective reaches the loss: the normaliser's numbers, the advantages, and the arguments."""

from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from parity_cases import config
from rl_run import SETTINGS, rollout_of

from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import PackedBatch
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RlvrConfig, override
from phimini.stages.rl import loss
from phimini.stages.rl.mismatch import MismatchMeter
from phimini.stages.rl.remedies import advantages
from phimini.stages.rl.rollouts import Rollout
from phimini.stages.rlvr import rollout_batch

LENGTHS = (4, 10, 2)


def options(*words: str) -> RlvrConfig:
    return override(tiny(), [*SETTINGS, *words]).rlvr


def rollouts() -> list[Rollout]:
    return [
        rollout_of(f"r{k}", [1, 2, 3], [5] * n, -4.0 - k, advantage=(-1.0) ** k)
        for k, n in enumerate(LENGTHS)
    ]


def batch_of(chosen: RlvrConfig) -> PackedBatch:
    return rollout_batch(rollouts(), 0, chosen, initialize(Layout(), config()))


@pytest.mark.parametrize(
    ("normalizer", "weights", "count"),
    [
        ("token", [1.0, 1.0, 1.0], 16.0),
        ("sequence", [1 / 4, 1 / 10, 1 / 2], 3.0),
        ("constant", [1 / 20, 1 / 20, 1 / 20], 3.0),
    ],
)
def test_weights_and_the_count_that_the_loss_is_divided_by(
    normalizer: str, weights: list[float], count: float
) -> None:
    [batch] = run_ranks(batch_of, 1, options(f"rlvr.normalizer={normalizer}"))
    trained_M = batch.fields["weight"] != 0
    expected = torch.tensor(weights).repeat_interleave(torch.tensor(LENGTHS))
    torch.testing.assert_close(batch.fields["weight"][trained_M], expected)
    assert float(batch.fields["share"].sum()) == pytest.approx(count)


def test_centered_advantages_keep_the_spread_of_the_rewards() -> None:
    rewards = [1.0, -1.0, -1.0, -1.0]
    assert advantages(rewards, "centered") == [1.5, -0.5, -0.5, -0.5]
    assert advantages(rewards) != advantages(rewards, "centered")


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], {"objective": "clip", "dual_clip": None}),
        (["rlvr.objective=cispo"], {"objective": "cispo"}),
        (["rlvr.dual_clip=3"], {"dual_clip": 3.0}),
        (["rlvr.objective=gspo"], {"objective": "clip"}),
    ],
)
def test_options_reach_the_loss(
    words: list[str], given: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, seen = options(*words), {}
    [batch] = run_ranks(batch_of, 1, chosen)
    real = loss.linear_policy_loss

    def noted(*args: Any, **arguments: Any) -> Any:
        seen.update(arguments)
        return real(*args, **arguments)

    monkeypatch.setattr(loss, "linear_policy_loss", noted)
    torch.manual_seed(0)
    hidden, weight = torch.randn(len(batch.targets_T), 8), torch.randn(16, 8)
    head = loss.policy_head(chosen, MismatchMeter(), 1e-4, "off")
    head(hidden, weight, batch, group=None)
    assert given.items() <= seen.items()
    ratio_M = seen["sequence_log_ratio_M"]
    assert (ratio_M is not None) == (chosen.objective == "gspo")
    if ratio_M is not None:
        logp_M = torch.log_softmax(hidden @ weight.T, -1).gather(
            1, batch.targets_T.clamp_min(0)[:, None]
        )[:, 0]
        for k in range(len(LENGTHS)):
            rows_M = (batch.document_ids_T == k) & (batch.fields["weight"] != 0)
            mean = (logp_M - batch.fields["old_logp"])[rows_M].mean()
            torch.testing.assert_close(ratio_M[rows_M], mean.expand(int(rows_M.sum())))
