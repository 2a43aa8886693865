"""No stage's step makes the host wait for a GPU between its first launch and the optimizer: one pinned copy a micro-batch."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_stand_in import DeviceStandIn, HostWaitsError
from forked_ranks import run_ranks
from parity_cases import config, documents
from rl_run import rollout_of
from torch import Tensor

from phimini.kernels.head import rows
from phimini.parallel.attention.core import rope_tables
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import World, initialize
from phimini.parallel.training import schedule
from phimini.parallel.training.batch import PackedBatch, pack
from phimini.parallel.training.step import start_step
from phimini.stages.config.recipes import tiny
from phimini.stages.data.packing import Example
from phimini.stages.rl.loss import policy_head
from phimini.stages.rl.mismatch import MismatchMeter
from phimini.stages.rlvr import rollout_batch
from phimini.stages.rollout_dpo import Pair, dpo_head, pair_batch
from phimini.stages.run.training import Ahead, cross_entropy_head

LENGTHS = [[15, 3], [17, 2, 1]]


def of_pairs(world: World) -> tuple[list[PackedBatch], Any]:
    example = lambda n: Example(str(n), [i % 128 for i in range(n)], n // 2)
    pairs = [Pair(example(30), example(21)), Pair(example(9), example(12))]
    batches = [pair_batch(pairs, torch.zeros(2, 2), world) for _ in range(2)]
    return batches, dpo_head(tiny().rollout_dpo)


def of_rollouts(importance: str) -> Callable[[World], tuple[list[PackedBatch], Any]]:
    def make(world: World) -> tuple[list[PackedBatch], Any]:
        rollouts = [
            rollout_of(str(n), [1, 2, 3], [5] * n, temperature=0.8, advantage=0.5) for n in (4, 11)
        ]
        batches = [rollout_batch(rollouts, 0, tiny().rlvr, world) for _ in range(2)]
        return batches, policy_head(tiny().rlvr, MismatchMeter(), 0.0, importance)

    return make


STAGES: dict[str, Callable[[World], tuple[list[PackedBatch], Any]]] = {
    "midtrain": lambda _: ([pack(documents(n)) for n in LENGTHS], cross_entropy_head),
    "sft": lambda _: ([pack(documents(n)) for n in ([40], [16, 16])], cross_entropy_head),
    "rollout_dpo": of_pairs,
    "rlvr": of_rollouts("off"),
    "rlvr-by-sequence": of_rollouts("sequence_truncated"),
}


def stand_in_for(model: Model, batches: list[PackedBatch]) -> DeviceStandIn:
    buffers = [b.grad_data for c in model.chunks for b in c.buffers]  # pyright: ignore
    of_host: list[Tensor] = []
    for batch in batches:
        of_host += [batch.tokens_T, batch.targets_T, batch.cu_seqlens]
        of_host += [*batch.fields.values(), *batch.document_fields.values()]
    # A GPU has one table, made before the first step; a CPU one of each size.
    tables = [t for n in (16, 32, 64) for t in rope_tables(config(), n, model.world.device)]
    return DeviceStandIn(
        [*tables, *(p.data for _, p in model.named_parameters()), *buffers], of_host
    )


def step_of(stage: str, layout: Layout, broken: Callable[[], None] = lambda: None) -> list[int]:
    """Run a step in bf16 on the stand-in, with chunks shorter than a pair; return the bytes of its copies."""
    rows.CHUNK_BYTES["cuda"] = 16 * 2 * 128
    world = initialize(layout, config(), timeout_s=240)
    model = build_model(config(), world, seed=0, dtype=torch.bfloat16)
    batches, head = STAGES[stage](world)
    broken()
    warnings.filterwarnings("error", message="linear_dpo")
    with stand_in_for(model, batches) as device:
        model.zero_grad()
        start_step(model, batches, head)
    world.close()
    return device.copies


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_never_waits(stage: str) -> None:
    (copies,) = run_ranks(step_of, 1, stage, Layout(), timeout_s=240)
    assert len(copies) == 2  # a micro-batch each


@pytest.mark.parametrize("keys", ["ring", "gathered"])
def test_pairs_over_context_ranks_never_wait_and_take_three_gemms(keys: Any) -> None:
    """A warning, here an error, says where logits are computed twice."""
    layout = Layout(context=2, context_keys=keys)
    found = run_ranks(step_of, 2, "rollout_dpo", layout, timeout_s=240)
    assert [len(copies) for copies in found] == [2, 2]


def copy_pageable() -> None:
    schedule.to_device = lambda value, device: value


def read_the_loss() -> None:
    right = schedule.get_forward_backward_func

    def reading() -> Any:
        run = right()

        def forward_backward(*, forward_step_func: Any, **kwargs: Any) -> Any:
            def step(*args: Any) -> Any:
                hidden, loss = forward_step_func(*args)
                hidden.sum().item()
                return hidden, loss

            return run(forward_step_func=step, **kwargs)

        return forward_backward

    schedule.get_forward_backward_func = reading


@pytest.mark.parametrize("broken", [copy_pageable, read_the_loss])
def test_what_would_wait_is_seen(broken: Callable[[], None]) -> None:
    with pytest.raises(Exception, match=HostWaitsError.__name__):
        run_ranks(step_of, 1, "midtrain", Layout(), broken, timeout_s=240)


def test_a_batch_of_another_step_is_refused() -> None:
    made: list[int] = []
    ahead = Ahead(lambda index: made.append(index) or index, 3)
    assert ahead.take(0) == 0
    ahead.prepare(1)
    with pytest.raises(AssertionError, match=r"step 2 would train on the batch of \[1\]"):
        ahead.take(2)
    assert ahead.take(1) == 1
    ahead.prepare(2)
    assert ahead.take(2) == 2
    ahead.prepare(3)
    assert made == [0, 1, 2]
