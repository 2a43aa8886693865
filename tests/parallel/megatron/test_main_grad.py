"""Weight gradients that products and the head add to Megatron's fp32 main_grad, under its real DDP."""

import dataclasses
from typing import Any

import pytest
import torch.distributed as dist
from forked_ranks import run_ranks
from parity_cases import GROUPS, config, share_of
from torch import Tensor

from phimini.kernels import linear_cross_entropy
from phimini.model.config import ModelConfig
from phimini.parallel.megatron import layers
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import PackedBatch
from phimini.parallel.training.step import forward_backward
from phimini.stages.run.training import cross_entropy_head

LIMIT = 1e-7
"""relative; fp32 sums in another order"""


def separate_head(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, metrics = linear_cross_entropy(hidden_MD, weight_VD, batch.targets_T, group=group)
    return loss, metrics.num_rows, {}


def gradients(
    layout: Layout, model_config: ModelConfig, options: dict, broken: bool = False
) -> tuple:
    """Return loss and gradients of this rank's parameters, made apart and as on a GPU, and the marked parameters."""
    world = initialize(layout, model_config, timeout_s=240)
    found = []
    for fused in (False, True):
        model = build_model(model_config, world, seed=0, **options)
        if fused:
            layers.on_gpu = lambda _: True
            layers.provide_fused_wgrad()
            for gpt in model.gpts:
                for module in gpt.modules():
                    if hasattr(module, "gradient_accumulation_fusion"):
                        setattr(module, "gradient_accumulation_fusion", True)  # noqa: B010
        if fused and broken:
            layers.linear.__globals__["add_product"] = lambda *_: None
        head = cross_entropy_head if fused else separate_head
        model.zero_grad()
        mine = share_of(GROUPS, world.data_rank, world.data_size)
        loss = forward_backward(model, mine, head).loss
        grads = {n: p.main_grad.clone() for n, p in model.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]
        marked = {n for n, p in model.named_parameters() if p.grad_added_to_main_grad}  # pyright: ignore[reportAttributeAccessIssue]
        found.append((loss, grads, marked))
    world.close()
    return tuple(found)


def worst(found: tuple) -> float:
    (_, want, _), (_, got, _) = found
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in want)


UNTIED = dataclasses.replace(config(), tie_embeddings=False)
CASES: dict[str, tuple[Layout, ModelConfig, dict[str, Any]]] = {
    "one": (Layout(), config(), {}),
    "selective": (Layout(), config(), dict(recompute="selective")),
    "full": (Layout(), config(), dict(recompute="full")),
    "dp2-overlap-zero1": (Layout(data=2), config(), dict(overlap=True, distributed_optimizer=True)),
    "dp2-overlap-untied": (Layout(data=2), UNTIED, dict(overlap=True)),
    "tp2-sp": (Layout(tensor=2, sequence_parallel=True), config(), {}),
    "tp2": (Layout(tensor=2), config(), {}),
    "pp2-tied": (Layout(pipeline=2), config(), {}),
    "dp2-pp2-overlap": (Layout(pipeline=2, data=2), config(), dict(overlap=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_separate_adds(name: str) -> None:
    layout, model_config, options = CASES[name]
    ranks = layout.model_size * (layout.data or 1)
    for found in run_ranks(gradients, ranks, layout, model_config, options, timeout_s=240):
        assert found[0][0] == pytest.approx(found[1][0], rel=LIMIT) and worst(found) <= LIMIT
        assert not found[0][2]
        of_linears = {n for n in found[1][1] if "linear" in n}
        own_head = {n for n in found[1][1] if "output_layer" in n}
        assert found[1][2] == of_linears | own_head


def test_a_dropped_sum_is_seen() -> None:
    (found,) = run_ranks(gradients, 1, Layout(), config(), {}, True, timeout_s=240)
    assert worst(found) > 0.5
