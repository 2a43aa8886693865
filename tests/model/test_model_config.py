"""The presets' published sizes, and every rule that a config enforces."""

import dataclasses
import math

import pytest

from phimini.model.config import PHI4_MINI_LONG_FACTOR, PRESETS, preset


def test_phi4_mini_is_the_published_model() -> None:
    config = preset("phi-4-mini")
    assert config.num_parameters == 3_836_021_760
    assert config.rotary_dim == 96
    assert config.attention_factor == pytest.approx(1.1902380714, abs=1e-10)  # sqrt(17 / 12)
    assert config.short_factor == (1.0,) * 48
    for i in range(32):
        assert PHI4_MINI_LONG_FACTOR[i] == pytest.approx(32.03 ** (i / 31), rel=1e-8)


def test_tiny_keeps_every_shape_rule() -> None:
    config = preset("tiny")
    assert 400_000 <= config.num_parameters <= 1_000_000
    assert config.head_dim >= 32 and config.num_heads > config.num_kv_heads > 1
    assert config.partial_rotary_factor == 0.75 and config.tie_embeddings
    assert config.long_factor != config.short_factor and config.attention_factor > 1


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_long_is_the_default_table(name: str) -> None:
    config = preset(name)
    assert config.rope_divisors == config.long_factor
    assert dataclasses.replace(config, rope_factors="short").rope_divisors == config.short_factor


def test_plain_rope_has_no_factor() -> None:
    config = dataclasses.replace(preset("tiny"), short_factor=None, long_factor=None)
    assert config.attention_factor == 1.0
    assert config.rope_divisors == (1.0,) * 12


def test_attention_factor_is_one_without_extension() -> None:
    config = dataclasses.replace(preset("tiny"), original_max_positions=512)
    assert config.attention_factor == 1.0


def test_untied_head_is_counted() -> None:
    config = preset("tiny")
    untied = dataclasses.replace(config, tie_embeddings=False)
    assert untied.num_parameters - config.num_parameters == 256 * 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected a whole number from 1 to 1000, got 0"),
        ({"model_dim": 128.0}, "model_dim: expected a whole number from 1 to 1048576, got 128.0"),
        ({"num_kv_heads": 3}, "num_heads: 4 is not a multiple of num_kv_heads 3"),
        ({"partial_rotary_factor": 0.4, "head_dim": 33}, "gives 13 rotated dimensions"),
        (
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor: expected a number above 0 and up to 1, got 1.5",
        ),
        (
            {"partial_rotary_factor": 1e308},
            "partial_rotary_factor: expected a number above 0 and up to 1, got 1e.308",
        ),
        ({"num_layers": 10**6}, "num_layers: expected a whole number from 1 to 1000, got 1000000"),
        (
            {"vocab_size": 2**63},
            "vocab_size: expected a whole number from 1 to 100000000, got 9223372036854775808",
        ),
        ({"long_factor": None}, "given together or not at all"),
        ({"long_factor": (1.0,) * 11}, "long_factor: expected 12 values .* got 11"),
        (
            {"long_factor": (0.0,) * 12},
            "long_factor: expected a list in which each is a number above 0 .*, got .0.0",
        ),
        (
            {"short_factor": (float("nan"),) * 12},
            "short_factor: expected a list in which each is a number above 0 .*, got .nan",
        ),
        ({"original_max_positions": 1}, "original_max_positions: expected at least 2"),
        ({"rope_factors": "auto"}, "rope_factors: expected one of short, long, got 'auto'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_field_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset("tiny"), **change)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="unknown model preset 'phi-5'.*expected one of .*tiny"):
        preset("phi-5")
    with pytest.raises(ValueError) as long:
        preset("9" * 5000)
    assert len(str(long.value)) < 300


def test_attention_factor_formula() -> None:
    config = preset("tiny")  # 512 positions from 128
    assert config.attention_factor == math.sqrt(1 + math.log(4) / math.log(128))
