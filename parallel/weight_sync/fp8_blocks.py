"""Linear weights in FP8 for the rollout engine, with one scale per block of 128 x 128 that the trainer computes.

    w8 = round_e4m3(w / s)      s = max |w| over the block / 448      the engine computes with w8 * s

vLLM reads them like a quantised checkpoint (quant_method fp8, weight_block_size [128, 128]): a linear layer has two
tensors, `weight` in float8_e4m3fn and `weight_scale_inv` in float32. Half the bytes travel, every engine and every
worker computes with the same numbers, and weights are quantised once. Embedding, head and norms keep their dtype.
(vLLM 0.32 no longer quantises on load under the name fp8.)
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.parallel.megatron.weight_names import hf_names

BLOCK = 128
SCALE_SUFFIX = ".weight_scale_inv"
LARGEST = 448.0
"""largest number of float8_e4m3fn"""
ROWS_AT_ONCE = 16 * BLOCK
"""rows of a weight that are copied to float32 at once"""
LINEARS = ("qkv_proj.weight", "o_proj.weight", "gate_up_proj.weight", "down_proj.weight")
VLLM_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of the config.json that vLLM reads"""


def quantise_blocks(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise (N, K) to float8_e4m3fn (N, K) and float32 scales (ceil(N / 128), ceil(K / 128)); a zero block has scale 1."""
    quantised_NK = torch.empty_like(weight_NK, dtype=torch.float8_e4m3fn)
    parts = zip(weight_NK.split(ROWS_AT_ONCE), quantised_NK.split(ROWS_AT_ONCE), strict=True)
    return quantised_NK, torch.cat([_quantise_rows(rows, into) for rows, into in parts])


def _quantise_rows(rows_NK: Tensor, into_NK: Tensor) -> Tensor:
    """Fill `into_NK` and return the scales."""
    N, K = rows_NK.shape
    blocks_IBJB = _blocks(rows_NK.to(torch.float32, copy=True))
    scale_IJ = torch.maximum(blocks_IBJB.amax((1, 3)), -blocks_IBJB.amin((1, 3))) / LARGEST
    scale_IJ = torch.where(scale_IJ > 0, scale_IJ, 1.0)
    blocks_IBJB.div_(scale_IJ[:, None, :, None]).clamp_(-LARGEST, LARGEST)
    into_NK.copy_(blocks_IBJB.flatten(0, 1).flatten(1)[:N, :K])
    return scale_IJ


def working_bytes(shape: tuple[int, ...]) -> int:
    """Return the most bytes that quantising a matrix of this shape allocates: the result, and some rows in float32."""
    N, K = (-(-n // BLOCK) * BLOCK for n in shape)
    return N * K + 2 * 4 * min(N, ROWS_AT_ONCE) * K


def dequantise_blocks(weight_NK: Tensor, scale_IJ: Tensor) -> Tensor:
    """Return the float32 (N, K) weights that the engine computes with."""
    N, K = weight_NK.shape
    scale_NK = scale_IJ.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
    return weight_NK.float() * scale_NK


def is_quantised(name: str) -> bool:
    """Return True for the weight of a linear layer."""
    return name.endswith(LINEARS)


def quantise_stream(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the stream of `to_hf` with each linear's weight in FP8, followed by its scales."""
    for name, tensor in tensors:
        if not is_quantised(name):
            yield name, tensor
            continue
        weight, scale = quantise_blocks(tensor)
        del tensor
        yield name, weight
        del weight
        yield name.removesuffix(".weight") + SCALE_SUFFIX, scale


def quantised_names(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return `hf_names` with the scales, in the order of `quantise_stream`."""
    names: dict[str, tuple[int, ...]] = {}
    for name, shape in hf_names(config).items():
        names[name] = shape
        if is_quantised(name):
            blocks = tuple(-(-n // BLOCK) for n in shape)
            names[name.removesuffix(".weight") + SCALE_SUFFIX] = blocks
    return names


def check_blocks(config: ModelConfig, tensor_parallel: int) -> None:
    """Raise ValueError if a worker's part of q, k, v, gate, up or an input is not in whole blocks, which vLLM refuses."""
    sizes = {
        "model_dim": config.model_dim,
        "num_heads * head_dim / workers": config.num_heads * config.head_dim / tensor_parallel,
        "num_kv_heads * head_dim / workers": config.num_kv_heads
        * config.head_dim
        / tensor_parallel,
        "mlp_dim / workers": config.mlp_dim / tensor_parallel,
    }
    for name, size in sizes.items():
        if size % BLOCK:
            raise ValueError(
                f"rollout.quantization=fp8: expected {name} to be a multiple of {BLOCK}, got {size:g}"
            )


def _blocks(rows: Tensor) -> Tensor:
    """Reshape (N, K) to (I, 128, J, 128), with zeros in the last blocks if they are not full."""
    N, K = rows.shape
    if N % BLOCK or K % BLOCK:
        rows = torch.nn.functional.pad(rows, (0, -K % BLOCK, 0, -N % BLOCK))
    return rows.view(-(-N // BLOCK), BLOCK, -(-K // BLOCK), BLOCK)
