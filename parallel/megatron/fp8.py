"""FP8 for the layers' linears: the recipes of each GPU, their alignment rules, and the layers that keep bf16.

The first and the last layer, the norms, attention and the head stay in bf16 (fp32 on a CPU). On a GPU Transformer
Engine computes in FP8. With ZeRO-1 it also keeps the weights in FP8 (except with mxfp8), with fp32 masters in the
optimizer and in checkpoints. `emulate` rounds operands to the same values on any device, see `fp8_emulated.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from phimini.model.config import ModelConfig
from phimini.parallel.megatron.fp8_emulated import Fp8Recipe
from phimini.parallel.ranks.layout import Layout

Fp8Mode = Literal["none", "emulate", "te"]
# Rows and columns of an FP8 product must be multiples of this: 16 bytes of a cuBLAS operand, or the block of a scale.
ALIGNMENT: dict[Fp8Recipe, int] = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
# compute capability -> recipes, best first
_RECIPES_OF: dict[int, tuple[Fp8Recipe, ...]] = {
    9: ("tensorwise", "blockwise"),
    10: ("mxfp8", "tensorwise"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """Precision of the linears between the first and the last layer."""

    recipe: Fp8Recipe
    emulate: bool

    @property
    def token_alignment(self) -> int:
        """Multiple to which a rank's tokens are padded; 1 for emulation."""
        return 1 if self.emulate else ALIGNMENT[self.recipe]


def choose(
    mode: Fp8Mode,
    recipe: Fp8Recipe | Literal["auto"],
    device: torch.device,
    capability: tuple[int, int] | None = None,  # None: the current GPU's
) -> Fp8 | None:
    """Return the FP8 settings of the config on this machine, or None.

    Raises ValueError that lists the recipes of the machine if it cannot compute the requested one.
    """
    if mode == "none":
        return None
    if mode == "emulate":
        return Fp8(recipe="tensorwise" if recipe == "auto" else recipe, emulate=True)
    if device.type != "cuda":
        raise ValueError("fp8=te: Transformer Engine needs a GPU; on a CPU use fp8=emulate")
    major, minor = capability or torch.cuda.get_device_capability()
    possible = _RECIPES_OF.get(major, ("tensorwise",) if (major, minor) == (8, 9) else ())
    if not possible:
        raise ValueError(
            f"fp8=te: a GPU of compute capability {major}.{minor} has no FP8 recipe here; expected 8.9, "
            f"{', '.join(f'{m}.x' for m in _RECIPES_OF)}; use fp8=none"
        )
    if recipe == "auto":
        return Fp8(recipe=possible[0], emulate=False)
    if recipe not in possible:
        raise ValueError(
            f"fp8_recipe={recipe}: a GPU of compute capability {major}.{minor} can do {', '.join(possible)}"
        )
    return Fp8(recipe=recipe, emulate=False)


def check_alignment(config: ModelConfig, layout: Layout, fp8: Fp8) -> None:
    """Raise ValueError, with field, size and a size that fits, for a linear whose shard an FP8 product cannot take."""
    if fp8.emulate:
        return
    multiple = ALIGNMENT[fp8.recipe]
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    for field, size, parts in (
        ("model_dim", config.model_dim, 1),
        ("num_heads x head_dim", heads, layout.tensor),
        ("(num_heads + 2 num_kv_heads) x head_dim", qkv, layout.tensor),
        ("mlp_dim", config.mlp_dim, layout.tensor),
        ("2 x mlp_dim", 2 * config.mlp_dim, layout.tensor),
    ):
        if size % (parts * multiple):
            fits = [n for n in range(1, layout.tensor) if size % (n * multiple) == 0]
            hint = f"tensor in {fits} would fit" if fits else "fp8=none would fit"
            raise ValueError(
                f"fp8_recipe={fp8.recipe}: {field} = {size} over tensor {layout.tensor} is {size / parts:g} per rank, "
                f"not a multiple of {multiple}; {hint}"
            )


def is_fp8_layer(layer: int, num_layers: int) -> bool:
    """Return True for all layers but the first and the last, which are the most sensitive."""
    return 0 < layer < num_layers - 1


def te_config_values(fp8: Fp8, *, distributed_optimizer: bool) -> dict[str, Any]:
    """Return TransformerConfig fields for Transformer Engine; Megatron opens its FP8 context around middle layers."""
    return dict(
        # Gradients in e5m2 need its range only under one scale for a whole tensor; blocks have e4m3 both ways.
        fp8="hybrid" if fp8.recipe == "tensorwise" else "e4m3",
        fp8_recipe=fp8.recipe,
        # Keep weights in FP8 only with ZeRO-1 and without mxfp8. Megatron's plain optimizer would make its fp32
        # masters of the rounded values, and Megatron gathers MXFP8 weights only with a special buffer scheme. In those
        # cases weights stay in bf16 and are rounded at each use.
        fp8_param=distributed_optimizer and fp8.recipe != "mxfp8",
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1,
    )
