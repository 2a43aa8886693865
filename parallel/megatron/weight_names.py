"""Names and shards of the weights in Megatron-core's GPTModel and in Hugging Face's Phi3.

Letters: V vocabulary, D model width, H query heads, G key/value heads, K head size, F MLP hidden size.

| Hugging Face (whole)                               | Megatron, one tensor-parallel rank     | split    |
|----------------------------------------------------|----------------------------------------|----------|
| model.embed_tokens.weight                  (V, D)  | embedding.word_embeddings.weight       | rows     |
| model.layers.i.input_layernorm.weight         (D)  | input_layernorm.weight                 | whole    |
| model.layers.i.self_attn.qkv_proj.weight           | self_attention.linear_qkv.weight       | qkv      |
|                                 ((H + 2 G) K, D)   |                                        |          |
| model.layers.i.self_attn.o_proj.weight   (D, H K)  | self_attention.linear_proj.weight      | columns  |
| model.layers.i.post_attention_layernorm.weight (D) | pre_mlp_layernorm.weight               | whole    |
| model.layers.i.mlp.gate_up_proj.weight    (2 F, D) | mlp.linear_fc1.weight                  | gate_up  |
| model.layers.i.mlp.down_proj.weight         (D, F) | mlp.linear_fc2.weight                  | columns  |
| model.norm.weight                             (D)  | decoder.final_layernorm.weight         | whole    |
| lm_head.weight (untied only)               (V, D)  | output_layer.weight                    | rows     |

Transformer Engine's layers contain the two norms of a layer in the next linear:
self_attention.linear_qkv.layer_norm_weight and mlp.linear_fc1.layer_norm_weight.
qkv: Hugging Face stacks [all q | all k | all v]; Megatron stacks [q.. k v] per key/value head.
gate_up: Hugging Face stacks [gate | up]; each Megatron rank stacks [its gate | its up].
A tied head has no Hugging Face name. A last pipeline stage that is not also the first has a copy of the embedding as
output_layer.weight.
"""

from typing import Literal

import torch
from torch import Tensor

from phimini.model.config import ModelConfig

Split = Literal["whole", "rows", "columns", "qkv", "gate_up"]

LAYER_NAMES: dict[str, tuple[str, Split]] = {
    "input_layernorm.weight": ("input_layernorm.weight", "whole"),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", "whole"),
    "self_attention.linear_qkv.weight": ("self_attn.qkv_proj.weight", "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", "columns"),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", "whole"),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", "whole"),
    "mlp.linear_fc1.weight": ("mlp.gate_up_proj.weight", "gate_up"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", "columns"),
}


def hf_names(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every Hugging Face tensor name of `config` with its whole shape, in the order of Phi3's state dict."""
    D, F = config.model_dim, config.mlp_dim
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        names[layer + "self_attn.o_proj.weight"] = (D, q_rows)
        names[layer + "self_attn.qkv_proj.weight"] = (q_rows + 2 * kv_rows, D)
        names[layer + "mlp.gate_up_proj.weight"] = (2 * F, D)
        names[layer + "mlp.down_proj.weight"] = (D, F)
        names[layer + "input_layernorm.weight"] = (D,)
        names[layer + "post_attention_layernorm.weight"] = (D,)
    names["model.norm.weight"] = (D,)
    if not config.tie_embeddings:
        names["lm_head.weight"] = (config.vocab_size, D)
    return names


def take_shard(whole: Tensor, split: Split, rank: int, size: int, config: ModelConfig) -> Tensor:
    """Return the part of a Hugging Face tensor for tensor-parallel rank `rank` of `size`, in Megatron's order."""
    if split == "whole":
        return whole
    if split == "rows":
        return whole.chunk(size, 0)[rank]
    if split == "columns":
        return whole.chunk(size, 1)[rank]
    if split == "gate_up":
        gate, up = whole.chunk(2, 0)
        return torch.cat((gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank]))
    G, K, D = config.num_kv_heads, config.head_dim, whole.shape[1]
    heads_per_group = config.num_heads // G
    q, k, v = whole.split((config.num_heads * K, G * K, G * K))
    mine = slice(rank * G // size, (rank + 1) * G // size)
    q, k, v = (x.view(G, -1, D)[mine] for x in (q, k, v))
    return torch.cat((q, k, v), 1).reshape(-1, (heads_per_group + 2) * K, D).flatten(0, 1)


def merge_shards(shards: Tensor, split: Split, config: ModelConfig) -> Tensor:
    """Merge shards (size, *shard shape), stacked by rank, into the Hugging Face tensor: the inverse of `take_shard`.

    The results of 'whole' and 'rows' are views of `shards`.
    """
    if split == "whole":
        return shards[0]
    if split == "rows":
        return shards.flatten(0, 1)
    if split == "columns":
        return torch.cat(tuple(shards), 1)
    if split == "gate_up":
        gate, up = shards.chunk(2, 1)
        return torch.cat((gate.flatten(0, 1), up.flatten(0, 1)))
    G, K, D = config.num_kv_heads, config.head_dim, shards.shape[-1]
    q, k, v = shards.view(G, -1, K, D).split((config.num_heads // G, 1, 1), 1)
    return torch.cat((q.reshape(-1, D), k.reshape(-1, D), v.reshape(-1, D)))
