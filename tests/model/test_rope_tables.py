"""LongRoPE tables against transformers and vLLM's formula, and the rotation against complex numbers."""

import dataclasses

import pytest
import torch
from model_cases import hf_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from phimini.model.config import preset
from phimini.model.rope import apply_rope, inv_freq, rope_at, rope_table


@pytest.mark.parametrize("name", ["phi-4-mini", "tiny"])
@pytest.mark.parametrize("factors", ["short", "long"])
def test_frequencies_are_transformers_bit_for_bit(name: str, factors: str) -> None:
    config = dataclasses.replace(preset(name), rope_factors=factors)
    seq_len = config.original_max_positions + (factors == "long")
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](
        hf_config(config), torch.device("cpu"), seq_len=seq_len
    )
    assert torch.equal(inv_freq(config), theirs)
    assert config.attention_factor == attention_factor


def test_the_two_tables_differ() -> None:
    config = preset("phi-4-mini")
    short = dataclasses.replace(config, rope_factors="short")
    assert inv_freq(config)[0] == inv_freq(short)[0]  # the first divisor is 1 in both
    assert (inv_freq(config)[1:] < inv_freq(short)[1:]).all()


@pytest.mark.parametrize("position", [0, 1, 4095, 4096, 131071])
def test_table_rows_at_the_boundary_and_the_end(position: int) -> None:
    config = preset("phi-4-mini")
    cos, sin = rope_at(config, torch.tensor([position]))
    angle = position * inv_freq(config).double()
    # fp32 angles: at position 131071 they carry 2^-24 of 131071 rad.
    limit = 1e-6 + position * 2.0**-23
    assert (cos[0] - angle.cos() * config.attention_factor).abs().max() < limit
    assert (sin[0] - angle.sin() * config.attention_factor).abs().max() < limit


def test_table_is_the_same_row_by_row() -> None:
    config = preset("tiny")
    cos, sin = rope_table(config, 300)
    at = torch.tensor([[7, 299], [128, 0]])
    cos_at, sin_at = rope_at(config, at)
    assert cos.shape == (300, 12)
    torch.testing.assert_close(cos[at], cos_at, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[at], sin_at, rtol=0, atol=1e-6)


def test_table_is_not_made_beyond_the_model() -> None:
    with pytest.raises(ValueError, match="at most max_positions = 512 positions, got 513"):
        rope_table(preset("tiny"), 513)


def test_rotation_is_a_complex_product_on_the_first_part() -> None:
    config = preset("tiny")
    x = torch.randn(2, 9, 4, 32, dtype=torch.float64)
    cos, sin = rope_table(config, 9, dtype=torch.float64)
    y = apply_rope(x, cos[:, None], sin[:, None])
    turn = torch.complex(cos, sin)[:, None]
    z = torch.complex(x[..., :12], x[..., 12:24]) * turn
    torch.testing.assert_close(y[..., :12], z.real)
    torch.testing.assert_close(y[..., 12:24], z.imag)
    assert torch.equal(y[..., 24:], x[..., 24:])


def test_scores_depend_on_distance_alone() -> None:
    config = preset("tiny")
    q, k = torch.randn(2, 1, 32, dtype=torch.float64)
    cos, sin = rope_table(config, 200, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        return (apply_rope(q, cos[i], sin[i]) * apply_rope(k, cos[j], sin[j])).sum()

    torch.testing.assert_close(score(40, 10), score(190, 160), rtol=1e-4, atol=1e-4)
    assert (score(40, 10) - score(40, 11)).abs() > 1e-3


def test_bf16_heads_keep_their_dtype() -> None:
    cos, sin = rope_table(preset("tiny"), 4)
    y = apply_rope(torch.randn(4, 32, dtype=torch.bfloat16), cos, sin)
    assert y.dtype == torch.bfloat16
