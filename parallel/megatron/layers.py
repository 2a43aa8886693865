"""Modules for the slots of Megatron's layer spec: our kernels for norm and activation, and the linears."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from phimini.kernels.linear import linear
from phimini.kernels.rms_norm import rms_norm
from phimini.kernels.swiglu import swiglu


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

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class SwiGLU(nn.Module):
    """SwiGLU (..., 2F) -> (..., F): silu of the first half times the second."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Megatron's column-parallel linear, reduced to a plain linear without tensor parallelism.

    Megatron's forward would still pass through Python autograd functions, which on a CPU take as long as a small
    product.
    """

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.config.tensor_model_parallel_size == 1:
            assert self.weight is not None, "a column-parallel linear without its own weight"
            return linear(input_, self.weight), None
        return super().forward(input_, *args, **kwargs)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Megatron's row-parallel linear, reduced to a plain linear without tensor parallelism."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.tensor_model_parallel_size == 1:
            return linear(input_, self.weight), None
        return super().forward(input_)


class HeadWeight(tensor_parallel.ColumnParallelLinear):
    """Module for the output layer's slot, which holds the head's weight for the fused loss.

    Its forward returns the hidden states unchanged, and triggers DDP's hook, which waits for the gather of the weight
    (ZeRO-1 with overlap).
    """

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return input_
