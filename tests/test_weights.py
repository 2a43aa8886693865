"""Megatron shards and Hugging Face tensors are the same numbers under two names."""

import dataclasses

import pytest
import torch
from torch import Tensor

from phimini.model.config import ModelConfig, preset
from phimini.parallel.weight_names import Split, hf_names, merge_shards, take_shard

CONFIG = dataclasses.replace(preset("tiny"), num_heads=8, num_kv_heads=4, num_layers=4)


def hf_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in hf_names(config).items()}


@pytest.mark.parametrize("name", ["tiny", "phi-400m", "phi-4-mini"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_cover_every_parameter(name: str, tied: bool) -> None:
    config = dataclasses.replace(preset(name), tie_embeddings=tied)
    sizes = [torch.Size(shape).numel() for shape in hf_names(config).values()]
    assert sum(sizes) == config.num_parameters
    assert ("lm_head.weight" in hf_names(config)) != tied


def test_qkv_shard_is_whole_groups_of_q_k_v() -> None:
    """Rows are numbered, so that the order is read off and not only inverted."""
    G, H, K = CONFIG.num_kv_heads, CONFIG.num_heads, CONFIG.head_dim
    rows = torch.arange((H + 2 * G) * K)
    shard = take_shard(rows[:, None], "qkv", 1, 2, CONFIG).flatten()
    q, k, v = rows.split((H * K, G * K, G * K))
    expected = []
    for group in (2, 3):  # the second half of four
        expected += [q[group * 2 * K : (group + 1) * 2 * K], k[group * K : (group + 1) * K]]
        expected += [v[group * K : (group + 1) * K]]
    assert torch.equal(shard, torch.cat(expected))


def test_gate_up_shard_is_its_gate_then_its_up() -> None:
    rows = torch.arange(2 * CONFIG.mlp_dim)[:, None]
    shard = take_shard(rows, "gate_up", 1, 4, CONFIG).flatten()
    F = CONFIG.mlp_dim
    assert shard.tolist() == [*range(F // 4, F // 2), *range(F + F // 4, F + F // 2)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("split", ["rows", "columns", "qkv", "gate_up"])
def test_merge_inverts_take(split: Split, size: int) -> None:
    name = {
        "rows": "model.embed_tokens.weight",
        "columns": "model.layers.0.mlp.down_proj.weight",
        "qkv": "model.layers.0.self_attn.qkv_proj.weight",
        "gate_up": "model.layers.0.mlp.gate_up_proj.weight",
    }[split]
    whole = torch.randn(hf_names(CONFIG)[name])
    shards = torch.stack([take_shard(whole, split, r, size, CONFIG) for r in range(size)])
    assert shards[0].numel() * size == whole.numel()
    assert torch.equal(merge_shards(shards, split, CONFIG), whole)
