"""Selective recomputation: bit-equal gradients, and the bytes that it saves.

At every kind of layout against the reference: test_parallel_losses.py (LAYOUTS of test_parallel_parity.py); in bytes
against the plan: test_plan.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from parity_cases import GROUPS, config, cross_entropy_head, share_of
from plan_cases import CONFIG, TOKENS, kept_bytes
from torch import Tensor

from phimini.parallel.megatron import builder, recompute
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.fp8 import Fp8
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.step import forward_backward

TP2_SP = Layout(tensor=2, sequence_parallel=True)


def gradients(layout: Layout, spoilt: bool = False, **options: Any) -> dict[str, list[Tensor]]:
    """Return the gradients of this rank's parameters, by recompute mode."""
    world = initialize(layout, config(), timeout_s=240)
    if spoilt:
        recompute._note = noted_twice_as_large
    found = {}
    for mode in ("none", "selective"):
        model = build_model(config(), world, seed=0, recompute=mode, **options)
        model.zero_grad()
        forward_backward(model, share_of(GROUPS, 0, 1), cross_entropy_head)
        found[mode] = [p.main_grad.clone() for _, p in model.named_parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    world.close()
    return found


def noted_twice_as_large(y: Tensor, op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y.made_again_by = lambda: 2 * op(x.detach())  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("layout", "options"),
    [(Layout(), {}), (TP2_SP, {}), (TP2_SP, dict(fp8=Fp8(recipe="blockwise", emulate=True)))],
    ids=["one", "tp2-sp", "tp2-sp-fp8"],
)
def test_gradients_are_the_same_to_the_last_bit(layout: Layout, options: dict) -> None:
    for found in run_ranks(lambda: gradients(layout, **options), layout.model_size, timeout_s=240):
        assert all(a.equal(b) for a, b in zip(found["none"], found["selective"], strict=True))


def test_what_is_made_again_is_what_the_gradients_use() -> None:
    """Negative control: recomputed outputs of twice the size double the gradients of the next linears."""
    (found,) = run_ranks(lambda: gradients(Layout(), spoilt=True), 1, timeout_s=240)
    (model,) = run_ranks(parameter_names, 1, timeout_s=240)
    for name, right, wrong in zip(model, found["none"], found["selective"], strict=True):
        after = any(linear in name for linear in ("linear_qkv", "linear_fc1", "linear_fc2"))
        assert wrong.equal(2 * right if after else right), name


def parameter_names() -> list[str]:
    world = initialize(Layout(), config())
    return [name for name, _ in build_model(config(), world).named_parameters()]


@pytest.mark.parametrize("layout", [Layout(), TP2_SP], ids=["one", "tp2-sp"])
def test_two_norm_outputs_and_one_product_less_per_layer(layout: Layout) -> None:
    def run() -> tuple[int, int, int]:
        world = initialize(layout, CONFIG)
        none, selective = kept_bytes(world, "none"), kept_bytes(world, "selective")
        builder.forgetting = lambda linear: (
            linear
        )  # the negative control: linears that keep their input
        return none, selective, kept_bytes(world, "selective")

    elements = (2 * CONFIG.model_dim + CONFIG.mlp_dim) // layout.tensor
    for none, selective, control in run_ranks(run, layout.model_size, timeout_s=240):
        assert none - selective == 4 * elements * TOKENS * CONFIG.num_layers
        assert control == none


def noted(x: Tensor) -> Tensor:
    y = torch.sin(x)
    recompute._note(y, torch.sin, x)
    return y


def test_nothing_is_noted_without_gradients() -> None:
    with torch.no_grad():
        y = noted(torch.zeros(2))
    assert not hasattr(y, "made_again_by")
    x = torch.zeros(2, requires_grad=True)
    assert noted(x).made_again_by().equal(torch.zeros(2))  # pyright: ignore[reportAttributeAccessIssue]
