"""Small models with their transformers counterparts, and the bound on the difference of their outputs."""

import dataclasses

import torch
from torch import Tensor
from transformers import Phi3Config

from phimini.model.config import ModelConfig, preset
from phimini.model.reference import Phi4Mini


def hf_config(config: ModelConfig) -> Phi3Config:
    assert config.short_factor is not None and config.long_factor is not None
    return Phi3Config(
        hidden_size=config.model_dim,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_positions,
        original_max_position_embeddings=config.original_max_positions,
        pad_token_id=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.partial_rotary_factor,
            "short_factor": list(config.short_factor),
            "long_factor": list(config.long_factor),
            "original_max_position_embeddings": config.original_max_positions,
        },
    )


LIMIT = 1e-5  # relative to the largest


SMALL = dataclasses.replace(
    preset("tiny"), num_layers=2, mlp_dim=192, vocab_size=96, initializer_range=0.02
)


def build(config: ModelConfig = SMALL, seed: int = 0, width: float = 4.0) -> Phi4Mini:
    model = Phi4Mini(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(width) if p.ndim > 1 else p.uniform_(0.5, 1.5, generator=generator)
    return model


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max())
