"""Layouts, batches and the check that a parallel step equals the one-rank step."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.reference import Phi4Mini
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.training.batch import Document, PackedBatch, next_token_targets, pack

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
    """Compute a plain vocab-parallel cross-entropy: every rank gathers the whole weight and computes all of it."""
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
    """Return loss and gradients of the plain model in fp64: each document alone, mean over all trained tokens."""
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
    """Return this data rank's micro-batches."""
    mine = groups[rank * len(groups) // size : (rank + 1) * len(groups) // size]
    return [pack(documents(lengths)) for lengths in mine]


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest |difference| of a gradient, relative to its largest entry, and its name."""
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
    """Poison as in conftest, and also torch.empty(requires_grad=True), the receive buffer between pipeline stages."""
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
