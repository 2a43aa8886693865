"""Compare the weights of a vLLM model after a sync with the sent ones, by checksum or through the layer's kernel.

A parameter that still holds its numbers is compared by checksum. A weight that is packed for its kernel (on a CPU the
parameter is left with shape (0,), or unused) or stored in FP8 is read through that kernel: a one-hot input returns a
column of the weight, bit for bit if no rounding took place. Each sync reads a few columns, and other ones than before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phimini.kernels import checksum
from phimini.model.config import ModelConfig
from phimini.parallel.weight_sync.fp8_blocks import BLOCK, SCALE_SUFFIX
from phimini.parallel.weight_sync.sync import Entry

COLUMNS = 4
"""adjacent columns of a packed weight that are read back; an optimizer step changes all columns"""
EMBEDDING = "model.embed_tokens"
"""only looked up: vLLM does not use the packed copy that it makes on a CPU"""
FP8_TOLERANCE = 0.125
"""share of a column's largest element, for FP8 weights: some kernels round the scales again"""


@dataclass
class _Expected:
    """The weights that a module must hold after the update."""

    checksum: int
    columns_CN: Tensor
    """columns of this worker's part, for a weight that cannot be read back"""
    first_column: int
    kernel: Any = None
    """the packed weight that was already read and returned these columns"""
    scales_CN: Tensor | None = None
    """scale of each element of columns_CN, for an FP8 weight"""


class ReadBack:
    """The expected weights of one worker's model after one update."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        self._model, self._config = model, config
        self._expected: dict[str, _Expected] = {}
        self._sums: dict[tuple[int, tuple[int, ...]], int] = {}

    def expect(self, entries: Sequence[Entry], tensors: Sequence[Tensor]) -> None:
        """Record the weights that this worker's modules must hold, from tensors whose checksums were right."""
        for entry, tensor in zip(entries, tensors, strict=True):
            for name in self._modules_of(entry.name):
                module = self._model.get_submodule(name)
                if entry.name.endswith(SCALE_SUFFIX):
                    expected = self._expected[name]
                    part = self._part(entry.name, module, tensor, BLOCK)
                    count, rows = expected.columns_CN.shape
                    blocks = (expected.first_column + torch.arange(count)) // BLOCK
                    expected.scales_CN = part[:, blocks].T.repeat_interleave(BLOCK, 1)[:, :rows]
                    continue
                part = self._part(entry.name, module, tensor)
                same = part.numel() == tensor.numel()
                value = entry.checksum if same else checksum(part)
                first, columns_CN = 0, part[:0]
                if part.ndim == 2:
                    first = entry.checksum % max(1, part.shape[1] - COLUMNS + 1)
                    columns_CN = part[:, first : first + COLUMNS].T.clone(
                        memory_format=torch.contiguous_format
                    )
                self._expected[name] = _Expected(value, columns_CN, first)

    def check_packed(self, tensor_name: str) -> None:
        """Read a tensor's layer back if it has just been packed and is still in the cache.

        `check` reports a difference, and reads a layer again that was packed after this call.
        """
        for name in self._modules_of(tensor_name):
            expected, module = self._expected[name], self._model.get_submodule(name)
            if expected.scales_CN is None and _only_packed(module):
                wrong = self._through_kernel(module, expected, expected.columns_CN, 0.0)
                expected.kernel = None if wrong else module.cpu_linear

    def check(self) -> tuple[str, str] | None:
        """Return (tensor, difference) of the first module that differs from the sent weights, or None."""
        for name, expected in self._expected.items():
            if wrong := self._wrong(name, expected):
                return f"{name}.weight", wrong
        return None

    def _wrong(self, name: str, expected: _Expected) -> str:
        module = self._model.get_submodule(name)
        parameter = module.weight
        assert isinstance(parameter, Tensor), f"{name} has no weight"
        if expected.scales_CN is not None:
            columns_CN = expected.columns_CN.float() * expected.scales_CN
            return self._through_kernel(module, expected, columns_CN, FP8_TOLERANCE)
        if parameter.numel():
            if wrong := self._by_checksum(module, parameter.data, expected.checksum):
                return wrong
        kernel = getattr(module, "cpu_linear", None)
        if name == EMBEDDING or (kernel is None and parameter.numel()):
            return ""
        if kernel is not None and kernel is expected.kernel:
            return ""
        return self._through_kernel(module, expected, expected.columns_CN, 0.0)

    def _modules_of(self, tensor_name: str) -> list[str]:
        """Return the vLLM modules that hold a tensor: a tied head has a kernel of its own."""
        module = tensor_name.removesuffix(SCALE_SUFFIX).removesuffix(".weight")
        if self._config.tie_embeddings and module == "model.embed_tokens":
            return [module, "lm_head"]
        return [module]

    def _part(self, tensor_name: str, module: nn.Module, whole: Tensor, block: int = 1) -> Tensor:
        """Return this worker's rows or columns of a tensor, as vLLM splits it, or of scales with one per `block`."""
        indices: Any = getattr(module, "shard_indices", None)
        if indices is not None:  # embedding and head: padded rows
            return whole[indices.org_vocab_start_index : indices.org_vocab_end_index]
        size, rank = getattr(module, "tp_size", 1), getattr(module, "tp_rank", 0)
        if size == 1 or whole.ndim == 1:
            return whole
        module_name = tensor_name.removesuffix(SCALE_SUFFIX).removesuffix(".weight")
        if module_name.endswith(("o_proj", "down_proj")):
            return whole.chunk(size, 1)[rank]
        config = self._config
        sizes = [config.mlp_dim] * 2
        if module_name.endswith("qkv_proj"):
            kv = config.num_kv_heads * config.head_dim
            sizes = [config.num_heads * config.head_dim, kv, kv]
        parts = whole.split([n // block for n in sizes])
        return torch.cat([part.chunk(size, 0)[rank] for part in parts])

    def _by_checksum(self, module: nn.Module, data: Tensor, expected: int) -> str:
        indices: Any = getattr(module, "shard_indices", None)
        if indices is not None:
            data = data[: indices.org_vocab_end_index - indices.org_vocab_start_index]
        key = data.data_ptr(), tuple(data.shape)
        if key not in self._sums:  # a tied head's is the embedding's
            self._sums[key] = checksum(data)
        if self._sums[key] == expected:
            return ""
        return f"the engine holds checksum {self._sums[key]}, it was sent {expected}"

    def _through_kernel(
        self, module: nn.Module, expected: _Expected, columns_CN: Tensor, tolerance: float
    ) -> str:
        """Return the difference in the layer's output for one-hot inputs, or "" if it is right."""
        width: Any = getattr(module, "input_size_per_partition", None) or self._config.model_dim
        dtype = columns_CN.dtype if tolerance == 0 else module.orig_dtype
        count, first = len(columns_CN), expected.first_column
        one_hot = torch.zeros(count, width, dtype=dtype, device=columns_CN.device)  # pyright: ignore
        one_hot[:, first : first + count].fill_diagonal_(1)
        got_CN = module.quant_method.apply(module, one_hot)[:, : columns_CN.shape[1]]  # pyright: ignore
        if torch.equal(got_CN, columns_CN):
            return ""
        limit_C1 = tolerance * columns_CN.abs().amax(1, keepdim=True)
        wrong = ((got_CN - columns_CN).abs() > limit_C1) | got_CN.isnan()
        if not wrong.any():
            return ""
        number, row = (int(i) for i in wrong.nonzero()[0])
        return (
            f"the engine computes with {got_CN[number, row].item():.9g} at row {row}, column {first + number}; "
            f"it was sent {columns_CN[number, row].item():.9g}"
        )


def _only_packed(module: nn.Module) -> bool:
    weight = module.weight
    packed = isinstance(weight, Tensor) and weight.numel() == 0 and not weight.is_meta
    return packed and hasattr(module, "cpu_linear")
