"""Inputs that the stages pass to a step have the same meaning at every layout and number of data ranks.

Pairs stay pairs when their tokens are split; a data rank with fewer items than the others adds nothing of its own.
"""

import dataclasses
import random
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from parity_cases import (  # noqa: F401
    LIMIT,
    config,
    poison_uninitialised_memory,
    worst_error,
)
from rl_run import rollout_of
from torch import Tensor

from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import gradients_to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import World, initialize
from phimini.parallel.training.batch import PackedBatch, pack
from phimini.parallel.training.step import forward_backward
from phimini.stages.config.schema import OptimizerSettings, RlvrConfig, RolloutDpoConfig
from phimini.stages.data.packing import Example, documents, flops_of, micro_batches, shares
from phimini.stages.rl.loss import policy_head
from phimini.stages.rl.mismatch import MismatchMeter
from phimini.stages.rl.rollouts import Rollout
from phimini.stages.rlvr import rollout_batch
from phimini.stages.rollout_dpo import Pair, dpo_head, pair_batch, reference_logps
from phimini.stages.run.training import cross_entropy_head

DPO = RolloutDpoConfig(
    optimizer=OptimizerSettings(lr=1e-3), sequence_length=40, micro_tokens=80, nll_weight=0.5
)
IPO = dataclasses.replace(DPO, loss="ipo", length_normalized=True, nll_mean="tokens")


def pairs() -> list[Pair]:
    rng = random.Random(0)
    example = lambda n: Example("x", [rng.randrange(128) for _ in range(n)], n // 3)
    return [Pair(example(rng.randint(4, 40)), example(rng.randint(4, 40))) for _ in range(4)]


def dpo_rank(
    layout: Layout, options: RolloutDpoConfig
) -> tuple[float, float, dict[str, float], dict[str, Tensor]]:
    world = initialize(layout, config(), timeout_s=100)
    model = build_model(config(), world, seed=0)
    model.zero_grad()
    all_pairs, reference = pairs(), torch.full((2, 2), -60.0)
    scale = 0.05 if options.nll_mean == "tokens" else None
    batches = [pair_batch(all_pairs[i : i + 2], reference, world, scale) for i in (0, 2)]
    share = len(batches) // world.data_size
    mine = batches[world.data_rank * share : (world.data_rank + 1) * share]
    result = forward_backward(model, mine, dpo_head(options))
    gradients = {name: g.clone() for name, g in gradients_to_hf(model)}
    return result.loss, result.count, result.metrics, gradients


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [(Layout(context=2), 2), (Layout(pipeline=2, context=2), 4), (Layout(tensor=2, sequence_parallel=True), 4)],
    ids=["cp2", "cp2-pp2", "tp2-sp-dp2"],
)  # fmt: skip
@pytest.mark.parametrize("options", [DPO, IPO], ids=["dpo", "ipo"])
def test_preferences_are_the_same(
    layout: Layout, world_size: int, options: RolloutDpoConfig
) -> None:
    ((loss, count, metrics, gradients),) = run_ranks(dpo_rank, 1, Layout(), options, timeout_s=150)
    assert count == 4 and metrics["margin"] != 0
    for got_loss, got_count, got, got_gradients in run_ranks(
        dpo_rank, world_size, layout, options, timeout_s=150
    ):
        assert got_count == pytest.approx(count) and got_loss == pytest.approx(loss, rel=LIMIT)
        assert got == pytest.approx(metrics, rel=1e-5)
        error, name = worst_error(got_gradients, gradients)
        assert error <= 2 * LIMIT, f"{name} is off by {error:.1e}"


def test_data_ranks_get_equal_flops_and_not_equal_tokens() -> None:
    """At lengths where attention dominates, a document of 4n tokens costs more than four of n."""
    small = config(max_positions=1 << 20)
    assert flops_of([4000], small) > 2 * flops_of([1000] * 4, small)
    assert flops_of([1000, 3000], small) < flops_of([4000], small)
    examples = [Example(str(n), [0] * (n + 1), 0) for n in (9000, 7000, 6000, 5000, 400, 300, 200, 100)]  # fmt: skip
    flops = [flops_of([len(e)], small) for e in examples]
    costs = [sum(flops[i] for i in share) for share in shares(flops, 2)]
    by_turns = [sum(flops_of([len(e)], small) for e in examples[r::2]) for r in (0, 1)]
    assert max(costs) / min(costs) < max(by_turns) / min(by_turns)


RLVR = RlvrConfig(
    optimizer=OptimizerSettings(lr=1e-3), steps=1, importance="sequence_truncated", kl_coef=0.1
)
GSPO = dataclasses.replace(
    RLVR, objective="gspo", normalizer="constant", max_new_tokens=32, dual_clip=3.0
)


def rollouts() -> list[Rollout]:
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(128) for _ in range(n)]
    return [
        rollout_of(f"r{k}", ids(rng.randint(1, 5)), ids(n), -4.9, temperature=0.8, advantage=(-1.0) ** k)
        for k, n in enumerate((7, 12, 3, 9, 20))
    ]  # fmt: skip


def with_reference(batch: PackedBatch) -> PackedBatch:
    batch.fields["reference_logp"] = batch.fields["old_logp"] - 0.1 * batch.fields["weight"]
    return batch


def stage_items(stage: str, world: World) -> tuple[list, Any, Any]:
    """Return a stage's items, the function that makes a micro-batch of some, and its head."""
    multiple = world.token_multiple
    if stage == "dpo":
        pair = lambda part: pair_batch(part, torch.full((len(part), 2), -60.0), world)
        return pairs(), pair, dpo_head(DPO)
    if stage in ("rlvr", "gspo"):
        options = RLVR if stage == "rlvr" else GSPO
        made = lambda part: with_reference(rollout_batch(part, 0, options, world))
        return rollouts(), made, policy_head(options, MismatchMeter(), 1e-4, "off")
    examples = [e for p in pairs() for e in (p.chosen, p.rejected)]
    return examples, lambda part: pack(documents(part), multiple_of=multiple), cross_entropy_head


Trained = tuple[float, float, dict[str, float], dict[str, Tensor], int]


def uneven_rank(stage: str, number: int, layout: Layout, micro_tokens: int | None = None) -> Trained:  # fmt: skip
    """Train on the first `number` items, by default in micro-batches of one.

    The last value is the number of micro-batches on this rank that had a target.
    """
    world = initialize(layout, config(), timeout_s=100)
    model = build_model(config(), world, seed=0)
    model.zero_grad()
    items, make, head = stage_items(stage, world)
    items, lengths = items[:number], [1] * number
    if micro_tokens is not None:
        lengths = [sum(i.lengths) if isinstance(i, Pair) else len(i) for i in items]
    costs = list(range(1, number + 1))
    batches = micro_batches(items, lengths, costs, micro_tokens or 1, world, make)
    result = forward_backward(model, batches, head)
    gradients = {name: g.clone() for name, g in gradients_to_hf(model)}
    used = sum(bool((b.targets_T >= 0).any()) for b in batches)
    return result.loss, result.count, result.metrics, gradients, used


@pytest.mark.parametrize(
    ("layout", "world_size", "number"),
    [(Layout(), 3, 4), (Layout(), 3, 1), (Layout(pipeline=2), 4, 3), (Layout(context=2), 4, 1)],
    ids=["dp3-4", "dp3-1", "pp2-dp2-3", "cp2-dp2-1"],
)
@pytest.mark.parametrize("stage", ["sft", "dpo", "rlvr", "gspo"])
def test_a_data_rank_without_an_item_changes_nothing(
    stage: str, layout: Layout, world_size: int, number: int
) -> None:
    ((loss, count, metrics, gradients, _),) = run_ranks(
        uneven_rank, 1, stage, number, Layout(), timeout_s=150
    )
    results = run_ranks(uneven_rank, world_size, stage, number, layout, timeout_s=150)
    assert sum(used for *_, used in results) == number * layout.model_size
    for got_loss, got_count, got, got_gradients, _ in results:
        assert got_count == pytest.approx(count) and got_loss == pytest.approx(loss, rel=LIMIT)
        assert got == pytest.approx(metrics, rel=1e-5, abs=1e-5)
        error, name = worst_error(got_gradients, gradients)
        assert error <= 2 * LIMIT, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("stage", ["sft", "dpo", "rlvr", "gspo"])
@pytest.mark.parametrize(("layout", "world_size"), [(Layout(), 2), (Layout(context=2), 2)], ids=["dp2", "cp2"])  # fmt: skip
def test_a_token_budget_changes_no_gradient(stage: str, layout: Layout, world_size: int) -> None:
    """Against one item at a time: with several in a micro-batch, and with all of a rank's in one."""
    number = 8 if stage == "sft" else 4
    ((loss, count, metrics, gradients, used),) = run_ranks(
        uneven_rank, 1, stage, number, Layout(), timeout_s=150
    )
    assert used == number
    for micro_tokens, most in ((81, number - 1), (10_000, 1)):
        results = run_ranks(uneven_rank, world_size, stage, number, layout, micro_tokens, timeout_s=150)  # fmt: skip
        assert all(1 <= used <= most for *_, used in results)
        for got_loss, got_count, got, got_gradients, _ in results:
            assert got_count == pytest.approx(count) and got_loss == pytest.approx(loss, rel=LIMIT)
            assert got == pytest.approx(metrics, rel=1e-5, abs=1e-5)
            error, name = worst_error(got_gradients, gradients)
            assert error <= 2 * LIMIT, f"{name} is off by {error:.1e}"


def test_fewer_pairs_than_data_ranks_have_reference_log_probs() -> None:
    def rank() -> Tensor:
        world = initialize(Layout(), config(), timeout_s=100)
        return reference_logps(build_model(config(), world, seed=0), pairs()[:2], DPO, world)

    (want,) = run_ranks(rank, 1, timeout_s=150)
    assert want.shape == (2, 2) and (want < 0).all()
    for got in run_ranks(rank, 3, timeout_s=150):
        torch.testing.assert_close(got, want)
