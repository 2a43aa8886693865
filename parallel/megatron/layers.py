"""The transformer layer and the modules in its slots: norms, SwiGLU, linears; with our kernels, under Megatron's names.

The layer and its attention have a forward of their own. Megatron's would add the residual in a kernel apart, copy q out
of the fused projection, and pass thirty branches that this model does not have. Parameters and checkpoints stay
Megatron's.

On a GPU the gradient of a weight is added to DDP's fp32 `main_grad` by the product itself, which spares a pass over it
and its rounding to bf16 in each micro-batch. On a CPU Megatron's hook adds it, and the golden losses keep their bits.
"""

import types
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from phimini.kernels.backend.cpu_gemm import add_product
from phimini.kernels.backend.launch import on_gpu
from phimini.kernels.linear import linear
from phimini.kernels.rms_norm import rms_norm, rms_norm_add
from phimini.kernels.swiglu import swiglu
from phimini.parallel.attention.core import PackedDocuments


class RMSNorm(nn.Module):
    """RMSNorm: y = weight * x / sqrt(mean(x^2) + eps), with statistics in fp32.

    Under sequence parallelism each tensor-parallel rank sees a part of the tokens. The attribute on the weight makes
    Megatron sum its gradient over the ranks; without it the loss is right and the gradient is wrong.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the norm of x or, with a residual, (norm of the sum, the sum)."""
        if residual is None:
            return rms_norm(x, self.weight, eps=self.eps, main_grad=main_grad_of(self.weight))
        return rms_norm_add(
            x, residual, self.weight, eps=self.eps, main_grad=main_grad_of(self.weight)
        )


class NoNorm(nn.Module):
    """The residual add alone, before a linear that contains the norm (Transformer Engine)."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return x or, with a residual, the sum twice."""
        if residual is None:
            return x
        h = x + residual
        return h, h


class SwiGLU(nn.Module):
    """SwiGLU (..., 2F) -> (..., F): silu of the first half times the second."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)


def main_grad_of(weight: Tensor) -> Tensor | None:
    """Return DDP's fp32 gradient of `weight`, where products add to it; None for a frozen weight and on a CPU."""
    if not weight.requires_grad or not on_gpu(weight):
        return None
    return getattr(weight, "main_grad", None)


def provide_fused_wgrad() -> None:
    """Give Megatron's tensor-parallel linears the product that it imports from APEX, unless APEX is installed."""
    if megatron_layers._grad_accum_fusion_available:
        return

    def wgrad_gemm_accum_fp32(x_MK: Tensor, dy_MN: Tensor, main_grad_NK: Tensor) -> None:
        add_product(main_grad_NK, dy_MN.t(), x_MK)

    module: Any = megatron_layers
    module.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32
    )
    module._grad_accum_fusion_available = True


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Megatron's column-parallel linear, reduced to a plain linear without tensor parallelism.

    Megatron's forward would still pass through Python autograd functions, which on a CPU take as long as a small
    product.
    """

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.config.tensor_model_parallel_size == 1:
            assert self.weight is not None, "a column-parallel linear without its own weight"
            return linear(input_, self.weight, main_grad=main_grad_of(self.weight)), None
        return super().forward(input_, *args, **kwargs)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Megatron's row-parallel linear, reduced to a plain linear without tensor parallelism."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.tensor_model_parallel_size == 1:
            return linear(input_, self.weight, main_grad=main_grad_of(self.weight)), None
        return super().forward(input_)


class _HookOfHeadWeight(torch.autograd.Function):
    """Run DDP's hook of the head's weight in backward, where the head has added to its main_grad in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        ctx.weight.grad_added_to_main_grad = True
        return grads[0], torch.empty_like(ctx.weight)


class HeadWeight(tensor_parallel.ColumnParallelLinear):
    """Module for the output layer's slot, which holds the head's weight for the fused loss.

    Its forward returns the hidden states, and triggers DDP's hook, which waits for the gather of the weight (ZeRO-1 with
    overlap). A weight of its own, not that of this stage's embedding, gets its gradient from the head alone: there
    backward runs the hook that reduces it.
    """

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.weight is None or main_grad_of(self.weight) is None or not input_.requires_grad:
            return input_
        return _HookOfHeadWeight.apply(input_, self.weight)  # pyright: ignore[reportReturnType]


class FusedSelfAttention(SelfAttention):
    """Projection, rotation and attention within documents, projection."""

    def forward(self, hidden_T1D: Tensor, documents: PackedDocuments) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv_T1C, _ = self.linear_qkv(hidden_T1D)  # pyright: ignore[reportCallIssue]
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        qkv_TGNK = qkv_T1C.view(qkv_T1C.shape[0], groups, -1, size)
        out_THK = self.core_attention(qkv_TGNK, documents)  # pyright: ignore[reportCallIssue]
        output, _ = self.linear_proj(out_THK.view(out_THK.shape[0], 1, -1))
        return output


class FusedLayer(TransformerLayer):
    """Norm, attention, norm, MLP. Norms take the residual and return its new value beside their output.

    A layer may leave its last add to the norm of the next layer. It then returns (output of the MLP, residual), and the
    residual travels in the argument `context`, which Megatron passes from layer to layer.
    """

    leaves_add_to_next = False
    """True where a layer of the same chunk follows that adds the residual; see `defer_adds`"""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, *, context: Tensor | None = None, packed_seq_params: PackedDocuments, **_: Any
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        residual = hidden_states
        if context is None:
            normed = self.input_layernorm(hidden_states)
        else:
            normed, residual = self.input_layernorm(hidden_states, context)
        attended = self.self_attention(normed, packed_seq_params)
        normed, residual = self.pre_mlp_layernorm(attended, residual)
        output, _ = self.mlp(normed)
        return (output, residual) if self.leaves_add_to_next else (residual + output, None)


def defer_adds(layers: Any) -> None:
    """Let every layer of a chunk but the last leave its last add to the next layer.

    Not where whole layers are recomputed: each would keep two inputs instead of one.
    """
    for layer in list(layers)[:-1]:
        layer.leaves_add_to_next = True
