"""Llama folders that transformers wrote, read as Phi-3 models: equal logits, equal greedy tokens, refusals by field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import LIMIT, relative
from safetensors.torch import load_file, save_file

from phimini.model.io.huggingface import (
    check_tensors,
    config_of,
    load_config,
    load_reference,
    read_tensors,
    save_reference,
)
from phimini.model.sampler import SamplingParams, sample

SHAPE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-3, initializer_range=0.2,
)  # fmt: skip
PROMPT = [[1, 5, 9, 20, 33]]


def write_llama(folder: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(SHAPE | changes))).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 24}], ids=["own head", "tied, wide heads"])  # fmt: skip
def test_a_llama_computes_the_same_here_and_as_an_exported_phi3(
    changes: dict, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_llama(tmp_path / "llama", rope_theta=5000.0, **changes)
    ours, theirs = load_reference(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens_BT = torch.randint(96, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours.logits(ours(tokens_BT)), theirs(tokens_BT).logits) <= LIMIT
    save_reference(ours, tmp_path / "phi3", stop_ids=(2,))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "phi3")
    assert type(again).__name__ == "Phi3ForCausalLM"
    (answer,) = sample(ours, PROMPT, SamplingParams(temperature=0.0, max_new_tokens=40, stop_ids=(2,)), [0])  # fmt: skip
    models: list[Any] = [theirs, again]
    for model in models:
        done = model.generate(torch.tensor(PROMPT), do_sample=False, max_new_tokens=40)  # fmt: skip
        assert done[0, len(PROMPT[0]) :].tolist() == answer.tokens.tolist()


def test_fields_that_a_file_leaves_out_are_those_of_its_family(folder: Path) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key in ("rms_norm_eps", "tie_word_embeddings", "rope_parameters", "head_dim"):
        raw.pop(key, None)
    path.write_text(json.dumps(raw))
    config = config_of(str(path))
    assert config == load_config(folder)
    assert (config.norm_eps, config.tie_embeddings, config.rope_theta) == (1e-6, False, 10000.0)
    assert (config.head_dim, config.rotary_dim, config.num_kv_heads) == (16, 16, 2)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type: expected 'phi3' or 'llama', got 'mistral'"),
        ({"attention_bias": True}, "attention_bias: expected it off, got True"),
        ({"mlp_bias": True}, "mlp_bias: expected it off, got True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"sliding_window": 64}, "sliding_window: expected none below max_position_embeddings, got 64"),
        ({"rope_parameters": LLAMA3}, "rope type: expected 'default' or 'longrope', got 'llama3'"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
         "rope parameters: expected plain RoPE over whole heads of a llama, got .*longrope"),
        ({"partial_rotary_factor": 0.5}, "rope parameters: expected plain RoPE over whole heads of a llama, got .*0.5"),
        ({"num_key_value_heads": 3}, "num_heads: 4 is not a multiple of num_kv_heads 3"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_the_config_cannot_express_is_refused_by_field(
    changes: dict, message: str, folder: Path
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        config_of(str(path))


def test_a_model_that_is_neither_a_preset_nor_a_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"model=nowhere/config\.json: no such file"):
        config_of("nowhere/config.json")
    with pytest.raises(ValueError, match="did you mean tiny"):
        config_of("tini")


Q, K, V, UP = (f"model.layers.1.{m}.weight" for m in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(V), f"tensor {V} is missing beside "),
        (lambda t: t.update({K: t[K][:16]}), r"the last two of one shape, got .*k_proj.weight': \(16, 64\)"),
        (lambda t: t.update({UP: t[UP].half()}), r"mlp.gate_up_proj.weight: expected F64, F32, F16, BF16, got F16, F32"),
        (lambda t: t.update({Q: t[Q][:32]}), r"qkv_proj.weight: expected shape \(128, 64\), got \(96, 64\)"),
        (lambda t: t.update({Q.replace("q_", "qkv_"): t[Q].clone()}), "qkv_proj.weight is stored whole and in parts"),
        (lambda t: t.update({Q.replace("weight", "bias"): t[Q][0].clone()}), "q_proj.bias' is none of this model's"),
    ],
    ids=["no v", "short k", "half up", "short q", "twice", "bias"],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(change, message: str, folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        check_tensors(load_config(folder), read_tensors(folder))
