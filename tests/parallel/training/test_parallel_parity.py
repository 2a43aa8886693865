"""Every layout computes the reference model's loss and gradients: all of them, in fp32, within 5e-6 of the largest.

Ranks are forked after the imports (`launch.run_ranks`); each test takes seconds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.reference import Phi4Mini
from phimini.parallel.attention import core as attention
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.hf_weights import gradients_to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training import schedule
from phimini.parallel.training.batch import Document, PackedBatch, next_token_targets, pack
from phimini.parallel.training.step import forward_backward

LIMIT = 5e-6
ORIGINAL_MAX = 16  # the LongRoPE boundary


def config(**changes: Any) -> ModelConfig:
    small = ModelConfig(
        num_layers=4, model_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=96, vocab_size=128,
        max_positions=64, original_max_positions=ORIGINAL_MAX, short_factor=(1.0, 1.1, 1.2, 1.2, 1.3, 1.4),
        long_factor=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0), initializer_range=0.1,
    )  # fmt: skip
    return dataclasses.replace(small, **changes)


def documents(lengths: list[int], vocab_size: int = 128) -> list[Document]:
    generator = torch.Generator().manual_seed(sum(lengths))
    out = []
    for n in lengths:
        tokens = torch.randint(0, vocab_size, (n,), generator=generator).tolist()
        trained = (torch.rand(n, generator=generator) > 0.3).tolist()
        trained[-1] = n > 1
        out.append(Document(tokens=tokens, targets=next_token_targets(tokens, trained)))
    return out


# Lengths below, exactly on and beyond the LongRoPE boundary; eight groups, of unequal size.
GROUPS = [[15, 3], [16], [17, 2, 1], [40], [16, 16], [5, 31], [1, 33], [20, 9, 4]]


def cross_entropy_head(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The plainest vocab-parallel head: every rank gathers the whole weight and computes everything."""
    if group.size() > 1:
        shards = [torch.empty_like(weight_VD) for _ in range(group.size())]
        dist.all_gather(shards, weight_VD.detach(), group=group)
        shards[group.rank()] = weight_VD
        weight_VD = torch.cat(shards)
    logits_MV = hidden_MD @ weight_VD.T
    loss = F.cross_entropy(logits_MV, batch.targets_T, ignore_index=-100, reduction="sum")
    trained = batch.targets_T >= 0
    right = ((logits_MV.argmax(-1) == batch.targets_T) & trained).sum()
    return loss, trained.sum(), {"right": right, "logit_sum": logits_MV.detach()[trained].sum()}


def reference(
    model_config: ModelConfig, groups: list[list[int]]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the plain model in fp64: every document alone, mean over all trained tokens."""
    model = Phi4Mini(model_config)
    model.init_weights(0)
    model.double()
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for document in (d for lengths in groups for d in documents(lengths)):
        logits = model.logits(model(torch.tensor([document.tokens])))[0]
        targets = torch.tensor(document.targets)
        loss = loss + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets >= 0).sum())
    (loss / count).backward()
    return (loss / count).item(), {
        k: p.grad for k, p in model.named_parameters() if p.grad is not None
    }


def share_of(groups: list[list[int]], rank: int, size: int) -> list[PackedBatch]:
    """This data rank's micro-batches."""
    mine = groups[rank * len(groups) // size : (rank + 1) * len(groups) // size]
    return [pack(documents(lengths)) for lengths in mine]


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


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Largest |difference| of a gradient, relative to the largest entry of that gradient, and its name."""
    assert got.keys() == want.keys()
    return max(
        (((got[k] - want[k]).abs().max() / want[k].abs().max()).nan_to_num(torch.inf).item(), k)
        for k in want
    )


def check(results: list, want: tuple[float, dict[str, Tensor]]) -> None:
    loss, gradients = want
    for rank, (got_loss, got_gradients, metrics) in enumerate(results):
        assert abs(got_loss - loss) <= LIMIT * abs(loss), (
            f"rank {rank}: loss {got_loss}, want {loss}"
        )
        error, name = worst_error(got_gradients, gradients)
        assert error <= LIMIT, (
            f"rank {rank}: gradient of {name} is off by {error:.2e} of its largest"
        )
        assert metrics == results[0][2], f"rank {rank} has other metrics than rank 0"


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in conftest, and also for torch.empty(requires_grad=True), which receives between pipeline stages."""
    allocate = torch.empty

    def nan_filled(*args, **kwargs) -> Tensor:
        t = allocate(*args, **kwargs)
        if t.is_floating_point() and not t.is_meta:
            t.detach().fill_(torch.nan)
        return t

    monkeypatch.setattr(torch, "empty", nan_filled)


@pytest.fixture(scope="module")
def want() -> tuple[float, dict[str, Tensor]]:
    return reference(config(), GROUPS)


LAYOUTS = {
    "single": (1, Layout(), {}),
    "dp2": (2, Layout(), {}),
    "tp2": (2, Layout(tensor=2), {}),
    "tp2-sp": (2, Layout(tensor=2, sequence_parallel=True), {}),
    "tp4": (4, Layout(tensor=4), {}),
    "pp2": (2, Layout(pipeline=2), {}),
    "pp4": (4, Layout(pipeline=4), {}),
    "pp2-vpp2": (2, Layout(pipeline=2, virtual_pipeline=2), {}),
    "tp2-pp2-sp": (4, Layout(tensor=2, pipeline=2, sequence_parallel=True), {}),
    "tp2-pp2-dp2": (8, Layout(tensor=2, pipeline=2), {}),
    "cp2": (2, Layout(context=2), {}),
    "cp4": (4, Layout(context=4), {}),
    "cp2-dp2": (4, Layout(context=2), {}),
    "cp2-pp2": (4, Layout(context=2, pipeline=2), {}),
    "cp2-tp2-sp": (4, Layout(context=2, tensor=2, sequence_parallel=True), {}),
    "cp2-ring": (2, Layout(context=2, context_keys="ring"), {}),
    "cp4-ring": (4, Layout(context=4, context_keys="ring"), {}),
    "cp2-pp2-ring": (4, Layout(context=2, pipeline=2, context_keys="ring"), {}),
    "cp2-tp2-sp-ring": (
        4,
        Layout(context=2, tensor=2, sequence_parallel=True, context_keys="ring"),
        {},
    ),
    "cp2-ring-selective": (
        2,
        Layout(context=2, context_keys="ring"),
        dict(recompute="selective"),
    ),
    "recompute": (1, Layout(), dict(recompute="full")),
    "tp2-sp-recompute": (2, Layout(tensor=2, sequence_parallel=True), dict(recompute="full")),
    "selective": (1, Layout(), dict(recompute="selective")),
    "pp2-selective": (2, Layout(pipeline=2), dict(recompute="selective")),
    "tp2-sp-selective": (
        2,
        Layout(tensor=2, sequence_parallel=True),
        dict(recompute="selective"),
    ),
    "dp2-overlap": (2, Layout(), dict(overlap=True)),
    "dp2-zero1": (2, Layout(), dict(distributed_optimizer=True)),
    "dp2-zero1-overlap": (2, Layout(), dict(distributed_optimizer=True, overlap=True)),
}


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
    """Eight groups of documents in `number` micro-batches, on each layout: all equal the reference, so each other."""
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
    right = attention.rotary_tables

    def without_factor(
        model_config: ModelConfig, positions_T: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        scale, sin = right(model_config, positions_T, longest)
        scale[..., : model_config.rotary_dim] /= model_config.attention_factor
        return scale, sin / model_config.attention_factor

    attention.rotary_tables = without_factor


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
