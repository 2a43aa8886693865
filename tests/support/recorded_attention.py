"""The formula of an attention block, and flash-attn-4's calls on a CPU: its recorded signatures, answered by the formula."""

import inspect
import json
import types
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
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float = SCALE
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return this block's part of the gradients, by autograd, of its attention weighted by its share of the whole sum.

    d(whole out) = share * d(block out) + share * (block out - whole out) d(block lse)
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        block_out, block_lse = formula(q, k, v, block, scale)
        share = (block_lse.detach() - lse).exp()
        weight = (dout * (block_out.detach() - out)).sum(-1).T
        total = (dout * share.T[..., None] * block_out).sum() + (share * weight * block_lse).sum()
    dq, dk, dv = torch.autograd.grad(total, (q, k, v))
    return dq, dk, dv


# --- flash-attn-4, without a GPU -----------------------------------------------------------------
def bound(name: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the call's arguments by name, with the checks of flash_attn/cute/interface.py."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            inspect.Parameter(p, kind, default=inspect.Parameter.empty if needed else None)
            for p, needed in RECORDED["flash-attn-4"]["signatures"][name]
        ]
    )
    a = signature.bind(*args, **kwargs).arguments
    q, k, v = a["q"], a["k"], a["v"]
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v))
    assert a["cu_seqlens_q"].dtype == a["cu_seqlens_k"].dtype == torch.int32
    assert a["cu_seqlens_q"][-1] == len(q) and a["cu_seqlens_k"][-1] == len(k) == len(v)
    assert a["max_seqlen_q"] >= a["cu_seqlens_q"].diff().max()
    assert a["max_seqlen_k"] >= a["cu_seqlens_k"].diff().max()
    names = ("q", "k", "v", "out", "dout", "lse", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
             "softmax_scale", "causal", "return_lse")  # fmt: skip
    assert set(a) <= set(names), f"nothing else is ours to set: {set(a) - set(names)}"
    return a


def block_in(a: dict[str, Any]) -> Block:
    lengths = tuple(a["cu_seqlens_q"].diff().tolist())
    ends = a["cu_seqlens_q"], a["cu_seqlens_k"], a["max_seqlen_q"], a["max_seqlen_k"]
    return Block(0, len(a["q"]), 0, len(a["k"]), *ends, a["causal"], lengths)


def recorded_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None, None, None]:
    """Replace `_flash_attn_fwd`: out, lse (H, total q), and what only other kernels return."""
    a = bound("_flash_attn_fwd", args, kwargs)
    assert a["return_lse"] is True, "an autograd.Function's tensors require no gradient"
    out, lse = formula(a["q"], a["k"], a["v"], block_in(a), a["softmax_scale"])
    return out, lse.float().contiguous(), None, None, None


def recorded_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Replace `_flash_attn_bwd`: dq, dk, dv."""
    a = bound("_flash_attn_bwd", args, kwargs)
    lse = a["lse"]
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert lse.shape == (a["q"].shape[1], len(a["q"])) and a["out"].dtype == a["dout"].dtype
    dout, q, k, v, out = (a[name].double() for name in ("dout", "q", "k", "v", "out"))
    gradients = formula_backward(dout, q, k, v, out, lse.double(), block_in(a), a["softmax_scale"])
    dq, dk, dv = (gradient.to(a["q"].dtype) for gradient in gradients)
    return dq, dk, dv


RECORDED_FLASH_4 = types.SimpleNamespace(
    _flash_attn_fwd=recorded_forward, _flash_attn_bwd=recorded_backward
)
