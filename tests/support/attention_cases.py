"""Random queries, keys and values of packed documents, with a plain reference."""

from collections.abc import Sequence

import torch
from numerics import DEVICE
from torch import Tensor


def attend_reference(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, lengths: list[int], scale: float
) -> Tensor:
    """Return softmax(scale q k^T, causal) v, written out."""
    outs = []
    group = q_THK.shape[1] // k_TGK.shape[1]
    for q, k, v in zip(*(x.split(lengths) for x in (q_THK, k_TGK, v_TGK)), strict=True):
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores_HLL = torch.einsum("qhk,shk->hqs", q, k) * scale
        L = len(q)
        hidden = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
        p = scores_HLL.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqs,shk->qhk", p, v))
    return torch.cat(outs)


def qkv(num_tokens: int, dtype: torch.dtype, head_dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as Megatron passes them: k and v are views of one projection."""
    q = torch.randn(num_tokens, 6, head_dim, device=DEVICE, dtype=dtype)
    kv = torch.randn(num_tokens, 2, 2 * head_dim, device=DEVICE, dtype=dtype)
    k, v = kv.split(head_dim, -1)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def copies(inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs)
    return q, k, v
