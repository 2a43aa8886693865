"""Non-finite losses and gradients are traced to rank, stage, micro-batch and document, at any layout."""

import dataclasses
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from parity_cases import (  # noqa: F401
    GROUPS,
    config,
    cross_entropy_head,
    poison_uninitialised_memory,
    share_of,
)
from torch import Tensor

from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import PackedBatch
from phimini.parallel.training.nonfinite import NonFiniteError
from phimini.parallel.training.optimizer import OptimizerConfig, build_optimizer
from phimini.parallel.training.step import forward_backward

# Document 1 of micro-batch 2 of the last data rank.
INDEX, DOCUMENT = 2, 1
LAYOUTS = {
    "dp2": (2, Layout(), {}),
    "pp2-dp2": (4, Layout(pipeline=2), {}),
    "tp2-sp": (2, Layout(tensor=2, sequence_parallel=True), {}),
    "cp2": (2, Layout(context=2), {}),
    "pp2-vpp2": (2, Layout(pipeline=2, virtual_pipeline=2), {}),
    "dp2-zero1-overlap": (2, Layout(), dict(distributed_optimizer=True, overlap=True)),
}


def named(batches: list[PackedBatch]) -> list[PackedBatch]:
    return [
        dataclasses.replace(b, names=tuple(f"rows.jsonl:{10 * i + d}" for d in range(b.num_documents)))
        for i, b in enumerate(batches)
    ]  # fmt: skip


class _BadGradient(torch.autograd.Function):
    """The identity, whose gradient for the marked rows is infinite."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, marked_M: Tensor) -> Tensor:
        ctx.save_for_backward(marked_M)
        return x_MD.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (marked_M,) = ctx.saved_tensors
        return grads[0].masked_fill(marked_M[:, None], torch.inf), None


def message(model: Model, options: dict) -> str:
    optimizer = build_optimizer(
        model,
        OptimizerConfig(lr=1e-3),
        distributed=options.get("distributed_optimizer", False),
    )
    world = model.world
    batches = named(share_of(GROUPS, world.data_rank, world.data_size))
    poisoned = batches[INDEX].names if world.data_rank == world.data_size - 1 else ()

    def head(
        hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        marked_M = (batch.document_ids_T == DOCUMENT) & (batch.names == poisoned)
        hidden_MD = _BadGradient.apply(hidden_MD, marked_M)  # pyright: ignore[reportAssignmentType]
        return cross_entropy_head(hidden_MD, weight_VD, batch, group=group)

    optimizer.zero_grad()
    forward_backward(model, batches, head)
    before = [p.detach().clone() for _, p in model.named_parameters()]
    with pytest.raises(NonFiniteError) as error:
        optimizer.step()
    assert all(a.equal(p) for a, (_, p) in zip(before, model.named_parameters(), strict=True))
    return str(error.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gradient_is_traced_to_its_document(name: str) -> None:
    world_size, layout, options = LAYOUTS[name]

    def rank() -> str:
        world = initialize(layout, config(), timeout_s=40)
        return message(build_model(config(), world, seed=0, **options), options)

    texts = run_ranks(rank, world_size, timeout_s=60)
    assert len(set(texts)) == 1, texts
    replicas, last_stage = world_size // layout.model_size, layout.pipeline - 1
    assert "step 0: the gradient norm is " in texts[0] and "no weight was changed" in texts[0]
    (line,) = [line for line in texts[0].splitlines() if "micro-batch" in line]
    assert line.startswith(f"data rank {replicas - 1}, micro-batch {INDEX}: "), line
    assert f"pipeline stage {last_stage}; document {DOCUMENT} (rows.jsonl:{10 * INDEX + 1})" in line
    assert line.endswith(")"), "no other document is named"


def test_the_earliest_stage_of_a_bad_loss_is_named() -> None:
    """With a non-finite weight in stage 1 of 4, stages 1, 2 and 3 are affected, and 1 is named."""

    def rank() -> str:
        world = initialize(Layout(pipeline=4), config(), timeout_s=40)
        model = build_model(config(), world, seed=0)
        if world.rank == 1:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "linear_fc2" in n).fill_(torch.nan)
        with pytest.raises(NonFiniteError) as error:
            forward_backward(model, named(share_of(GROUPS, 0, 1))[:2], cross_entropy_head)
        return str(error.value)

    texts = run_ranks(rank, 4, timeout_s=60)
    assert len(set(texts)) == 1, texts
    lines = texts[0].splitlines()
    assert len(lines) == 3 and "the loss is not finite" in lines[0]
    for i, line in enumerate(lines[1:]):
        assert f"data rank 0, micro-batch {i}: loss nan" in line
        assert "hidden states on rank 1, pipeline stage 1; document 0 (rows.jsonl:" in line
