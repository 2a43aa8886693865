"""Ring attention over packed documents: keys and values travel around the context ranks, past every rank's queries.

T tokens that this rank holds (see `context_parallel.py`), C context ranks, H query heads, G key/value heads, K head
size. In hop h, rank r holds the keys and values of rank r - h (mod C) and computes its queries against them
(`blocks.py`). Meanwhile it sends them to rank r + 1 and receives those of rank r - h - 1. Per hop

    lse' = log(exp(lse) + exp(lse_block))      out' = exp(lse - lse') out + exp(lse_block - lse') out_block

in fp32 (Ring Attention, arXiv 2310.01889; Blockwise Parallel Transformer, arXiv 2305.19370). Backward sends the keys
around a second time, followed by the sums dk, dv in fp32, which return to their rank after C hops. A rank keeps its
keys and values for backward. While it computes, it holds those of at most two other ranks, the current and the next.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimini.parallel.attention.blocks import BlockKernel
from phimini.parallel.attention.context_parallel import Block

Hops = tuple[tuple[Block, ...], ...]
_KEYS, _GRADIENTS = 0, 1
"""tags for gloo; NCCL pairs sends with receives by their order, which is the same on every rank"""


def pass_on(send: Tensor, receive: Tensor, group: dist.ProcessGroup, tag: int) -> list[dist.Work]:
    """Start a send to the next rank of the ring, and a receive from the previous rank."""
    rank, size = group.rank(), group.size()
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, send, group=group, tag=tag, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, receive, group=group, tag=tag, group_peer=(rank - 1) % size),
        ]
    )


class _Travelling:
    """A tensor that moves to the next rank in every hop. One buffer is read and sent while the other is filled."""

    def __init__(self, own: Tensor, group: dist.ProcessGroup, tag: int, keep_own: bool) -> None:
        self.present = own
        self._group, self._tag, self._keep = group, tag, keep_own
        self._next: Tensor | None = None
        self._works: list[dist.Work] = []

    def send(self) -> None:
        """Start sending `present`, which must not be written until `receive`."""
        if self._next is None:
            self._next = torch.empty_like(self.present)
        self._works = pass_on(self.present, self._next, self._group, self._tag)

    def receive(self) -> None:
        """Wait for the tensor of the previous rank and make it `present`."""
        for work in self._works:
            work.wait()
        assert self._next is not None, "nothing was sent"
        self.present, self._next = self._next, None if self._keep else self.present
        self._keep = False


def merge(out_nHK: Tensor, lse_Hn: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add a block's attention to out and lse in place in fp32, weighted by its share of the softmax's sum."""
    lse = torch.logaddexp(lse_Hn, block_lse)
    before, added = ((x - lse).exp_().T[..., None] for x in (lse_Hn, block_lse))
    out_nHK.mul_(before).addcmul_(block_out.to(out_nHK.dtype), added)
    lse_Hn.copy_(lse)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, kv_TG2K: Tensor, hops: Hops, group: dist.ProcessGroup, scale: float,
        kernel: BlockKernel,
    ) -> Tensor:  # fmt: skip
        keys = _Travelling(kv_TG2K, group, _KEYS, keep_own=True)
        out_THK = lse_HT = None
        for hop, blocks in enumerate(hops):
            if hop + 1 < len(hops):
                keys.send()
            k, v = keys.present.chunk(2, -1)
            for b in blocks:
                queries, columns = slice(b.query_begin, b.query_end), slice(b.key_begin, b.key_end)
                out, lse = kernel.forward(q_THK[queries], k[columns], v[columns], b, scale)
                if out_THK is None or lse_HT is None:  # the first block covers all queries
                    out_THK, lse_HT = out.to(torch.float32), lse
                else:
                    merge(out_THK[queries], lse_HT[:, queries], out, lse)
            if hop + 1 < len(hops):
                keys.receive()
        assert out_THK is not None and lse_HT is not None, "no rank is without its own block"
        out_THK = out_THK.to(q_THK.dtype)
        ctx.save_for_backward(q_THK, kv_TG2K, out_THK, lse_HT)
        ctx.settings = hops, group, scale, kernel
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, kv_TG2K, out_THK, lse_HT = ctx.saved_tensors
        dout_THK = grads[0].contiguous()
        hops, group, scale, kernel = ctx.settings
        dq_THK = torch.zeros(q_THK.shape, dtype=torch.float32, device=q_THK.device)
        keys = _Travelling(kv_TG2K, group, _KEYS, keep_own=True)
        sums = torch.zeros(kv_TG2K.shape, dtype=torch.float32, device=q_THK.device)
        gradients = _Travelling(sums, group, _GRADIENTS, keep_own=False)
        for hop, blocks in enumerate(hops):
            if hop + 1 < len(hops):
                keys.send()
            k, v = keys.present.chunk(2, -1)
            parts = []
            for b in blocks:
                queries, columns = slice(b.query_begin, b.query_end), slice(b.key_begin, b.key_end)
                dq, dk, dv = kernel.backward(
                    dout_THK[queries], q_THK[queries], k[columns], v[columns], out_THK[queries],
                    lse_HT[:, queries], b, scale,
                )  # fmt: skip
                dq_THK[queries] += dq
                parts.append((columns, dk, dv))
            if hop > 0:
                gradients.receive()  # sent after the previous rank had added its part, one hop ago
            dk_TGK, dv_TGK = gradients.present.chunk(2, -1)
            for columns, dk, dv in parts:
                dk_TGK[columns] += dk
                dv_TGK[columns] += dv
            gradients.send()
            if hop + 1 < len(hops):
                keys.receive()
        gradients.receive()
        dkv_TG2K = gradients.present.to(kv_TG2K.dtype)
        return dq_THK.to(q_THK.dtype), dkv_TG2K, None, None, None, None


def ring_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, hops: Hops, group: dist.ProcessGroup, scale: float,
    kernel: BlockKernel,
) -> Tensor:  # fmt: skip
    """Return causal attention inside each document, of this rank's queries to all ranks' keys, (T, H, K).

    hops: blocks by hop, from `context_parallel.blocks_of_hop`. All ranks of `group` must pass equally
    many tokens.
    """
    assert len(hops) == group.size(), f"{len(hops)} hops for a ring of {group.size()}"
    kv_TG2K = torch.cat((k_TGK, v_TGK), -1)
    return _RingAttention.apply(q_THK, kv_TG2K, hops, group, scale, kernel)  # pyright: ignore[reportReturnType]
