"""The three fused losses at every layout: value and every gradient equal the formula on the reference model, and
three steps of the optimizer equal torch's AdamW."""

import pytest
import torch
from forked_ranks import run_ranks
from loss_cases import HEADS, batch_of, cross_entropy, reference_losses
from parity_cases import (  # noqa: F401
    LAYOUTS,
    LIMIT,
    config,
    documents,
    poison_uninitialised_memory,
    worst_error,
)
from torch import Tensor

from phimini import kernels
from phimini.model.config import ModelConfig
from phimini.model.reference import Phi4Mini
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import gradients_to_hf, to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.optimizer import OptimizerConfig, build_optimizer
from phimini.parallel.training.step import forward_backward

# Pairs of documents, at lengths around the LongRoPE boundary 16.
PAIRS = [[15, 3], [16, 17], [40, 5, 2, 10], [9, 31]]
# A large eps, or the sign of a gradient that is zero up to rounding would decide the step.
ADAMW = OptimizerConfig(lr=1e-2, total_steps=9, decay="constant", eps=1e-5, clip=0.5)
STEPS = 3


@pytest.fixture(scope="module")
def want() -> dict[str, tuple[float, dict[str, Tensor]]]:
    return reference_losses(config(), PAIRS)


@pytest.fixture(scope="module")
def want_weights() -> dict[str, Tensor]:
    return reference_steps(config())


def reference_steps(model_config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights after three steps of torch's AdamW on the cross-entropy, in fp64."""
    model = Phi4Mini(model_config)
    model.init_weights(0)
    model.double()
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    adamw = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=ADAMW.weight_decay), dict(params=vectors, weight_decay=0.0)],
        lr=ADAMW.lr, betas=ADAMW.betas, eps=ADAMW.eps,
    )  # fmt: skip
    for _ in range(STEPS):
        adamw.zero_grad()
        loss, count = torch.zeros((), dtype=torch.float64), 0.0
        for batch in map(batch_of, PAIRS):
            hidden = model(batch.tokens_T[None], cu_seqlens=batch.cu_seqlens)[0]
            part, m = kernels.linear_cross_entropy_reference(
                hidden, model.head_weight_VD, batch.targets_T
            )
            loss, count = loss + part, count + float(m.num_rows)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip)
        adamw.step()
    return model.state_dict()


Losses = dict[str, tuple[float, dict[str, Tensor]]]


def losses_rank(
    layout: Layout, options: dict, model_config: ModelConfig
) -> tuple[Losses, dict[str, Tensor]]:
    world = initialize(layout, model_config, timeout_s=200)
    model = build_model(model_config, world, seed=0, **options)
    n = len(PAIRS) // world.data_size
    batches = [
        batch_of(lengths) for lengths in PAIRS[world.data_rank * n : (world.data_rank + 1) * n]
    ]
    out = {}
    for name, head in HEADS.items():
        model.zero_grad()
        result = forward_backward(model, batches, head)
        out[name] = (result.loss, {k: v.clone() for k, v in gradients_to_hf(model)})
    optimizer = build_optimizer(
        model, ADAMW, distributed=options.get("distributed_optimizer", False)
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        forward_backward(model, batches, cross_entropy)
        optimizer.step()
    weights = {name: w.clone() for name, w in to_hf(model)}
    world.close()
    return out, weights


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_steps_match_the_formula(name: str, want: Losses, want_weights: dict) -> None:
    world_size, layout, options = LAYOUTS[name]
    compare(world_size, layout, options, config(), want, want_weights)


def test_losses_and_steps_of_four_interleaved_stages() -> None:
    """The other legal way of interleaving: from three stages on, sends may be batched."""
    eight = config(num_layers=8, model_dim=32, num_heads=2, num_kv_heads=2)
    layout = Layout(pipeline=4, virtual_pipeline=2)
    compare(4, layout, {}, eight, reference_losses(eight, PAIRS), reference_steps(eight))


def compare(
    world_size: int,
    layout: Layout,
    options: dict,
    model_config: ModelConfig,
    want: Losses,
    want_weights: dict[str, Tensor],
) -> None:
    results = run_ranks(losses_rank, world_size, layout, options, model_config, timeout_s=240)
    for rank, (got, weights) in enumerate(results):
        for name, weight in want_weights.items():
            error = (weights[name] - weight).abs().max()
            assert error <= 1e-5, f"rank {rank}: {name} is off by {error:.1e} after {STEPS} steps"
        for head, (loss, gradients) in want.items():
            got_loss, got_gradients = got[head]
            assert abs(got_loss - loss) <= LIMIT * abs(loss), (
                f"rank {rank}, {head}: {got_loss}, want {loss}"
            )
            error, tensor = worst_error(got_gradients, gradients)
            assert error <= LIMIT, (
                f"rank {rank}, {head}: gradient of {tensor} is off by {error:.2e}"
            )
