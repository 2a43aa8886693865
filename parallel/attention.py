"""Attention over packed documents: which tokens see which is decided once per micro-batch, for all layers.

T tokens of a micro-batch, N documents of a bucket, L its longest, H query heads, G key/value heads, K head size.

On CUDA flash-attn's variable-length kernel reads the documents in place. Elsewhere documents of similar length are
padded into one causal SDPA call: no (T, T) mask, no call per document. Padding stands after a document's last token,
so causality hides it from every real query; padded outputs are dropped.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.rope import rope_at
from phimini.parallel.rotary import apply_rotary

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

_MAX_PADDING = 1.3
"""a bucket holds at most this many times its real tokens; more calls cost more than the padding they save"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents padded to one length: row i, column j of the padded batch is token index[i, j]."""

    shape: tuple[int, int]
    """(N, L)"""
    index: Tensor
    """(N * L,) token of each padded slot; 0 in padding"""
    slot: Tensor
    """(real tokens,) padded slot of each of the bucket's tokens, in the order of `token`"""
    token: Tensor
    """(real tokens,) tokens of this bucket"""


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron hands its PackedSeqParams down to the attention core; ours also carries what all layers share."""

    cos_T1R: Tensor | None = None
    """(T, 1, R/2), attention factor included"""
    sin_T1R: Tensor | None = None
    buckets: tuple[Bucket, ...] = ()


def packed_documents(
    cu_seqlens: Tensor, config: ModelConfig, device: torch.device
) -> PackedDocuments:
    """Rope tables and attention plan of one micro-batch; cu_seqlens (N + 1,) int32 on the CPU.

    Raises ValueError for a document longer than the model's `max_positions`.
    """
    lengths = cu_seqlens.diff().tolist()
    longest = max(lengths)
    if longest > config.max_positions:
        raise ValueError(
            f"a document of {longest} tokens is longer than the model's max_positions {config.max_positions}"
        )
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    cos, sin = rope_at(config, positions_T)
    on_device = cu_seqlens.to(device, non_blocking=True)
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cos_T1R=cos[:, None].to(device, non_blocking=True),
        sin_T1R=sin[:, None].to(device, non_blocking=True),
        buckets=() if _use_flash(device) else _buckets(lengths, device),
    )


def _use_flash(device: torch.device) -> bool:
    return device.type == "cuda" and flash_attn_varlen_func is not None


def _buckets(lengths: list[int], device: torch.device) -> tuple[Bucket, ...]:
    """Longest first; a new bucket begins where padding to the bucket's first would exceed _MAX_PADDING."""
    starts = [0]
    for n in lengths[:-1]:
        starts.append(starts[-1] + n)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    real = 0
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= _MAX_PADDING * (
            real + lengths[i]
        ):
            groups[-1].append(i)
            real += lengths[i]
        else:
            groups.append([i])
            real = lengths[i]
    return tuple(_bucket(sorted(group), lengths, starts, device) for group in groups)


def _bucket(
    documents: list[int], lengths: list[int], starts: list[int], device: torch.device
) -> Bucket:
    n = torch.tensor([lengths[i] for i in documents])
    start = torch.tensor([starts[i] for i in documents])
    L = int(n.max())
    column_NL = torch.arange(L).expand(len(documents), L)
    real_NL = column_NL < n[:, None]
    token_NL = torch.where(real_NL, start[:, None] + column_NL, 0)
    return Bucket(
        shape=(len(documents), L),
        index=token_NL.flatten().to(device),
        slot=real_NL.flatten().nonzero()[:, 0].to(device),
        token=token_NL[real_NL].to(device),
    )


class _Pad(torch.autograd.Function):
    """(T, H, K) -> (N, H, L, K) of one bucket; its backward is a gather, not index_select's scatter-add."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, bucket: Bucket) -> Tensor:
        ctx.bucket, ctx.num_tokens = bucket, x_THK.shape[0]
        padded = x_THK.index_select(0, bucket.index)
        return padded.view(*bucket.shape, *x_THK.shape[1:]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        bucket: Bucket = ctx.bucket
        dx_NLHK = grads[0].transpose(1, 2)
        rows = dx_NLHK.flatten(0, 1)
        if bucket.token.shape[0] == ctx.num_tokens:  # the bucket holds every token
            order = bucket.slot.new_empty(ctx.num_tokens)
            order[bucket.token] = bucket.slot
            return rows.index_select(0, order), None
        dx_THK = rows.new_zeros(ctx.num_tokens, *rows.shape[1:])
        return dx_THK.index_copy_(0, bucket.token, rows.index_select(0, bucket.slot)), None


class _Unpad(torch.autograd.Function):
    """The buckets' (N, H, L, K) outputs -> (T, H, K)."""

    @staticmethod
    def forward(ctx: Any, num_tokens: int, buckets: tuple[Bucket, ...], *outs: Tensor) -> Tensor:
        ctx.buckets = buckets
        _, H, _, K = outs[0].shape
        y_THK = outs[0].new_empty(num_tokens, H, K)
        for bucket, out_NHLK in zip(buckets, outs, strict=True):
            rows = out_NHLK.transpose(1, 2).reshape(-1, H, K)
            y_THK.index_copy_(0, bucket.token, rows.index_select(0, bucket.slot))
        return y_THK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_THK,) = grads
        H, K = dy_THK.shape[1:]
        d_outs = []
        for bucket in ctx.buckets:
            # Zeros in padding: a padded query must not move the keys that it saw.
            rows = dy_THK.new_zeros(bucket.index.shape[0], H, K)
            rows.index_copy_(0, bucket.slot, dy_THK.index_select(0, bucket.token))
            d_outs.append(rows.view(*bucket.shape, H, K).transpose(1, 2))
        return (None, None, *d_outs)


def attend(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: PackedDocuments, scale: float
) -> Tensor:
    """Causal attention inside each document -> (T, H, K). Query head h reads key/value head h // (H / G)."""
    if _use_flash(q_THK.device):
        assert flash_attn_varlen_func is not None
        return flash_attn_varlen_func(
            q_THK, k_TGK, v_TGK, documents.cu_seqlens_q, documents.cu_seqlens_kv, documents.max_seqlen_q,
            documents.max_seqlen_kv, softmax_scale=scale, causal=True,
        )  # fmt: skip
    outs = []
    for bucket in documents.buckets:
        q, k, v = (_Pad.apply(x, bucket) for x in (q_THK, k_TGK, v_TGK))
        outs.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)  # pyright: ignore[reportArgumentType]
        )
    return _Unpad.apply(q_THK.shape[0], documents.buckets, *outs)  # pyright: ignore[reportReturnType]


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
        packed_seq_params: PackedDocuments | None = None,
        **_: Any,
    ) -> Tensor:
        assert isinstance(packed_seq_params, PackedDocuments), (
            "the model runs on packed documents only"
        )
        cos, sin = packed_seq_params.cos_T1R, packed_seq_params.sin_T1R
        assert cos is not None and sin is not None, "PackedDocuments without rope tables"
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        return attend(query, key, value, packed_seq_params, self.scale)
