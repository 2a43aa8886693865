"""Refused settings of megatron-core, and proofs that it is wrong with them, as far as this machine can show."""

from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from parity_cases import (  # noqa: F401
    GROUPS,
    config,
    cross_entropy_head,
    poison_uninitialised_memory,
    reference,
    share_of,
    worst_error,
)

from phimini.parallel.megatron import builder
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.hf_weights import gradients_to_hf
from phimini.parallel.megatron.refused_settings import refuse_unmarked_norms, refuse_wrong_settings
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.optimizer import OptimizerConfig, build_optimizer
from phimini.parallel.training.step import forward_backward


def transformer_config(layout: Layout, world_size: int) -> TransformerConfig:
    def rank() -> TransformerConfig:
        world = initialize(layout, config(), timeout_s=60)
        return builder._transformer_config(config(), world, torch.float32, "none")

    return run_ranks(rank, world_size, timeout_s=60)[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(apply_rope_fusion=True), "ignores LongRoPE's attention factor"),
        (dict(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="native"), "rounds its gradient to bfloat16"),
        (dict(calculate_per_token_loss=False), "means of means"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_settings_are_refused(changes: dict[str, Any], says: str) -> None:
    good = transformer_config(Layout(), 1)
    refuse_wrong_settings(good)
    for name, value in changes.items():
        setattr(good, name, value)
    with pytest.raises(AssertionError, match=says):
        refuse_wrong_settings(good)


@pytest.mark.parametrize("batch_p2p", [True, False])
def test_batched_sends_of_two_interleaved_stages_are_refused(batch_p2p: bool) -> None:
    good = transformer_config(Layout(pipeline=2, virtual_pipeline=2), 2)
    refuse_wrong_settings(good)
    good.overlap_p2p_comm, good.batch_p2p_comm = False, batch_p2p
    with pytest.raises(AssertionError, match="matched wrongly"):
        refuse_wrong_settings(good)


def test_they_are_wrong_indeed() -> None:
    """Control: without the check, Megatron raises no error and the gradient differs."""

    def rank() -> dict[str, torch.Tensor]:
        world = initialize(Layout(pipeline=2, virtual_pipeline=2), config(), timeout_s=60)
        model = build_model(config(), world, seed=0)
        model.transformer_config.overlap_p2p_comm = False
        model.transformer_config.batch_p2p_comm = True
        model.zero_grad()
        forward_backward(model, share_of(GROUPS, 0, 1), cross_entropy_head)
        return {name: g.clone() for name, g in gradients_to_hf(model)}

    got = run_ranks(rank, 2, timeout_s=60)[0]
    assert worst_error(got, reference(config(), GROUPS)[1])[0] > 0.1


def test_a_norm_that_is_not_marked_is_refused() -> None:
    layout = Layout(tensor=2, sequence_parallel=True)

    def rank() -> str:
        world = initialize(layout, config(), timeout_s=60)
        model = build_model(config(), world)
        norm: Any = model.gpts[0].decoder.layers[1].input_layernorm
        norm.weight.sequence_parallel = False
        with pytest.raises(AssertionError, match=r"decoder\.layers\.1\.input_layernorm\.weight"):
            refuse_unmarked_norms(model.transformer_config, model.gpts[0])
        # Megatron's own norm for machines without Transformer Engine refuses by itself.
        with pytest.raises(AssertionError, match="sequence parallel"):
            WrappedTorchNorm(model.transformer_config, 64)
        return "refused"

    assert run_ranks(rank, 2, timeout_s=60) == ["refused"] * 2


def test_an_update_without_the_scheduler_is_refused() -> None:
    def rank() -> str:
        world = initialize(Layout(), config(), timeout_s=60)
        model: Model = build_model(config(), world)
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, total_steps=9))
        optimizer.zero_grad()
        forward_backward(model, share_of(GROUPS, 0, 1), cross_entropy_head)
        # As without a scheduler: it writes at its construction and at every step.
        optimizer.scheduler.step = lambda increment: None  # pyright: ignore[reportAttributeAccessIssue]
        for group in optimizer.megatron.param_groups:
            group["weight_decay"] = optimizer.config.weight_decay
        before = [p.detach().clone() for _, p in model.named_parameters()]
        with pytest.raises(AssertionError, match="it did not run"):
            optimizer.step()
        assert all(a.equal(p) for a, (_, p) in zip(before, model.named_parameters(), strict=True))
        return "refused"

    assert run_ranks(rank, 1, timeout_s=60) == ["refused"]
