"""Attention blocks recorded from flash-attn, replayed on a CPU."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phimini.parallel.attention.context_parallel import Block

RECORDED = json.loads((Path(__file__).parent / "flash_attn_recorded.json").read_text())


SCALE = 0.2


def formula(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    """Return out (n, H, K) and lse (H, n), written out, in q's dtype."""
    outs, lses = [], []
    group = q.shape[1] // k.shape[1]
    cuts = zip(block.query_cuts.diff().tolist(), block.key_cuts.diff().tolist(), strict=True)
    query_lengths, key_lengths = zip(*cuts, strict=True)
    parts = q.split(query_lengths), k.split(key_lengths), v.split(key_lengths)
    for qi, ki, vi in zip(*parts, strict=True):
        ki, vi = (x.repeat_interleave(group, 1) for x in (ki, vi))
        scores = torch.einsum("qhk,shk->hqs", qi, ki) * scale
        if block.causal:
            hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(len(ki) - len(qi) + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqs,shk->qhk", scores.softmax(-1), vi))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def formula_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this block's part of the gradients, by autograd, of its attention weighted by its share of the whole sum.

    d(whole out) = share * d(block out) + share * (block out - whole out) d(block lse)
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        block_out, block_lse = formula(q, k, v, block)
        share = (block_lse.detach() - lse).exp()
        weight = (dout * (block_out.detach() - out)).sum(-1).T
        total = (dout * share.T[..., None] * block_out).sum() + (share * weight * block_lse).sum()
    dq, dk, dv = torch.autograd.grad(total, (q, k, v))
    return dq, dk, dv


# --- flash-attn, without a GPU -------------------------------------------------------------------
def recorded(name: str) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(p, kind, default=inspect.Parameter.empty if needed else None)
            for p, needed in RECORDED["signatures"][name]
        ]
    )


def bound(name: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the call's arguments by name, with the checks of mha_varlen_fwd and mha_varlen_bwd."""
    a = recorded(name).bind(*args, **kwargs).arguments
    q, k, v = a["q"], a["k"], a["v"]
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v))
    assert a["cu_seqlens_q"].dtype == a["cu_seqlens_k"].dtype == torch.int32
    assert a["cu_seqlens_q"][-1] == len(q) and a["cu_seqlens_k"][-1] == len(k) == len(v)
    assert a["max_seqlen_q"] >= a["cu_seqlens_q"].diff().max()
    assert a["max_seqlen_k"] >= a["cu_seqlens_k"].diff().max()
    assert a["dropout_p"] == 0.0 and a.get("softcap", 0.0) == 0.0
    assert a.get("window_size_left", -1) == a.get("window_size_right", -1) == -1
    assert a.get("alibi_slopes") is None
    return a


def block_in(a: dict[str, Any]) -> Block:
    lengths = tuple(a["cu_seqlens_q"].diff().tolist())
    ends = a["cu_seqlens_q"], a["cu_seqlens_k"], a["max_seqlen_q"], a["max_seqlen_k"]
    return Block(0, len(a["q"]), 0, len(a["k"]), *ends, a["causal"], lengths)


def recorded_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replace flash_attn 2.8's `_flash_attn_varlen_forward`: out, softmax_lse (H, total q), S_dmask, rng_state."""
    a = bound("_flash_attn_varlen_forward", args, kwargs)
    out, lse = formula(a["q"], a["k"], a["v"], block_in(a), a["softmax_scale"])
    return out, lse.float().contiguous(), torch.empty(0), torch.zeros(2, dtype=torch.int64)


def recorded_backward(*args: Any, **kwargs: Any) -> Tensor:
    """Replace flash_attn 2.8's `_flash_attn_varlen_backward`: fill dq, dk, dv; return softmax_d."""
    a = bound("_flash_attn_varlen_backward", args, kwargs)
    lse, block = a["softmax_lse"], block_in(a)
    assert lse.dtype == torch.float32 and lse.is_contiguous(), "the kernel reads lse by its address"
    assert lse.shape == (a["q"].shape[1], len(a["q"])) and a["out"].dtype == a["dout"].dtype
    assert a["deterministic"] is False and a["softmax_scale"] == SCALE
    dout, q, k, v, out = (a[name].double() for name in ("dout", "q", "k", "v", "out"))
    gradients = formula_backward(dout, q, k, v, out, lse.double(), block)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert a[name].is_contiguous() and a[name].dtype == a["q"].dtype
        a[name].copy_(gradient)
    return torch.empty(0)
