"""Attention over packed documents: each token sees itself and the earlier tokens of its document.

T tokens that this rank holds, S tokens of the whole micro-batch (T without context parallelism), H query heads,
G key/value heads, K head size; query head h reads head h // (H / G).

With context parallelism the keys of the other ranks are gathered, or arrive over the ring (`ring.py`).
On CUDA one variable-length flash kernel reads all documents in place. On a CPU the flash kernel is called for each
document, on views. It runs a batch of documents no faster than one after the other, so padding documents into a batch
or masking a (T, T) product would only add work.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimini.kernels.backend.launch import on_gpu
from phimini.kernels.rope import rope
from phimini.model.config import ModelConfig
from phimini.model.rope import rope_table
from phimini.parallel.attention.blocks import (
    CPU,
    FLASH_2,
    cpu_backward,
    cpu_forward,
    kernel_for,
    kernel_of,
)
from phimini.parallel.attention.context_parallel import (
    Block,
    Piece,
    blocks_of_hop,
    gather_keys,
    pieces_of_rank,
    rows_of_rank,
)
from phimini.parallel.attention.ring import Hops, ring_attention


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's PackedSeqParams, which reach the attention core, with the tensors that all layers share."""

    rope_tables: tuple[Tensor, Tensor] | None = None
    """cos and sin by position, (P, R/2) fp32, made on the device by the function of that name"""
    positions_T: Tensor | None = None
    """positions of this rank's tokens in their documents, int32"""
    pieces: tuple[Piece, ...] = ()
    """the (parts of) documents among this rank's tokens"""
    key_rows: Tensor | None = None
    """if keys are gathered, on CUDA: indices of the keys of all pieces, which cu_seqlens_kv counts"""
    hops: Hops = ()
    """if keys go around the ring: the blocks that this rank computes in each hop; () if they are gathered"""
    context_group: dist.ProcessGroup | None = None
    """context ranks, or None if this rank holds all tokens; not named `cp_group`, which Megatron would act on"""


def packed_documents(
    cu_seqlens: Tensor,
    config: ModelConfig,
    context_group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> PackedDocuments:
    """Prepare the attention of one micro-batch, on the CPU and without rope tables.

    cu_seqlens: (N + 1,) int32 on the CPU, over the tokens of all context ranks.
    ring: pass keys and values around the ranks of `context_group` instead of gathering them.

    Raises ValueError for a document longer than the model's `max_positions`.
    """
    cuts = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    longest = max(lengths)
    if longest > config.max_positions:
        raise ValueError(
            f"a document of {longest} tokens is longer than the model's max_positions {config.max_positions}"
        )
    positions = torch.arange(longest, dtype=torch.int32)
    positions_S = torch.cat([positions[:n] for n in lengths])
    key_rows, hops = None, ()
    if context_group is None:
        pieces = tuple(Piece(a, b, a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if a < b)
        positions_T, cu_queries, cu_keys = positions_S, cu_seqlens, cu_seqlens
    else:
        rank, size = context_group.rank(), context_group.size()
        pieces = pieces_of_rank(cuts, rank, size)
        positions_T = positions_S[rows_of_rank(len(positions_S), rank, size)]
        cu_queries = _cumulated([p.query_end - p.query_begin for p in pieces])
        cu_keys = _cumulated([p.key_end - p.key_begin for p in pieces])
        if ring:
            sources = [(rank - hop) % size for hop in range(size)]
            hops = tuple(blocks_of_hop(cuts, rank, s, size) for s in sources)
        else:
            key_rows = torch.cat([torch.arange(p.key_begin, p.key_end) for p in pieces])
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=cu_queries,
        cu_seqlens_kv=cu_keys,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions_T=positions_T,
        pieces=pieces,
        key_rows=key_rows,
        hops=hops,
        context_group=context_group,
    )


def rope_tables(config: ModelConfig, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions below `longest` or more, (P, R/2) fp32, made on `device` once for many batches.

    On a GPU one table of all positions: 50 MB for Phi-4-Mini, and no batch waits for a longer one.
    """
    rounded = 1 << (longest - 1).bit_length()
    if device.type != "cpu" or rounded > config.max_positions:
        rounded = config.max_positions
    return _tables(config, rounded, device)


@lru_cache(maxsize=4)
def _tables(config: ModelConfig, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return rope_table(config, num_positions, device)


def _cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _later_keys(piece: Piece, like: Tensor) -> Tensor | None:
    """Return the mask to add to a piece's scores: -inf for keys after the query; None if `is_causal` suffices."""
    shape = (piece.query_end - piece.query_begin, piece.key_end - piece.key_begin)
    if shape[0] == shape[1]:  # the queries begin at the start of the document
        return None
    return like.new_full(shape, -torch.inf).triu_(shape[1] - shape[0] + 1)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return views (1, H, T, K) of tensors (T, H, K), the layout of the flash kernel."""
    return [x.transpose(0, 1)[None] for x in tensors]


def _tokens_first(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate parts (1, H, length, K) into (sum of lengths, H, K)."""
    return torch.cat([x.transpose(1, 2) for x in parts], 1)[0]


class _CpuAttention(torch.autograd.Function):
    """F.scaled_dot_product_attention per document, in one autograd node.

    Slicing under autograd would allocate a gradient of the whole pack for every slice.
    """

    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, pieces: tuple[Piece, ...], scale: float
    ) -> Tensor:  # fmt: skip
        q_1HTK, k_1GSK, v_1GSK = _heads_first(q_THK, k_SGK, v_SGK)
        outs, lses = [], []
        for p in pieces:
            q = q_1HTK[:, :, p.query_begin : p.query_end]
            k, v = (x[:, :, p.key_begin : p.key_end] for x in (k_1GSK, v_1GSK))
            mask = _later_keys(p, q)
            out, lse = cpu_forward(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
            outs.append(out)
            lses.append(lse)
        ctx.save_for_backward(q_THK, k_SGK, v_SGK, *outs, *lses)
        ctx.pieces, ctx.scale = pieces, scale
        return _tokens_first(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_SGK, v_SGK, *saved = ctx.saved_tensors
        pieces: tuple[Piece, ...] = ctx.pieces
        q_1HTK, k_1GSK, v_1GSK, dout_1HTK = _heads_first(q_THK, k_SGK, v_SGK, grads[0])
        dqs, dks, dvs = [], [], []
        for p, out, lse in zip(pieces, saved[: len(pieces)], saved[len(pieces) :], strict=True):
            q, dout = (x[:, :, p.query_begin : p.query_end] for x in (q_1HTK, dout_1HTK))
            k, v = (x[:, :, p.key_begin : p.key_end] for x in (k_1GSK, v_1GSK))
            mask = _later_keys(p, q)
            dq, dk, dv = cpu_backward(
                dout, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=ctx.scale
            )
            dqs.append(dq)
            dks.append(dk)
            dvs.append(dv)
        dq_THK = _tokens_first(dqs)
        if len(k_SGK) == len(q_THK):
            # This rank holds all tokens, so the pieces are the documents in order.
            dk_SGK, dv_SGK = _tokens_first(dks), _tokens_first(dvs)
        else:
            dk_SGK, dv_SGK = torch.zeros_like(k_SGK), torch.zeros_like(v_SGK)
            for p, dk, dv in zip(pieces, dks, dvs, strict=True):
                dk_SGK[p.key_begin : p.key_end] += dk[0].transpose(0, 1)
                dv_SGK[p.key_begin : p.key_end] += dv[0].transpose(0, 1)
        return dq_THK, dk_SGK, dv_SGK, None, None


def _attend_cpu(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, documents: PackedDocuments, scale: float
) -> Tensor:
    return _CpuAttention.apply(q_THK, k_SGK, v_SGK, documents.pieces, scale)  # pyright: ignore[reportReturnType]


class _GpuAttention(torch.autograd.Function):
    """All documents in one call of the GPU's kernel, which aligns a piece's last query with its last key."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> Tensor:
        kernel = kernel_for(q)
        out, lse = kernel.forward(q, k, v, block, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = block, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        block, scale, kernel = ctx.settings
        return *kernel.backward(dout.contiguous(), *ctx.saved_tensors, block, scale), None, None


def _attend_cuda(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, documents: PackedDocuments, scale: float
) -> Tensor:
    if documents.key_rows is not None:
        # The kernel needs the keys of each piece to be contiguous. The keys of two pieces of one document overlap,
        # because both begin at the document's start.
        k_SGK, v_SGK = (x.index_select(0, documents.key_rows) for x in (k_SGK, v_SGK))
    block = Block(
        0, len(q_THK), 0, len(k_SGK), documents.cu_seqlens_q, documents.cu_seqlens_kv,
        documents.max_seqlen_q, documents.max_seqlen_kv, True, (),
    )  # fmt: skip
    return _GpuAttention.apply(q_THK, k_SGK, v_SGK, block, scale)  # pyright: ignore[reportReturnType]


def attention_name(device: torch.device) -> str:
    """Return the name of the device's attention kernel, and on Hopper and Blackwell whether it is not the chip's."""
    if device.type == "cpu":
        return CPU.name
    capability = torch.cuda.get_device_capability(device)
    kernel = kernel_of(capability)
    if kernel is FLASH_2 and capability[0] in (9, 10):
        return f"{kernel.name}, which is not made for this GPU (flash-attn-4 is not installed)"
    return kernel.name


def rotate_and_attend(qkv_TGNK: Tensor, documents: PackedDocuments, scale: float) -> Tensor:
    """Rotate queries and keys of the fused projection, then return causal attention inside each document, (T, H, K)."""
    assert documents.rope_tables is not None and documents.positions_T is not None, "no rope tables"
    q_THK, k_SGK, v_SGK = rope(qkv_TGNK, *documents.rope_tables, documents.positions_T)
    if documents.context_group is not None and documents.hops:
        kernel = kernel_for(q_THK)
        return ring_attention(
            q_THK, k_SGK, v_SGK, documents.hops, documents.context_group, scale, kernel
        )
    if documents.context_group is not None:
        k_SGK, v_SGK = gather_keys(k_SGK, v_SGK, documents.context_group)
    kernel = _attend_cuda if on_gpu(q_THK) else _attend_cpu
    return kernel(q_THK, k_SGK, v_SGK, documents, scale)


class CoreAttention(MegatronModule):
    """Module for Megatron's core_attention slot: rotation, then attention within documents.

    The rotation is done here because Megatron's SelfAttention would rebuild cos and sin in every layer, loop over the
    documents, and does not support LongRoPE.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None, "TransformerConfig.kv_channels is not set"
        self.scale = (
            softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        )

    def forward(self, qkv_TGNK: Tensor, documents: PackedDocuments) -> Tensor:
        """Return (T, H, K) of a projection (T, G, H/G + 2, K): per group its queries, a key and a value."""
        return rotate_and_attend(qkv_TGNK, documents, self.scale)
