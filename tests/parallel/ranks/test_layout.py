"""Errors of a layout that does not fit suggest one that does."""

import dataclasses

import pytest

from phimini.model.config import preset
from phimini.parallel.ranks.layout import Layout

PHI, TINY = preset("phi-4-mini"), preset("tiny")


def test_data_is_what_the_world_leaves() -> None:
    layout = Layout(tensor=2, pipeline=4, context=2, sequence_parallel=True).resolve(64, PHI)
    assert layout.data == 4
    assert layout.model_size == 16
    assert Layout().resolve(1, TINY).data == 1
    assert Layout(data=3).resolve(3, TINY).data == 3


@pytest.mark.parametrize(
    ("layout", "world_size", "says"),
    [
        (Layout(tensor=2, pipeline=2), 6, "world size 6 is not a multiple of .* = 4; world sizes 4 or 8"),
        (Layout(tensor=4), 2, "world sizes 4 would fit|world sizes 4 or"),
        (Layout(data=3), 4, "Layout.data: 3 was asked for, but world size 4 .* leaves 4"),
        (Layout(tensor=3), 3, r"tensor: 3 does not divide the model's num_kv_heads 8; tensor in \[1, 2, 4, 8\]"),
        (Layout(pipeline=33), 33, "33 chunks, but the model has 32 layers; a product of at most 32 would fit"),
        (Layout(pipeline=8, virtual_pipeline=5), 8, "virtual_pipeline 5 = 40 chunks"),
    ],
    ids=["world", "small-world", "data", "heads", "layers", "chunks"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(layout: Layout, world_size: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layout.resolve(world_size, PHI)


def test_vocabulary_and_mlp_must_divide() -> None:
    with pytest.raises(ValueError, match="vocab_size 257"):
        Layout(tensor=2).resolve(2, dataclasses.replace(TINY, vocab_size=257))
    with pytest.raises(ValueError, match="mlp_dim 255"):
        Layout(tensor=2).resolve(2, dataclasses.replace(TINY, mlp_dim=255))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(tensor=0), "Layout.tensor: expected a positive integer, got 0"),
        (dict(data=-1), "Layout.data: expected a positive integer, got -1"),
        (dict(pipeline=True), "Layout.pipeline: expected a positive integer, got True"),
        (dict(virtual_pipeline=2), "need pipeline > 1"),
        (dict(sequence_parallel=True), "needs tensor > 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_nonsense_is_refused(fields: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Layout(**fields)


@pytest.mark.parametrize(
    ("layout", "multiple"),
    [
        (Layout(), 1),
        (Layout(tensor=4), 1),
        (Layout(tensor=4, sequence_parallel=True), 4),
        (Layout(context=2), 4),
        (Layout(context=2, tensor=2, sequence_parallel=True), 8),
    ],
)
def test_tokens_are_padded_to_what_divides(layout: Layout, multiple: int) -> None:
    assert layout.token_multiple == multiple


@pytest.mark.parametrize(
    ("layout", "model", "layers"),
    [
        (Layout(), PHI, (32,)),
        # The head is worth 6.1 layers: 19 = 12.9 + 6.1.
        (Layout(pipeline=2), PHI, (19, 13)),
        (Layout(pipeline=4), PHI, (9, 10, 10, 3)),
        (Layout(pipeline=2, virtual_pipeline=2), PHI, (9, 10, 10, 3)),
        (Layout(pipeline=8), PHI, (4, 4, 4, 4, 5, 5, 5, 1)),
        (Layout(pipeline=2), TINY, (2, 2)),
        (Layout(pipeline=4), TINY, (1, 1, 1, 1)),
        (Layout(pipeline=2), dataclasses.replace(TINY, num_layers=5), (3, 2)),
        (Layout(pipeline=32), PHI, (1,) * 32),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_the_last_stage_gets_fewer_layers_because_it_has_the_head(layout, model, layers) -> None:
    split = layout.layers_of_chunks(model)
    assert split == layers and sum(split) == model.num_layers
