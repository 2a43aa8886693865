"""What stands in the slots of Megatron's layer spec: our kernels for norm and activation, and the linears."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from phimini.kernels.linear import linear
from phimini.kernels.rms_norm import rms_norm
from phimini.kernels.swiglu import swiglu


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), statistics in fp32.

    Under sequence parallelism each tensor-parallel rank sees a part of the tokens: the mark on the weight makes
    Megatron sum its gradient over them. Without it the loss is right and the gradient is not.
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
    """(..., 2F) -> (..., F): silu of the first half times the second."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Megatron's. Alone in its tensor-parallel group it has nobody to talk to and is a plain linear; Megatron's forward
    would pass through Python autograd functions all the same, which on a CPU costs as much as a small product."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.config.tensor_model_parallel_size == 1:
            assert self.weight is not None, "a column-parallel linear without its own weight"
            return linear(input_, self.weight), None
        return super().forward(input_, *args, **kwargs)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Megatron's, with the same short way for a group of one."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.tensor_model_parallel_size == 1:
            return linear(input_, self.weight), None
        return super().forward(input_)


class HeadWeight(tensor_parallel.ColumnParallelLinear):
    """The output layer's place: holds the head's weight, which the fused loss reads. Calling it with the hidden states
    gives them back, but lets DDP's hook wait until the weight is gathered (ZeRO-1 with overlap)."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return input_
