"""`phimini bench train` with what Megatron-Bridge's closest recipe sets, in the place of what is ours

    python -m phimini.bench.peers.megatron_bridge sft --run DIR --steps N --json PATH

Neither Bridge nor its recipes know Phi-4-mini (PEERS.md). The closest is Llama 3.2 with 3 billion parameters:
`llama32_3b_pretrain_1gpu_h100_bf16_config` (NVIDIA-NeMo/Megatron-Bridge 067f987d, recipes/llama/h100/llama3.py). RECIPE
is what of it bears on speed and memory. Our trainer runs with it: Transformer Engine's layers, ZeRO-1 with overlap,
no own head (full logits, then Transformer Engine's cross-entropy over them), no recomputation beyond the run's.
Attention and its rotation stay ours: Bridge has no LongRoPE, and FlashAttention is under both.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor, nn

from phimini.bench.system import train
from phimini.parallel.megatron import builder
from phimini.parallel.training.batch import PackedBatch
from phimini.stages import midtrain, sft

RECIPE: dict[str, Any] = {
    "model.transformer_impl": "transformer_engine", "model.cross_entropy_loss_fusion": True,
    "model.cross_entropy_fusion_impl": "te", "model.recompute_granularity": None, "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1, "model.context_parallel_size": 1, "model.sequence_parallel": False,
    "train.micro_batch_size": 1, "ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True,
    "ddp.use_distributed_optimizer": True, "ddp.grad_reduce_in_fp32": True,
}  # fmt: skip
"""bf16 is its mixed_precision's `bf16_mixed`: bf16 parameters, gradients reduced in fp32"""


class FusedSwiGLU(nn.Module):
    """Megatron's own, which Bridge's models use (bias_activation_fusion)."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return bias_swiglu_impl(gate_up, None)


def materialised_head(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Full logits (M, V / tensor-parallel ranks), then Megatron's vocab-parallel cross-entropy; summed, and the count."""
    if group is not None and group.size() > 1:
        whole = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_MD)
        assert whole is not None
        hidden_MD = whole
    logits_MV = F.linear(hidden_MD, weight_VD)
    trained_M = batch.targets_T >= 0
    targets_M = batch.targets_T.clamp(min=0)
    loss_M = cross_entropy_of(logits_MV.device)(logits_MV[:, None], targets_M[:, None], group)[:, 0]
    return (loss_M * trained_M).sum(), trained_M.sum(), {}


def cross_entropy_of(device: torch.device) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """Of (M, 1, V) logits and (M, 1) targets: Transformer Engine's on a GPU; elsewhere Megatron's `native` one."""
    if device.type != "cuda":
        return lambda logits, targets, group: tensor_parallel.vocab_parallel_cross_entropy(logits, targets)  # fmt: skip
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    return lambda logits, targets, group: te_parallel_cross_entropy(logits, targets, group)


def te_linears(fp8: Any, is_fp8_layer: bool) -> Any:
    """In the place of `builder._linears`: Transformer Engine's in every layer, in bf16."""
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    return builder._Linears(TELayerNormColumnParallelLinear, TERowParallelLinear, builder.IdentityOp)  # fmt: skip


@contextlib.contextmanager
def bridge_style(*, transformer_engine: bool = True) -> Iterator[None]:
    """Models built and stages run within are Bridge's where ours differ; `transformer_engine=False` leaves the layers."""
    theirs: list[tuple[Any, str, Any]] = [
        (stage, "cross_entropy_head", materialised_head) for stage in (sft, midtrain)
    ]
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        theirs += [
            (builder, "_linears", te_linears),
            (builder, "RMSNorm", TENorm),
            (builder, "SwiGLU", FusedSwiGLU),
        ]
    ours = [(module, name, getattr(module, name)) for module, name, _ in theirs]
    for module, name, value in theirs:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in ours:
            setattr(module, name, value)


if __name__ == "__main__":
    with bridge_style():
        sys.exit(train.main(sys.argv[1:]))
