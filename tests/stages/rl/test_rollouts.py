"""Rollouts on several ranks: their tokens go to the ranks that train on them, and to no other; checkpoints keep them."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from forked_ranks import RankFailure, run_ranks
from rl_run import rollout_of
from rollout_cases import LONG

from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import World, initialize
from phimini.stages.config.recipes import tiny
from phimini.stages.rl.rollout_log import from_row, waiting_rows
from phimini.stages.rl.rollouts import Rollout, delivered, to_trainers
from phimini.stages.rlvr import rollout_batches

LENGTHS = (9, 2, 30, 17, 5)


def held_in_turns(world: World) -> list[Rollout]:
    """Return five rollouts, of which each rank has the tokens of every second one."""
    rollouts = []
    for k, length in enumerate(LENGTHS):
        whole = rollout_of(f"r{k}", [1, 2, k + 1], [10 * k + i for i in range(length)], -0.5 - k)
        facts, holder = whole.facts, k % world.world_size
        whole = dataclasses.replace(whole, facts=facts._replace(holder=holder), advantage=1.0)
        rollouts.append(whole if holder == world.rank else dataclasses.replace(whole, answer=None))
    return rollouts


def content(rollout: Rollout) -> tuple[list[int], list[float]] | None:
    answer = rollout.answer
    return None if answer is None else (answer.tokens.tolist(), answer.logprobs.tolist())


def trained_on(layout: Layout) -> tuple[list[Any], list[list[int]]]:
    """Return the answers that this rank has after the delivery, and the targets of its micro-batches."""
    world = initialize(layout, LONG)
    model: Any = SimpleNamespace(world=world, config=LONG, num_updates=0)
    here = to_trainers(held_in_turns(world), model)
    batches = rollout_batches(
        here, model, dataclasses.replace(tiny().rlvr, sequence_length=40, micro_tokens=40)
    )
    targets = [batch.targets_T[batch.targets_T >= 0].tolist() for batch in batches]
    return [content(rollout) for rollout in here], targets


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, Layout()), (3, Layout()), (2, Layout(tensor=2)), (4, Layout(tensor=2))],
    ids=["dp2", "dp3", "tp2", "dp2-tp2"],
)
def test_a_rank_gets_the_tokens_of_its_share_and_no_other(ranks: int, layout: Layout) -> None:
    whole = [([10 * k + i for i in range(n)], [-0.5 - k] * n) for k, n in enumerate(LENGTHS)]
    cheapest = LENGTHS.index(min(LENGTHS))
    found = run_ranks(trained_on, ranks, layout)
    replicas = ranks // layout.tensor
    for here, targets in found:
        assert all(content in (None, whole[k]) for k, content in enumerate(here))
        trained = {token // 10 for batch in targets for token in batch}
        spare = {cheapest} - trained
        assert sum(content is not None for content in here) <= -(-5 // replicas) + len(spare)
    every = sorted(t for _, targets in found[:: layout.tensor] for batch in targets for t in batch)
    assert every == sorted(t for tokens, _ in whole for t in tokens), "each is trained on once"


def wrong_tokens() -> None:
    world = initialize(Layout(), LONG)
    rollouts = held_in_turns(world)
    if rollouts[0].answer is not None:
        rollouts[0].answer.tokens[3] += 1
    delivered(rollouts, [set(), {0}], world)


def test_tokens_that_are_not_those_that_were_scored_are_refused() -> None:
    with pytest.raises(RankFailure, match="DivergedError.*r0: rank 1 got other tokens than were"):
        run_ranks(wrong_tokens, 2)


def kept() -> tuple[list[dict], list[bool]]:
    """Return rank 0's rows of waiting rollouts, through JSON, and whether they come back unchanged."""
    world = initialize(Layout(), LONG)
    before = held_in_turns(world)
    rows = json.loads(json.dumps(waiting_rows(before, world)))
    if not world.is_main:
        return rows, []
    prompts = {"p": np.array([1, 2, 3], np.int32)}
    after = [from_row(row, prompts, world) for row in rows]
    whole = [rollout_of(f"r{k}", [1, 2, 3], [10 * k + i for i in range(n)], -0.5 - k, advantage=1.0)
             for k, n in enumerate(LENGTHS)]  # fmt: skip
    same = [a.digest() == w.digest() and content(a) == content(w) for a, w in zip(after, whole, strict=True)]  # fmt: skip
    return rows, same


def test_waiting_rollouts_are_kept_by_rank_0() -> None:
    (_, same), (of_other, _) = run_ranks(kept, 2)
    assert same == [True] * 5
    assert not any("tokens" in row for row in of_other)
