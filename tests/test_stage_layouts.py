"""What the stages hand to a step means the same at every layout: pairs stay pairs when their tokens are split."""

import random

import pytest
import torch
from test_parallel_parity import (  # noqa: F401
    LIMIT,
    config,
    poison_uninitialised_memory,
    worst_error,
)
from torch import Tensor

from phimini.parallel.builder import build_model
from phimini.parallel.launch import run_ranks
from phimini.parallel.layout import Layout
from phimini.parallel.step import forward_backward
from phimini.parallel.weights import gradients_to_hf
from phimini.parallel.world import initialize
from phimini.stages.config import OptimizerSettings, RolloutDpoConfig
from phimini.stages.packing import Example, deal, flops_of
from phimini.stages.rollout_dpo import Pair, dpo_head, pair_batch

DPO = RolloutDpoConfig(optimizer=OptimizerSettings(lr=1e-3), micro_pairs=2, nll_weight=0.5)


def pairs() -> list[Pair]:
    rng = random.Random(0)
    example = lambda n: Example("x", [rng.randrange(128) for _ in range(n)], n // 3)
    return [Pair(example(rng.randint(4, 40)), example(rng.randint(4, 40))) for _ in range(4)]


def dpo_rank(layout: Layout) -> tuple[float, float, dict[str, float], dict[str, Tensor]]:
    world = initialize(layout, config(), timeout_s=100)
    model = build_model(config(), world, seed=0)
    model.zero_grad()
    all_pairs, reference = pairs(), torch.full((2, 2), -60.0)
    batches = [pair_batch(all_pairs[i : i + 2], reference, world) for i in (0, 2)]
    share = len(batches) // world.data_size
    mine = batches[world.data_rank * share : (world.data_rank + 1) * share]
    result = forward_backward(model, mine, dpo_head(DPO))
    gradients = {name: g.clone() for name, g in gradients_to_hf(model)}
    return result.loss, result.count, result.metrics, gradients


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [(Layout(context=2), 2), (Layout(pipeline=2, context=2), 4), (Layout(tensor=2, sequence_parallel=True), 4)],
    ids=["cp2", "cp2-pp2", "tp2-sp-dp2"],
)  # fmt: skip
def test_preferences_are_the_same(layout: Layout, world_size: int) -> None:
    ((loss, count, metrics, gradients),) = run_ranks(dpo_rank, 1, Layout(), timeout_s=150)
    assert count == 4 and metrics["margin"] != 0
    for got_loss, got_count, got, got_gradients in run_ranks(
        dpo_rank, world_size, layout, timeout_s=150
    ):
        assert got_count == count and got_loss == pytest.approx(loss, rel=LIMIT)
        assert got == pytest.approx(metrics, rel=1e-5)
        error, name = worst_error(got_gradients, gradients)
        assert error <= 2 * LIMIT, f"{name} is off by {error:.1e}"


def test_data_ranks_get_equal_flops_and_not_equal_tokens() -> None:
    """At lengths where attention outweighs the products, a document of 4n costs more than four of n."""
    small = config(max_positions=1 << 20)
    assert flops_of([4000], small) > 2 * flops_of([1000] * 4, small)
    assert flops_of([1000, 3000], small) < flops_of([4000], small)
    examples = [Example(str(n), [0] * (n + 1), 0) for n in (9000, 7000, 6000, 5000, 400, 300, 200, 100)]  # fmt: skip
    costs = [sum(flops_of([len(e)], small) for e in share) for share in deal(examples, small, 2)]
    by_turns = [sum(flops_of([len(e)], small) for e in examples[r::2]) for r in (0, 1)]
    assert max(costs) / min(costs) < max(by_turns) / min(by_turns)
