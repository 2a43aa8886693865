"""Random layouts, models, micro-batches and document lengths: each draw equals the formulas on the reference model.

`PHIMINI_FUZZ=first:last` runs other draws than the few that always run.
"""

import dataclasses
import os
import random
from typing import Any

import pytest
from forked_ranks import run_ranks
from loss_cases import HEADS, batch_of, reference_losses
from parity_cases import (  # noqa: F401
    LIMIT,
    config,
    poison_uninitialised_memory,
)
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import gradients_to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.step import forward_backward

first, _, last = os.environ.get("PHIMINI_FUZZ", "0:6").partition(":")
SEEDS = range(int(first), int(last))


@dataclasses.dataclass(frozen=True)
class Draw:
    layout: Layout
    world_size: int
    model: ModelConfig
    groups: list[list[int]]
    """document lengths of each micro-batch, of all data ranks"""
    options: dict[str, Any]


def draw(seed: int) -> Draw:
    rng = random.Random(seed)
    while True:
        tensor, pipeline, context, data = (rng.choice((1, 1, 2, 2, 4)) for _ in range(4))
        world_size = tensor * pipeline * context * data
        if world_size <= 8:
            break
    virtual = rng.choice((1, 2)) if pipeline > 1 else 1
    layout = Layout(
        tensor=tensor, pipeline=pipeline, context=context, virtual_pipeline=virtual,
        sequence_parallel=tensor > 1 and rng.random() < 0.7,
    )  # fmt: skip
    model = config(
        num_layers=max(rng.choice((2, 4, 5)), pipeline * virtual),
        num_kv_heads=rng.choice((4, 8)),
        vocab_size=rng.choice((128, 256, 1024)),
        tie_embeddings=rng.random() < 0.7,
        rope_factors=rng.choice(("short", "long")),
    )
    # Pairs, for DPO: an even number of documents in each micro-batch.
    lengths = lambda: [rng.choice((1, 2, 15, 16, 17, 64, rng.randint(1, 64))) for _ in range(2 * rng.randint(1, 3))]  # fmt: skip
    groups = [lengths() for _ in range(data * rng.randint(1, 4))]
    zero1 = rng.random() < 0.4
    options = dict(
        recompute=rng.choice(("none", "none", "full", "selective")),
        distributed_optimizer=zero1,
        overlap=rng.random() < 0.3,
    )
    layout = dataclasses.replace(layout, context_keys=rng.choice(("gathered", "ring")))
    return Draw(layout, world_size, model, groups, options)


def rank(d: Draw) -> dict[str, tuple[float, dict[str, Tensor]]]:
    world = initialize(d.layout, d.model, timeout_s=60)
    model = build_model(d.model, world, seed=0, **d.options)
    share = len(d.groups) // world.data_size
    mine = d.groups[world.data_rank * share : (world.data_rank + 1) * share]
    out = {}
    for name, head in HEADS.items():
        model.zero_grad()
        result = forward_backward(model, [batch_of(lengths) for lengths in mine], head)
        out[name] = (result.loss, {k: v.clone() for k, v in gradients_to_hf(model)})
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_layout_matches_the_formulas(seed: int) -> None:
    check(draw(seed))


INTERLEAVED = Layout(pipeline=2, virtual_pipeline=2)
FOUND = {
    "context ranks, documents of one token only": Draw(
        Layout(context=2), 2, config(), [[1, 1], [5, 9]], {}
    ),
    "interleaved stages, overlap, an odd number of micro-batches": Draw(
        INTERLEAVED, 2, config(), [[5, 9], [3, 4], [16, 1]], {"overlap": True}
    ),
    "the same on two replicas": Draw(
        INTERLEAVED, 4, config(), [[5, 9], [16, 1]], {"overlap": True, "distributed_optimizer": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_random_draws_once_broke(name: str) -> None:
    check(FOUND[name])


def check(d: Draw) -> None:
    want = reference_losses(d.model, d.groups)
    for number, got in enumerate(run_ranks(rank, d.world_size, d, timeout_s=100)):
        for head, (loss, gradients) in want.items():
            got_loss, got_gradients = got[head]
            assert abs(got_loss - loss) <= LIMIT * max(1.0, abs(loss)), (number, head, got_loss, d)
            # A gradient that is zero but for rounding (all documents of one token) is compared to the largest.
            size = max(float(g.abs().max()) for g in gradients.values())
            for name, g in gradients.items():
                error = float((got_gradients[name] - g).abs().max())
                limit = LIMIT * max(float(g.abs().max()), 1e-3 * size)
                assert error <= limit, f"rank {number}, {head}: {name} off by {error:.1e} > {limit:.1e}; {d}"  # fmt: skip
