"""Reader and writer of Hugging Face folders: config.json, generation_config.json and safetensors with Phi3's names.

A Llama is read too, where it is a Phi-3 whose q, k, v and gate, up are stored apart: no biases, plain RoPE over whole
heads. It is written as a Phi-3.

It reads two generations of config.json: `rope_scaling` with top-level rope fields (transformers 4, as Phi-4-mini
ships it) and `rope_parameters` (transformers 5). It writes the first.

A model is trained with one rope table at every length. By default transformers takes the short table up to
`original_max_position_embeddings`, and so does vLLM unless its `max_model_len` is larger; its default
`max_model_len` is that boundary. An export therefore has:
- the trained table under both names, and the boundary at the model's last position;
- the attention factor, which no longer follows from the two lengths: as `attention_factor` for transformers 5, as
  the two mscales for vLLM. transformers 4 refuses these keys in `rope_scaling`; without them it would silently
  compute another function;
- `phimini_rope_factors`, the name of the trained table, which other readers ignore;
- `phimini_rope_scaling`, both original tables and the boundary between them for further training.

vLLM's default `max_model_len` of an export is the model's 131,072 tokens; set a shorter one on a small GPU. In bf16,
transformers and vLLM round cosines and sines to bf16, and the trainer does not. A reader that derives the attention
factor from the two lengths instead of reading it computes another function.

Weights are safetensors only; pickles are never read.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from phimini.model.config import ModelConfig, RopeFactors, preset
from phimini.model.io.json_files import read_object, write_json
from phimini.model.io.safetensors_folder import (
    TensorFiles,
    read_tensors,
    write_tensors,
)
from phimini.model.reference import Phi4Mini

__all__ = [
    "ROPE_FACTORS_KEY",
    "check_tensors",
    "config_of",
    "load_config",
    "load_reference",
    "parameter_shapes",
    "read_tensors",
    "save_config",
    "save_reference",
    "write_tensors",
]

ROPE_FACTORS_KEY = "phimini_rope_factors"
_ROPE_SCALING_KEY = "phimini_rope_scaling"
_KEPT = ("short_factor", "long_factor", "original_max_position_embeddings")
_ATTENTION_FACTORS = ("attention_factor", "short_mscale", "long_mscale")
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
_NORM_EPS = {"phi3": 1e-5, "llama": 1e-6}
"""transformers' defaults by model_type"""
ORIGINAL_MAX_POSITIONS = 4096
"""transformers' default for a LongRoPE file without the field"""

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
     "original_max_position_embeddings", "factor", *_ATTENTION_FACTORS}
)  # fmt: skip
# Fields that would change the model's function, with the values that mean "not used".
_MUST_BE_OFF = (
    "attention_bias", "mlp_bias", "lm_head_bias", "resid_pdrop", "embd_pdrop", "attention_dropout"
)  # fmt: skip


def config_of(model: str, rope_factors: RopeFactors | None = None) -> ModelConfig:
    """Return a preset by its name, or the shape in a config.json by its path; errors as in `load_config`."""
    if not model.endswith(".json"):
        config = preset(model)
        return dataclasses.replace(config, rope_factors=rope_factors or config.rope_factors)
    if not Path(model).is_file():
        raise ValueError(f"model={model:.200}: no such file; expected a Hugging Face config.json")
    return read_config(Path(model), rope_factors)


def load_config(
    directory: str | os.PathLike, rope_factors: RopeFactors | None = None
) -> ModelConfig:
    """Read the config.json of a folder; see `read_config`."""
    return read_config(Path(directory) / "config.json", rope_factors)


def read_config(path: Path, rope_factors: RopeFactors | None = None) -> ModelConfig:
    """Read a config.json of either generation.

    `rope_factors` overrides the table that the file names; the default is "long". Raises ValueError that names the
    file and the key if it is not a phi3 or llama model, a key is missing, the rope type is unknown, or a field asks for
    a feature that this model lacks (biases, dropout, an attention window).
    """
    raw = read_object(path)
    if str(raw.get("model_type")) not in _NORM_EPS:  # of any JSON type
        raise _refused(path, "model_type", "'phi3' or 'llama'", raw.get("model_type"))
    for key in _REQUIRED:
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise _refused(path, key, "a positive integer", raw.get(key))
    for key in _MUST_BE_OFF:
        if raw.get(key):
            raise _refused(path, key, "it off", raw[key])
    if raw.get("hidden_act", "silu") != "silu":
        raise _refused(path, "hidden_act", "'silu'", raw["hidden_act"])
    window = raw.get("sliding_window")
    if window is not None and not (
        isinstance(window, int) and window >= raw["max_position_embeddings"]
    ):
        raise _refused(path, "sliding_window", "none below max_position_embeddings", window)
    fields = {ours: raw[theirs] for theirs, ours in _REQUIRED.items()}
    fields["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    fields["num_kv_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    fields["norm_eps"] = raw.get("rms_norm_eps", _NORM_EPS[raw["model_type"]])
    fields["tie_embeddings"] = raw.get("tie_word_embeddings", False)
    fields["initializer_range"] = raw.get("initializer_range", 0.02)
    fields["rope_factors"] = raw.get(ROPE_FACTORS_KEY, "long")
    fields |= _rope_fields(path, _before_export(path, raw))
    try:
        config = ModelConfig(**fields)
        asked = dataclasses.replace(config, rope_factors=rope_factors or config.rope_factors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if _ROPE_SCALING_KEY in raw:
        _check_export(path, raw, config)
    else:
        _check_attention_factor(path, raw, config)
    return asked


def _refused(path: Path, key: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{path}: {key}: expected {expected}, got {got!r:.100}")


def _rope_dict(path: Path, raw: dict) -> dict:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers' order
    if not isinstance(rope, dict):
        raise _refused(path, "rope parameters", "an object", rope)
    return rope


def _rope_fields(path: Path, raw: dict) -> dict:
    rope = _rope_dict(path, raw)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "longrope", "su"):  # su: the first name of longrope
        raise _refused(path, "rope type", "'default' or 'longrope'", rope_type)
    unknown = sorted(rope.keys() - _ROPE_KEYS)
    if unknown:
        raise ValueError(
            f"{path}: rope parameters: unknown key {unknown[0]!r:.100}; expected {sorted(_ROPE_KEYS)}"
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
    if raw["model_type"] == "llama" and (rope_type, fields["partial_rotary_factor"]) != ("default", 1.0):  # fmt: skip
        found = {"rope_type": rope_type, "partial_rotary_factor": fields["partial_rotary_factor"]}
        raise _refused(path, "rope parameters", "plain RoPE over whole heads of a llama", found)
    if rope_type == "default":
        return fields
    for key in ("short_factor", "long_factor"):
        values = rope.get(key)
        if not isinstance(values, list):
            raise _refused(path, key, "a list of numbers", values)
        # An integer stays one if no float holds it, and is refused for its size.
        fields[key] = tuple(float(v) if type(v) is int and v < 2**53 else v for v in values)
    return fields


def _before_export(path: Path, raw: dict) -> dict:
    """Return config.json with the two tables and the boundary that `_exported_rope` replaced."""
    if _ROPE_SCALING_KEY not in raw:
        return raw
    kept = raw[_ROPE_SCALING_KEY]
    if not isinstance(kept, dict) or kept.keys() != set(_KEPT):
        raise _refused(path, _ROPE_SCALING_KEY, f"an object with {', '.join(_KEPT)}", kept)
    rope = {key: kept.get(key, value) for key, value in _rope_dict(path, raw).items()}
    return raw | {"rope_scaling": rope, _KEPT[2]: kept[_KEPT[2]]}


def _check_export(path: Path, raw: dict, config: ModelConfig) -> None:
    """Raise ValueError if an export's public rope fields are no longer those of the trained table."""
    given = raw | _rope_dict(path, raw)
    for key, value in _exported_rope(config).items():
        if key != "type" and given.get(key) != value:
            raise ValueError(
                f"{path}: {key}: expected {value} (the {config.rope_factors} table that the model was trained "
                f"with, see {_ROPE_SCALING_KEY}), got {given.get(key)!r:.100}"
            )


def _exported_rope(config: ModelConfig) -> dict:
    """Return rope fields with which every reader computes the trained function at any length (LongRoPE only)."""
    table = list(config.rope_divisors)
    return {
        "type": "longrope",
        "short_factor": table,
        "long_factor": table,
        "original_max_position_embeddings": config.max_positions,
        **dict.fromkeys(_ATTENTION_FACTORS, config.attention_factor),
    }


def _check_attention_factor(path: Path, raw: dict, config: ModelConfig) -> None:
    """Raise ValueError if a file overrides the attention factor, which must follow from the two lengths."""
    rope = _rope_dict(path, raw)
    implied_by: dict[str, float] = dict.fromkeys(_ATTENTION_FACTORS, config.attention_factor)
    implied_by["factor"] = config.max_positions / config.original_max_positions
    for key, implied in implied_by.items():
        given = rope.get(key)
        low, high = implied * (1 - 1e-6), implied * (1 + 1e-6)
        if (
            config.long_factor is not None
            and given is not None
            and not (type(given) in (int, float) and low <= given <= high)
        ):
            raise _refused(path, key, f"{implied} (from the two maximum lengths)", given)


def save_config(
    config: ModelConfig,
    directory: str | os.PathLike,
    *,
    stop_ids: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json and generation_config.json.

    config.json gives every reader the trained rope table at every length, and `load_config` both tables.
    `stop_ids` is `Tokenizer.stop_ids`. Generation ends at any of them, and the last one is bos, eos and pad.
    """
    document_end = stop_ids[-1] if stop_ids else None
    special = {
        "bos_token_id": document_end,
        "eos_token_id": document_end,
        "pad_token_id": document_end,
    }
    rope: dict[str, object] = {
        "original_max_position_embeddings": config.original_max_positions,
        "rope_scaling": None,
    }
    if config.long_factor is not None and config.short_factor is not None:
        exported = _exported_rope(config)
        rope["original_max_position_embeddings"] = exported.pop("original_max_position_embeddings")
        rope["rope_scaling"] = exported
        kept = (config.short_factor, config.long_factor, config.original_max_positions)
        rope[_ROPE_SCALING_KEY] = dict(zip(_KEPT, kept, strict=True))
    raw = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **{theirs: getattr(config, ours) for theirs, ours in _REQUIRED.items()},
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_kv_heads,
        "partial_rotary_factor": config.partial_rotary_factor,
        "rope_theta": config.rope_theta,
        **rope,
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
    """Raise ValueError that names file and tensor if one is missing, unexpected, of another shape, or quantised."""
    expected = parameter_shapes(config)
    for name, shape in expected.items():
        if name not in files:
            raise ValueError(f"{files.directory}: tensor {name} is missing; expected shape {shape}")
        if files.shape(name) != shape:
            raise ValueError(
                f"{files.directory / files.file_of[name]}: {name}: expected shape {shape}, got {files.shape(name)!s:.100}"
            )
        if files.dtype(name) not in _WEIGHT_DTYPES:
            raise ValueError(
                f"{files.directory / files.file_of[name]}: {name}: expected {', '.join(_WEIGHT_DTYPES)}, "
                f"got {files.dtype(name)}"
            )
    # Some exporters store a tied head besides the embedding; the two must be equal.
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
            f"{files.directory / files.file_of[extra[0]]}: tensor {extra[0]!r:.100} is none of this model's "
            f"({len(extra)} too many)"
        )


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of `Phi3ForCausalLM` by Hugging Face's name, in the order of the layers."""
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
    """Save config and weights, a tied head once. `Tokenizer.save` writes the tokenizer."""
    save_config(model.config, directory, stop_ids=stop_ids, dtype=model.head_weight_VD.dtype)
    named = ((name, p.detach()) for name, p in model.named_parameters())
    write_tensors(named, directory, max_shard_bytes=max_shard_bytes)
