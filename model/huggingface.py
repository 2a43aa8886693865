"""Hugging Face folders in and out: config.json, generation_config.json and safetensors with Phi3's names.

Two generations of config.json are read: `rope_scaling` beside top-level rope fields (transformers 4, as Phi-4-mini
ships it) and `rope_parameters` (transformers 5). The first is written, because both generations of transformers
and vLLM read it. One key is ours: `phimini_rope_factors`, the table that the run was trained with; others
ignore it. Weights are safetensors only: nothing is ever unpickled.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from phimini.model.config import ModelConfig, RopeFactors
from phimini.model.reference import Phi4Mini
from phimini.model.tensor_files import (
    TensorFiles,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

__all__ = [
    "check_tensors",
    "load_config",
    "load_reference",
    "parameter_shapes",
    "read_tensors",
    "save_config",
    "save_reference",
    "write_tensors",
]

ROPE_FACTORS_KEY = "phimini_rope_factors"
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
ORIGINAL_MAX_POSITIONS = 4096
"""what transformers' Phi3Config takes where a LongRoPE file does not say"""

_REQUIRED = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "model_dim",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
}
_ROPE_KEYS = frozenset(
    {"type", "rope_type", "short_factor", "long_factor", "rope_theta", "partial_rotary_factor",
     "original_max_position_embeddings", "factor", "attention_factor"}
)  # fmt: skip
# Fields that would change what the model computes, and the only values that mean "not used".
_MUST_BE_OFF = (
    "attention_bias", "mlp_bias", "lm_head_bias", "resid_pdrop", "embd_pdrop", "attention_dropout"
)  # fmt: skip


def load_config(
    directory: str | os.PathLike, rope_factors: RopeFactors | None = None
) -> ModelConfig:
    """Reads config.json of either generation.

    `rope_factors` overrides what the file says about the run's table; a file that says nothing means "long".
    ValueError names the file and the key: not a phi3 model, a missing key, an unknown rope type, or a
    field that asks for something this model does not do (biases, dropout, an attention window).
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "phi3":
        raise ValueError(f"{path}: model_type: expected 'phi3', got {raw.get('model_type')!r}")
    missing = [key for key in _REQUIRED if type(raw.get(key)) is not int]
    if missing:
        raise ValueError(
            f"{path}: expected an integer under {missing[0]!r}, got {raw.get(missing[0])!r}"
        )
    for key in _MUST_BE_OFF:
        if raw.get(key):
            raise ValueError(f"{path}: {key}: expected it off, got {raw[key]!r}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act: expected 'silu', got {raw['hidden_act']!r}")
    window = raw.get("sliding_window")
    if window is not None and not (
        isinstance(window, int) and window >= raw["max_position_embeddings"]
    ):
        raise ValueError(
            f"{path}: sliding_window: expected none below max_position_embeddings, got {window!r}"
        )
    fields = {ours: raw[theirs] for theirs, ours in _REQUIRED.items()}
    fields["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    fields["num_kv_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    fields["norm_eps"] = raw.get("rms_norm_eps", 1e-5)
    fields["tie_embeddings"] = raw.get("tie_word_embeddings", False)
    fields["initializer_range"] = raw.get("initializer_range", 0.02)
    fields["rope_factors"] = rope_factors or raw.get(ROPE_FACTORS_KEY, "long")
    fields |= _rope_fields(path, raw)
    try:
        config = ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_attention_factor(path, raw, config)
    return config


def _rope_dict(raw: dict) -> dict:
    return raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers' order


def _rope_fields(path: Path, raw: dict) -> dict:
    rope = _rope_dict(raw)
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope parameters: expected an object, got {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "longrope", "su"):  # su: what longrope was first called
        raise ValueError(f"{path}: rope type: expected 'default' or 'longrope', got {rope_type!r}")
    unknown = sorted(rope.keys() - _ROPE_KEYS)
    if unknown:
        raise ValueError(
            f"{path}: rope parameters: unknown key {unknown[0]!r}; expected {sorted(_ROPE_KEYS)}"
        )

    def either(key: str, default: object) -> object:
        return rope[key] if rope.get(key) is not None else raw.get(key, default)

    fields = {
        "rope_theta": either("rope_theta", 10000.0),
        "partial_rotary_factor": either("partial_rotary_factor", 1.0),
        # transformers gives the top-level field priority here, and here only.
        "original_max_positions": raw.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or (raw["max_position_embeddings"] if rope_type == "default" else ORIGINAL_MAX_POSITIONS),
    }
    if rope_type == "default":
        return fields
    for key in ("short_factor", "long_factor"):
        values = rope.get(key)
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            raise ValueError(f"{path}: {key}: expected a list of numbers, got {values!r}")
        fields[key] = tuple(float(v) for v in values)
    return fields


def _check_attention_factor(path: Path, raw: dict, config: ModelConfig) -> None:
    """transformers lets a file overrule the attention factor; ours follows from the two lengths."""
    rope = _rope_dict(raw)
    ratio = config.max_positions / config.original_max_positions
    for key, implied in (("factor", ratio), ("attention_factor", config.attention_factor)):
        given = rope.get(key)
        if (
            config.long_factor is not None
            and given is not None
            and not (isinstance(given, int | float) and abs(given - implied) <= 1e-6 * implied)
        ):
            raise ValueError(
                f"{path}: {key}: expected {implied} (from the two maximum lengths), got {given}"
            )


def save_config(
    config: ModelConfig,
    directory: str | os.PathLike,
    *,
    stop_ids: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes config.json and generation_config.json.

    `stop_ids` is `Tokenizer.stop_ids`: generation ends at any of them, and the last one is bos, eos and pad.
    """
    document_end = stop_ids[-1] if stop_ids else None
    special = {
        "bos_token_id": document_end,
        "eos_token_id": document_end,
        "pad_token_id": document_end,
    }
    rope_scaling = None
    if config.long_factor is not None and config.short_factor is not None:
        # Exactly these three keys: transformers 4 refuses any other.
        rope_scaling = {
            "type": "longrope",
            "short_factor": list(config.short_factor),
            "long_factor": list(config.long_factor),
        }
    raw = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **{theirs: getattr(config, ours) for theirs, ours in _REQUIRED.items()},
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_kv_heads,
        "original_max_position_embeddings": config.original_max_positions,
        "partial_rotary_factor": config.partial_rotary_factor,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        ROPE_FACTORS_KEY: config.rope_factors,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "sliding_window": None,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **special,
    }
    generation = special | {"eos_token_id": list(stop_ids) or None}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", raw)
    write_json(
        directory / "generation_config.json", {k: v for k, v in generation.items() if v is not None}
    )


def check_tensors(config: ModelConfig, files: TensorFiles) -> None:
    """ValueError names file and tensor: a missing one, one too many, one of another shape, or quantised."""
    expected = parameter_shapes(config)
    for name, shape in expected.items():
        if name not in files:
            raise ValueError(f"{files.directory}: tensor {name} is missing; expected shape {shape}")
        if files.shape(name) != shape:
            raise ValueError(
                f"{files.directory / files.file_of[name]}: {name}: expected shape {shape}, got {files.shape(name)}"
            )
        if files.dtype(name) not in _WEIGHT_DTYPES:
            raise ValueError(
                f"{files.directory / files.file_of[name]}: {name}: expected {', '.join(_WEIGHT_DTYPES)}, "
                f"got {files.dtype(name)}"
            )
    # Some exporters store a tied head beside the embedding; it may not say anything else.
    if config.tie_embeddings and "lm_head.weight" in files:
        if not torch.equal(files["lm_head.weight"], files["model.embed_tokens.weight"]):
            raise ValueError(
                f"{files.directory / files.file_of['lm_head.weight']}: lm_head.weight differs from "
                "model.embed_tokens.weight, but config.json ties them"
            )
        expected["lm_head.weight"] = ()
    extra = sorted(files.keys() - expected.keys())
    if extra:
        raise ValueError(
            f"{files.directory / files.file_of[extra[0]]}: tensor {extra[0]} is none of this model's "
            f"({len(extra)} too many)"
        )


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of `Phi3ForCausalLM` by Hugging Face's name, in the order of the layers."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Phi4Mini(config).named_parameters()}


def load_reference(
    directory: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,  # None: as stored
    device: torch.device | str = "cpu",
    rope_factors: RopeFactors | None = None,
) -> Phi4Mini:
    config = load_config(directory, rope_factors)
    files = read_tensors(directory)
    check_tensors(config, files)
    with torch.device("meta"):
        model = Phi4Mini(config)
    state = {
        name: files[name].to(device=device, dtype=dtype) for name, _ in model.named_parameters()
    }
    model.load_state_dict(state, assign=True)
    return model


def save_reference(
    model: Phi4Mini,
    directory: str | os.PathLike,
    *,
    stop_ids: Sequence[int] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Config and weights; a tied head is not written twice. The tokenizer saves itself."""
    save_config(model.config, directory, stop_ids=stop_ids, dtype=model.head_weight_VD.dtype)
    named = ((name, p.detach()) for name, p in model.named_parameters())
    write_tensors(named, directory, max_shard_bytes=max_shard_bytes)
