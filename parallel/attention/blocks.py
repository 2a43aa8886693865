"""One block of ring attention, forward and backward, with one contract on CUDA (flash-attn or torch's build) and CPU.

n queries and m keys of a `context_parallel.Block`, H query heads, G key/value heads, K head size.

    forward(q, k, v, block, scale) -> out (n, H, K), lse (H, n) fp32          lse = log sum exp(scale q k^T)
    backward(dout, q, k, v, out, lse, block, scale) -> dq, dk, dv             of q's, k's and v's shapes

`backward` takes the out and lse over *all* keys that the queries see, in this block and in others. The probabilities
exp(scale q k^T - lse) and the term sum(dout * out) are then those of the whole attention, and dq, dk, dv are this
block's part.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from phimini.kernels.backend.launch import on_gpu
from phimini.parallel.attention.context_parallel import Block, joined

try:
    from flash_attn.flash_attn_interface import (  # pyright: ignore[reportMissingImports]
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
    )
except ImportError:
    _flash_attn_varlen_forward = _flash_attn_varlen_backward = None


class BlockKernel(NamedTuple):
    forward: Callable[[Tensor, Tensor, Tensor, Block, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor]:
    """Call flash-attn 2.8's `_flash_attn_varlen_forward`."""
    assert _flash_attn_varlen_forward is not None
    out, lse, _, _ = _flash_attn_varlen_forward(
        q, k, v, block.query_cuts, block.key_cuts, block.longest_query, block.longest_key,
        dropout_p=0.0, softmax_scale=scale, causal=block.causal,
    )  # fmt: skip
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call flash-attn 2.8's `_flash_attn_varlen_backward`, which writes into dq, dk and dv."""
    assert _flash_attn_varlen_backward is not None
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    # The kernel ignores the strides of lse, so a slice of a longer lse must be copied.
    _flash_attn_varlen_backward(
        dout, q, k, v, out, lse.contiguous(), dq, dk, dv,
        block.query_cuts, block.key_cuts, block.longest_query, block.longest_key,
        dropout_p=0.0, softmax_scale=scale, causal=block.causal, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=False,
    )  # fmt: skip
    return dq, dk, dv


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor]:
    """Call the flash kernel in torch's build."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, block.query_cuts, block.key_cuts, block.longest_query, block.longest_key,
        0.0, block.causal, False, scale=scale,
    )  # fmt: skip
    return out, lse


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), block.query_cuts, block.key_cuts, block.longest_query,
        block.longest_key, 0.0, block.causal, no_dropout, no_dropout[:0], scale=scale,
    )  # fmt: skip


cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _parts(block: Block, *tensors: Tensor) -> list[list[Tensor]]:
    """Split tensors (n, H, K) into parts: for each part, views (1, H, length, K)."""
    split = block.part_lengths if block.causal else None
    heads_first = (x.transpose(0, 1)[None] for x in tensors)
    return list(
        map(list, zip(*([x] if split is None else x.split(split, 2) for x in heads_first), strict=True))
    )  # fmt: skip


def _forward_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor]:
    """Call torch's flash kernel for CPUs for each part, because it does not support cu_seqlens."""
    outs, lses = zip(
        *(
            cpu_forward(*parts, 0.0, block.causal, attn_mask=None, scale=scale)
            for parts in _parts(block, q, k, v)
        ),
        strict=True,
    )
    return joined(outs), torch.cat(lses, 2)[0]


def _backward_on_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lses = lse[None].split(block.part_lengths, 2)
    gradients = [
        cpu_backward(*parts, part_lse, 0.0, block.causal, attn_mask=None, scale=scale)
        for parts, part_lse in zip(_parts(block, dout, q, k, v, out), lses, strict=True)
    ]
    dq, dk, dv = (joined(parts) for parts in zip(*gradients, strict=True))
    return dq, dk, dv


FLASH_ATTN = BlockKernel(_flash_forward, _flash_backward)
TORCH_FLASH = BlockKernel(_torch_forward, _torch_backward)
CPU = BlockKernel(_forward_on_cpu, _backward_on_cpu)


def kernel_for(x: Tensor) -> BlockKernel:
    """Return the kernel for x's device: on GPUs flash-attn if it is installed, otherwise torch's build of it."""
    if not on_gpu(x):
        return CPU
    return TORCH_FLASH if _flash_attn_varlen_forward is None else FLASH_ATTN
