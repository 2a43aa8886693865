"""LongRoPE on part of each head: frequencies, tables and the rotation.

K head size, R rotary size (the first R of K dimensions are rotated, the others pass through).

    angle[p, i] = p / (divisor_i * theta^(2i / R))                            i = 0 .. R/2 - 1
    y[i]        = a * (x[i] * cos(angle_i) - x[i + R/2] * sin(angle_i))
    y[i + R/2]  = a * (x[i + R/2] * cos(angle_i) + x[i] * sin(angle_i))

`a` is the attention factor. It multiplies cos and sin, so only the rotated part of a score grows (by a^2).
The divisors come from `ModelConfig.rope_divisors`: one table for the whole run. Hugging Face chooses the table
by the longest row of each batch, and vLLM by `max_model_len`. A run that mixed them would train one function and
sample from another.
LongRoPE: arXiv 2402.13753; half-split rotation and partial rotary as in transformers' `modeling_phi3.py`.
"""

import torch
from torch import Tensor

from phimini.model.config import ModelConfig


def inv_freq(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Return (R/2,) radians per position in fp32, in the order of operations of transformers and vLLM."""
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device)
    divisors = torch.tensor(config.rope_divisors, dtype=torch.float32, device=device)
    return 1.0 / (divisors * config.rope_theta ** (exponent / config.rotary_dim))


def rope_at(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) at integer positions of any shape, each (*positions.shape, R/2), with the attention factor.

    The angles are computed in fp32 for every `dtype`, because bf16 cannot represent all integers above 256.
    """
    angles = positions.to(torch.float32)[..., None] * inv_freq(config, positions.device)
    a = config.attention_factor
    return (angles.cos() * a).to(dtype), (angles.sin() * a).to(dtype)


def rope_table(
    config: ModelConfig,
    num_positions: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of positions 0 to num_positions - 1, each (num_positions, R/2), with the attention factor.

    Raises ValueError beyond `config.max_positions`, the longest sequence that the long table is made for.
    """
    if num_positions > config.max_positions:
        raise ValueError(
            f"rope_table: expected at most max_positions = {config.max_positions} positions, got {num_positions}"
        )
    return rope_at(config, torch.arange(num_positions, device=device), dtype)


def apply_rope(
    x: Tensor,  # (..., K)
    cos: Tensor,  # broadcasts against (..., R/2)
    sin: Tensor,
) -> Tensor:
    """Rotate the first R dimensions of each head. For heads (B, T, H, K) pass tables as (T, 1, R/2)."""
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)
