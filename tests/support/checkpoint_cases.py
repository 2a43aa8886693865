"""A small model and optimizer to save and load."""

import torch
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.hf_weights import slots, to_hf
from phimini.parallel.megatron.weight_names import hf_names, take_shard
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.optimizer import Optimizer, OptimizerConfig, build_optimizer

CONFIG = ModelConfig(
    num_layers=4, model_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=96, vocab_size=128,
    max_positions=64, original_max_positions=64, initializer_range=0.1,
)  # fmt: skip


# A large eps: near-zero gradients must not turn rounding into full steps.
ADAM = OptimizerConfig(lr=1e-2, warmup_steps=2, total_steps=20, eps=1e-5)


def build(
    layout: Layout, *, config: ModelConfig = CONFIG, seed: int = 0, zero1: bool = False,
    dtype: torch.dtype = torch.float32, adam: OptimizerConfig = ADAM,
) -> tuple[Model, Optimizer]:  # fmt: skip
    world = initialize(layout, config)
    model = build_model(config, world, seed=seed, dtype=dtype, distributed_optimizer=zero1)
    return model, build_optimizer(model, adam, distributed=zero1)


def fake_steps(model: Model, optimizer: Optimizer, steps: range) -> dict[str, Tensor]:
    """Update with random gradients that depend only on step and tensor; return the weights."""
    world = model.world
    for step in steps:
        optimizer.zero_grad()
        for slot in slots(model):
            generator = torch.Generator().manual_seed(hash((step, len(slot.hf_name))) % 2**31)
            shape = hf_names(model.config)[slot.hf_name]
            whole = torch.randn(shape, generator=generator)
            shard = take_shard(
                whole, slot.split, world.tensor_rank, world.layout.tensor, model.config
            )
            slot.parameter.main_grad.copy_(shard)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    return {name: t.clone() for name, t in to_hf(model)}
