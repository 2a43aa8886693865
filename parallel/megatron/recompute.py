"""Selective recomputation of the outputs of norms and SwiGLU in the backward of the next linear.

A norm (or SwiGLU) saves its input for its backward anyway, and the output can be computed from it. So the next linear
saves a note instead of its input, and calls the op again for the gradient of its weight. This saves 2 D + F elements
per token and layer (Korthikanti et al., arXiv 2205.05198, section 5, applied to what flash attention still saves).

With Transformer Engine only SwiGLU's output is recomputed: a norm is a part of the linear after it.

Megatron's `recompute_granularity="selective"` is not used. In 0.16.1 and 0.19.2 its `layernorm` module needs
Transformer Engine even in bf16 (a NameError otherwise), and it has no module for the activation of a dense MLP.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from phimini.parallel.megatron.layers import RMSNorm, SwiGLU


class _Note(NamedTuple):
    """Replacement of a saved tensor: the function that recomputes its storage, and its place in it."""

    again: Callable[[], Tensor]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _note(y: Tensor, op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    if torch.is_grad_enabled():
        y.made_again_by = partial(op, x.detach())  # pyright: ignore[reportAttributeAccessIssue]


class RecomputedRMSNorm(RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        norm = super().forward
        if residual is None:
            y = norm(x)
            _note(y, norm, x)
            return y
        y, h = norm(x, residual)
        _note(y, norm, h)  # the norm alone, of the sum
        return y, h


class RecomputedSwiGLU(SwiGLU):
    def forward(self, gate_up: Tensor) -> Tensor:
        y = super().forward(gate_up)
        _note(y, super().forward, gate_up)
        return y


def forgetting(linear: type) -> type:
    """Wrap `linear` so that it recomputes its input in backward instead of saving it, if the input allows it."""

    def forward(self: Any, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        again = getattr(input_, "made_again_by", None)
        if again is None:
            return linear.forward(self, input_, *args, **kwargs)
        with _notes_instead_of(input_, again):
            return linear.forward(self, input_, *args, **kwargs)

    return type(f"{linear.__name__}Forgetting", (linear,), {"forward": forward})


def saving_its_input(linear: type) -> type:
    """Wrap a linear of Transformer Engine so that it forgets its input, as `forgetting`, and not an FP8 copy of it.

    It saves the bf16 tensor that it is given, and rounds it again in backward. For attention's output that costs no
    memory, because attention keeps the same tensor.
    """
    from megatron.core.extensions.transformer_engine import set_save_original_input

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        linear.__init__(self, *args, **kwargs)
        set_save_original_input(self)

    return type(f"{linear.__name__}Saving", (forgetting(linear),), {"__init__": __init__})


def _notes_instead_of(tensor: Tensor, again: Callable[[], Tensor]) -> saved_tensors_hooks:
    # The number, not the storage, which these functions would keep alive as long as torch holds them.
    storage = tensor.untyped_storage()._cdata

    def pack(kept: Tensor) -> Tensor | _Note:
        if kept.untyped_storage()._cdata != storage:
            return kept
        return _Note(again, kept.shape, kept.stride(), int(kept.storage_offset()))

    def unpack(kept: Tensor | _Note) -> Tensor:
        if not isinstance(kept, _Note):
            return kept
        with torch.no_grad():
            return kept.again().as_strided(kept.shape, kept.stride, kept.offset)

    return saved_tensors_hooks(pack, unpack)
