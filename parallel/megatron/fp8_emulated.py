"""FP8 linears without FP8 hardware: operands are rounded to FP8 values and multiplied in fp32.

    y = Q(x) Q(w)^T          x, w in e4m3
    dx = Q(dy) Q(w)          dy in e4m3; in tensorwise in e5m2, whose range gradients need under one scale
    dw = Q(dy)^T Q(x)

Q(v) = cast(v / s) * s with s = max |v| / (largest FP8 value), clamped before the cast. The recipe determines the
elements that share an s:

    tensorwise   all elements, over the ranks of the tensor-parallel group, so that the layout does not matter
    blockwise    1 x 128 of an activation, along the summed dimension; 128 x 128 of a weight
    mxfp8        1 x 32 along the summed dimension (OCP Microscaling Formats 1.0)

A block's s is rounded up to a power of two, as in Transformer Engine. (Micikevicius et al., arXiv 2209.05433; blocks
as in DeepSeek-V3, arXiv 2412.19437, 3.3.) The values equal those of a Transformer Engine linear with the same recipe,
except that Transformer Engine scales each rank's shard of a weight separately in `tensorwise`. Slower than fp32, so
for numerics only.

The cost for the demo's stage 1 (bench/results/README.md) is 0.1 % of the loss on the same weights, averaged over the
stage. For one model at the end of all 3,200 steps, where the loss is 0.05, it is 0.3 to 0.5 % (0.5 to 0.9 % of the
validation loss), with or without scales that are powers of two. Whole runs must be compared over seeds, because single
steps of two runs that differ only in rounding diverge by several per cent. With seed 2 the loss averaged over all 3,200
steps was 0.3 % below that of fp32 and, in another run, 1.0 % below.

M rows, N output and K input features; letters of a suffix are the axes of a tensor.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from phimini.kernels.backend.cpu_gemm import matmul, outer

Fp8Recipe = Literal["tensorwise", "blockwise", "mxfp8"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCK, MX_BLOCK = 128, 32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest FP8 values, in x's dtype, and clamp to the largest (a bare cast would give NaN or inf)."""
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype).to(x.dtype)


def round_tensorwise(x: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Tensor:
    """Round with one scale for the whole tensor and its parts on the other ranks of `group`."""
    largest = x.abs().amax()
    if group is not None and group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    scale = _scale(largest, dtype)
    return cast(x / scale, dtype) * scale


def round_blocks(
    x_RC: Tensor,  # (R, C)
    dtype: torch.dtype,
    rows: int,  # of a block
    columns: int,
) -> Tensor:
    """Round with one scale per block, a power of two; the last blocks may be smaller."""
    R, C = x_RC.shape
    padded = torch.nn.functional.pad(x_RC, (0, -C % columns, 0, -R % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = _scale(blocks.abs().amax((1, 3), keepdim=True), dtype)
    scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return (cast(blocks / scale, dtype) * scale).view(padded.shape)[:R, :C]


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(largest > 0, largest / LARGEST[dtype], 1.0)


def round_activation(
    x_RC: Tensor, dtype: torch.dtype, recipe: Fp8Recipe, group: dist.ProcessGroup | None
) -> Tensor:
    """Round an activation or its gradient (R, C) for a product that sums over C."""
    if recipe == "tensorwise":
        return round_tensorwise(x_RC, dtype, group)
    return round_blocks(x_RC, dtype, 1, BLOCK if recipe == "blockwise" else MX_BLOCK)


def round_weight(w_RC: Tensor, recipe: Fp8Recipe, group: dist.ProcessGroup | None) -> Tensor:
    """Round a weight (R, C) for a product that sums over C."""
    if recipe == "blockwise":
        return round_blocks(w_RC, E4M3, BLOCK, BLOCK)
    return round_activation(w_RC, E4M3, recipe, group)


class _Product(torch.autograd.Function):
    """Product (M, K), (N, K) -> (M, N) with FP8 operands, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, w_NK: Tensor, recipe: Fp8Recipe, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.save_for_backward(x_MK, w_NK)
        ctx.recipe, ctx.group = recipe, group
        return matmul(
            round_activation(x_MK, E4M3, recipe, group), round_weight(w_NK, recipe, group).T
        )

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MK, w_NK = ctx.saved_tensors
        recipe, group = ctx.recipe, ctx.group
        w_KN = round_weight(w_NK.T, recipe, group)
        dtype = E5M2 if recipe == "tensorwise" else E4M3
        dx_MK = matmul(round_activation(dy_MN, dtype, recipe, group), w_KN.T)
        dy_NM = round_activation(dy_MN.T, dtype, recipe, group)
        x_KM = round_activation(x_MK.T, E4M3, recipe, group)
        return dx_MK, outer(dy_NM.T, x_KM.T), None, None


def fp8_linear(
    x: Tensor,  # (..., K)
    weight_NK: Tensor,
    recipe: Fp8Recipe,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return x W^T with FP8 operands, forward and backward, with gradients for both.

    group: ranks that share one tensorwise scale.
    """
    y_MN = _Product.apply(x.reshape(-1, x.shape[-1]), weight_NK, recipe, group)
    assert isinstance(y_MN, Tensor)
    return y_MN.view(*x.shape[:-1], -1)


def emulated(linear: type, recipe: Fp8Recipe) -> type:
    """Return `linear` (one of the two classes below) with its recipe, for a slot of Megatron's layer spec."""
    return type(f"{linear.__name__}_{recipe}", (linear,), {"fp8_recipe": recipe})


class Fp8ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Megatron's column-parallel linear, with this rank's product in emulated FP8; see `emulated`."""

    fp8_recipe: Fp8Recipe

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        group: Any = parallel_state.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(input_)
        else:
            x = copy_to_tensor_model_parallel_region(input_)
        assert self.weight is not None and x is not None
        return fp8_linear(x, self.weight, self.fp8_recipe, group), None


class Fp8RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Megatron's row-parallel linear, with this rank's product in emulated FP8."""

    fp8_recipe: Fp8Recipe

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        group: Any = parallel_state.get_tensor_model_parallel_group()
        y = fp8_linear(input_, self.weight, self.fp8_recipe, group)
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y), None  # pyright: ignore[reportReturnType]
        return reduce_from_tensor_model_parallel_region(y), None  # pyright: ignore[reportReturnType]
