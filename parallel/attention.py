"""Attention over packed documents: each token sees the earlier tokens of its own document and nothing else.

T tokens of a micro-batch, H query heads, G key/value heads, K head size; query head h reads head h // (H / G).

On CUDA one variable-length flash kernel reads all documents in place. On a CPU the flash kernel is called once per
document, on views: it runs a batch of documents no faster than one after the other, so padding them into a batch,
or masking a (T, T) product, would only add work.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.parallel.rotary import apply_rotary, rotary_tables

try:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
except ImportError:
    flash_attn_varlen_func = None


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron hands its PackedSeqParams down to the attention core; ours also carries what all layers share."""

    scale_T1K: Tensor | None = None
    """rope tables, see `rotary_tables`"""
    sin_T1R2: Tensor | None = None
    cuts: tuple[int, ...] = ()
    """cu_seqlens as numbers"""


def packed_documents(
    cu_seqlens: Tensor, config: ModelConfig, device: torch.device
) -> PackedDocuments:
    """What attention needs of one micro-batch; cu_seqlens (N + 1,) int32 on the CPU.

    Raises ValueError for a document longer than the model's `max_positions`.
    """
    lengths = cu_seqlens.diff().tolist()
    longest = max(lengths)
    if longest > config.max_positions:
        raise ValueError(
            f"a document of {longest} tokens is longer than the model's max_positions {config.max_positions}"
        )
    positions = torch.arange(longest)
    scale_T1K, sin_T1R2 = rotary_tables(config, torch.cat([positions[:n] for n in lengths]))
    on_device = cu_seqlens.to(device, non_blocking=True)
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        scale_T1K=scale_T1K.to(device, non_blocking=True),
        sin_T1R2=sin_T1R2.to(device, non_blocking=True),
        cuts=tuple(cu_seqlens.tolist()),
    )


_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads_first(x_THK: Tensor, begin: int, end: int) -> Tensor:
    """One document as a view (1, H, L, K)."""
    return x_THK[begin:end].transpose(0, 1)[None]


class _CpuAttention(torch.autograd.Function):
    """F.scaled_dot_product_attention per document, but one autograd node: slicing under autograd would allocate a
    gradient of the whole pack for every slice."""

    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cuts: tuple[int, ...], scale: float
    ) -> Tensor:
        outs, lses = [], []
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            qkv = (_heads_first(x, a, b) for x in (q_THK, k_TGK, v_TGK))
            out, lse = _flash_forward(*qkv, 0.0, True, scale=scale)
            outs.append(out)
            lses.append(lse)
        ctx.save_for_backward(q_THK, k_TGK, v_TGK, *outs, *lses)
        ctx.cuts, ctx.scale = cuts, scale
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_TGK, v_TGK, *saved = ctx.saved_tensors
        num_documents = len(saved) // 2
        parts: list[list[Tensor]] = [[], [], []]
        for i, (a, b) in enumerate(zip(ctx.cuts[:-1], ctx.cuts[1:], strict=True)):
            dout, q, k, v = (_heads_first(x, a, b) for x in (grads[0], q_THK, k_TGK, v_TGK))
            out, lse = saved[i], saved[num_documents + i]
            dqkv = _flash_backward(dout, q, k, v, out, lse, 0.0, True, scale=ctx.scale)
            for part, d in zip(parts, dqkv, strict=True):
                part.append(d[0].transpose(0, 1))
        return (*(torch.cat(part) for part in parts), None, None)


def attend(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: PackedDocuments, scale: float
) -> Tensor:
    """Causal attention inside each document -> (T, H, K)."""
    if q_THK.device.type == "cpu":
        return _CpuAttention.apply(q_THK, k_TGK, v_TGK, documents.cuts, scale)  # pyright: ignore[reportReturnType]
    lengths = (
        documents.cu_seqlens_q, documents.cu_seqlens_kv, documents.max_seqlen_q, documents.max_seqlen_kv,
    )  # fmt: skip
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(
            q_THK, k_TGK, v_TGK, *lengths, softmax_scale=scale, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn  # registers CUDA operators when imported

    return varlen_attn(
        q_THK, k_TGK, v_TGK, *lengths, scale=scale, window_size=(-1, 0), enable_gqa=True
    )  # pyright: ignore[reportReturnType]


class CoreAttention(MegatronModule):
    """What stands in Megatron's core_attention slot: rotates, then attends within documents.

    The rotation happens here and not in Megatron's SelfAttention, which would rebuild cos and sin in every layer,
    loop over the documents, and knows no LongRoPE.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None, "TransformerConfig.kv_channels is not set"
        self.scale = (
            softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        )

    def forward(
        self,
        query: Tensor,  # (T, H, K)
        key: Tensor,  # (T, G, K)
        value: Tensor,  # (T, G, K)
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        assert isinstance(packed_seq_params, PackedDocuments), (
            "the model runs on packed documents only"
        )
        scale, sin = packed_seq_params.scale_T1K, packed_seq_params.sin_T1R2
        assert scale is not None and sin is not None, "PackedDocuments without rope tables"
        query, key = apply_rotary(query, scale, sin), apply_rotary(key, scale, sin)
        return attend(query, key, value, packed_seq_params, self.scale)
