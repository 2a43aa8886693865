"""The attention kernel of this device: one forward and one backward, on CUDA and CPU, and the one place that chooses it.

n queries and m keys of a `context_parallel.Block`, H query heads, G key/value heads, K head size.

    forward(q, k, v, block, scale) -> out (n, H, K), lse (H, n) fp32          lse = log sum exp(scale q k^T)
    backward(dout, q, k, v, out, lse, block, scale) -> dq, dk, dv             of q's, k's and v's shapes

`backward` takes the out and lse over *all* keys that the queries see, in this block and in others of a ring. The
probabilities exp(scale q k^T - lse) and the term sum(dout * out) are then those of the whole attention, and dq, dk, dv
are this block's part.

    sm_90           FlashAttention 3 if its package is installed, else 4
    sm_100          FlashAttention 4
    others          FlashAttention 2, in torch's build
Hopper and Blackwell fall back to 2 where no package is installed; `attention_name` in core.py then says so.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phimini.kernels.backend.launch import on_gpu
from phimini.parallel.attention.context_parallel import Block, joined


class BlockKernel(NamedTuple):
    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Block, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _lengths(block: Block) -> tuple[Tensor, Tensor, int, int]:
    return block.query_cuts, block.key_cuts, block.longest_query, block.longest_key


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor]:
    """Call torch's flash kernel: its build of FlashAttention 2, or the implementation that was activated."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_lengths(block), 0.0, block.causal, False, scale=scale
    )
    return out, lse


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    # The kernels ignore the strides of lse, so a slice of a longer lse must be copied.
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), *_lengths(block), 0.0, block.causal, no_dropout, no_dropout[:0], scale=scale
    )  # fmt: skip


def _flash_4_arguments(block: Block, scale: float) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    arguments = dict(zip(names, _lengths(block), strict=True))
    return arguments | {"softmax_scale": scale, "causal": block.causal}


def _flash_4_forward(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor]:
    """Call flash-attn-4's `_flash_attn_fwd`.

    torch 2.13's own bridge (`torch/nn/attention/_fa4.py`) unpacks two results, where 4.0.0b36 returns five.
    """
    out, lse, *_ = _flash_4()._flash_attn_fwd(
        q, k, v, return_lse=True, **_flash_4_arguments(block, scale)
    )
    return out, lse


def _flash_4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _flash_4()._flash_attn_bwd(
        q, k, v, out, dout, lse.contiguous(), **_flash_4_arguments(block, scale)
    )


@functools.cache
def _flash_4():
    import flash_attn.cute.interface as flash_4  # pyright: ignore[reportMissingImports]  (seconds: its compiler)

    return flash_4


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


CPU = BlockKernel("torch's flash kernel for CPUs", _forward_on_cpu, _backward_on_cpu)
FLASH_2 = BlockKernel("FlashAttention 2", _torch_forward, _torch_backward)
FLASH_3 = BlockKernel("FlashAttention 3", _torch_forward, _torch_backward)
FLASH_4 = BlockKernel("FlashAttention 4", _flash_4_forward, _flash_4_backward)


@functools.cache
def kernel_of(capability: tuple[int, int]) -> BlockKernel:
    """Return the kernel of GPUs with this compute capability, with what is installed, and activate it."""
    major, _ = capability
    if major == 9 and is_installed("flash_attn_3"):
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
        return FLASH_3
    if major in (9, 10) and is_installed("flash-attn-4"):
        return FLASH_4
    return FLASH_2


def is_installed(distribution: str) -> bool:
    """Return whether a package is installed, without importing it."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def kernel_for(x: Tensor) -> BlockKernel:
    """Return the kernel for x's device."""
    if not on_gpu(x):
        return CPU
    return kernel_of(torch.cuda.get_device_capability(x.device))
