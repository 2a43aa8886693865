"""Loss and all gradients of every layout against the reference model, in fp32, within 5e-6 of the largest.

Ranks are forked after the imports (`launch.run_ranks`); each test takes seconds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from parity_cases import (  # noqa: F401
    GROUPS,
    LAYOUTS,
    LIMIT,
    check,
    config,
    cross_entropy_head,
    documents,
    reference,
    share_of,
    want,
    worst_error,
)
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.parallel.attention import core as attention
from phimini.parallel.megatron import layers
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.hf_weights import gradients_to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training import schedule
from phimini.parallel.training.batch import PackedBatch, pack
from phimini.parallel.training.step import forward_backward


def train_rank(
    layout: Layout,
    model_config: ModelConfig,
    groups: list[list[int]],
    change: Callable[[Model], None] | None,
    options: dict,
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    world = initialize(layout, model_config, timeout_s=200)
    model = build_model(model_config, world, seed=0, **options)
    if change is not None:
        change(model)
    model.zero_grad()
    result = forward_backward(
        model, share_of(groups, world.data_rank, world.data_size), cross_entropy_head
    )
    gradients = dict(gradients_to_hf(model))
    world.close()
    return result.loss, {k: v.clone() for k, v in gradients.items()}, result.metrics


def run(
    layout: Layout,
    world_size: int,
    model_config: ModelConfig | None = None,
    groups: list[list[int]] = GROUPS,
    change: Callable[[Model], None] | None = None,
    **options,
) -> list[tuple[float, dict[str, Tensor], dict[str, float]]]:
    return run_ranks(
        train_rank,
        world_size,
        layout,
        model_config or config(),
        groups,
        change,
        options,
        timeout_s=240,
    )


# All of LAYOUTS, with the fused losses: test_parallel_losses.py.
@pytest.mark.parametrize(
    "name", ["single", "dp2", "tp2-sp", "pp2", "cp2", "cp2-ring", "tp2-pp2-dp2"]
)
def test_layout_matches_the_reference(name: str, want: tuple) -> None:
    world_size, layout, options = LAYOUTS[name]
    check(run(layout, world_size, **options), want)


def test_untied_embeddings_match_the_reference() -> None:
    untied = config(tie_embeddings=False)
    check(run(Layout(tensor=2, pipeline=2), 4, untied), reference(untied, GROUPS))


def test_four_interleaved_stages_match_the_reference() -> None:
    """The other legal way of interleaving: from three stages on, sends may be batched."""
    eight_layers = config(num_layers=8, model_dim=32, num_heads=2, num_kv_heads=2)
    check(
        run(Layout(pipeline=4, virtual_pipeline=2), 4, eight_layers),
        reference(eight_layers, GROUPS),
    )


def test_unequal_stages_match_the_reference() -> None:
    """A vocabulary so large that the last stage gets one layer of four."""
    wide = config(vocab_size=2048)
    layout = Layout(pipeline=2)
    assert layout.layers_of_chunks(wide) == (3, 1)
    check(run(layout, 2, wide), reference(wide, GROUPS))


def test_short_table_matches_the_reference() -> None:
    short = config(rope_factors="short")
    check(run(Layout(), 1, short), reference(short, GROUPS))


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [(Layout(), 1), (Layout(), 2), (Layout(context=2), 2)],
    ids=["single", "dp2", "cp2"],
)
@pytest.mark.parametrize("number", [1, 2, 8])
def test_a_split_batch_has_the_same_gradient(
    number: int, layout: Layout, world_size: int, want: tuple
) -> None:
    """Eight groups of documents in `number` micro-batches on each layout all equal the reference."""
    number = max(number, world_size // layout.model_size)
    size = len(GROUPS) // number
    batches = [
        pack([d for g in GROUPS[i : i + size] for d in documents(g)])
        for i in range(0, len(GROUPS), size)
    ]
    assert len(batches) == number
    check(run_ranks(split_rank, world_size, batches, layout, timeout_s=200), want)


def split_rank(batches: list[PackedBatch], layout: Layout) -> tuple[float, dict[str, Tensor], dict]:
    world = initialize(layout, config(), timeout_s=200)
    model = build_model(config(), world, seed=0)
    model.zero_grad()
    share = len(batches) // world.data_size
    mine = batches[world.data_rank * share : (world.data_rank + 1) * share]
    result = forward_backward(model, mine, cross_entropy_head)
    gradients = {k: v.clone() for k, v in gradients_to_hf(model)}
    world.close()
    return result.loss, gradients, {}


# Negative controls: each breaks one thing on purpose, in the forked rank, and must be seen.


def drop_attention_factor(model: Model) -> None:
    right = schedule.rope_tables

    def without_factor(model_config: ModelConfig, *args: Any) -> tuple[Tensor, ...]:
        return tuple(t / model_config.attention_factor for t in right(model_config, *args))

    schedule.rope_tables = without_factor


def start_a_document_at_position_one(model: Model) -> None:
    right = schedule.packed_documents

    def off_by_one(*args: Any) -> attention.PackedDocuments:
        documents = right(*args)
        assert documents.positions_T is not None
        documents.positions_T.masked_fill_(documents.positions_T == 0, 1)
        return documents

    schedule.packed_documents = off_by_one


def add_a_residual_twice(model: Model) -> None:
    right = layers.FusedLayer.forward

    def twice(self: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, residual = right(self, hidden_states, **kwargs)
        return output, None if residual is None else 2 * residual

    layers.FusedLayer.forward = twice


def flip_rope_table(model: Model) -> None:
    model.config = dataclasses.replace(model.config, rope_factors="short")


def leak_a_document(model: Model) -> None:
    right = schedule.packed_documents

    def joined(cu_seqlens: Tensor, *args: Any) -> attention.PackedDocuments:
        return right(
            torch.cat((cu_seqlens[:1], cu_seqlens[2:])) if len(cu_seqlens) > 2 else cu_seqlens,
            *args,
        )

    schedule.packed_documents = joined


def unmark_norms(model: Model) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.sequence_parallel = False  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "layout", "world_size"),
    [
        (drop_attention_factor, Layout(), 1),
        (flip_rope_table, Layout(), 1),
        (start_a_document_at_position_one, Layout(), 1),
        (add_a_residual_twice, Layout(), 1),
        (leak_a_document, Layout(), 1),
        (unmark_norms, Layout(tensor=2, sequence_parallel=True), 2),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_broken_model_is_seen(
    change: Callable[[Model], None], layout: Layout, world_size: int, want: tuple
) -> None:
    loss, gradients, _ = run(layout, world_size, change=change)[0]
    error, _ = worst_error(gradients, want[1])
    assert error > 1000 * LIMIT, f"{change.__name__} changed no gradient by more than {error:.1e}"
    if change is not unmark_norms:
        assert abs(loss - want[0]) > 2 * LIMIT * want[0], (
            f"{change.__name__} left the loss at {loss}"
        )


def test_an_unmasked_pad_is_seen(want: tuple) -> None:
    packs = [pack(documents(lengths), multiple_of=32) for lengths in GROUPS]
    check(run_ranks(split_rank, 1, packs, Layout(), timeout_s=200), want)
    for batch in packs:
        batch.targets_T[batch.cu_seqlens[-2] :] = 0
    (result,) = run_ranks(split_rank, 1, packs, Layout(), timeout_s=200)
    assert worst_error(result[1], want[1])[0] > 1000 * LIMIT
