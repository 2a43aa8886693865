"""The parallel layout of a job: tensor, pipeline, context and data parallel sizes, checked once, with reasons."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from phimini.model.config import ModelConfig, head_flops_per_token, layer_flops_per_token

ContextKeys = Literal["auto", "gathered", "ring"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes. The product of tensor, pipeline, context and data is the world size."""

    tensor: int = 1
    """ranks that share each weight matrix (heads, MLP columns, vocabulary rows)"""
    pipeline: int = 1
    """stages of consecutive layers"""
    virtual_pipeline: int = 1
    """chunks of layers per stage, interleaved; needs pipeline > 1"""
    context: int = 1
    """ranks that share each sequence's tokens"""
    data: int | None = None
    """replicas; None means whatever the world size leaves"""
    sequence_parallel: bool = False
    """norms and residuals hold 1/tensor of the tokens; needs tensor > 1"""
    token_alignment: int = 1
    """a rank's tokens are padded to a multiple of this: 16 and more for FP8 products"""
    context_keys: ContextKeys = "auto"
    """how context ranks exchange keys and values: all gathered at once, or passed around a ring; auto: gathered on a
    CPU, a ring on GPUs, where the transfers overlap with the attention"""

    def __post_init__(self) -> None:
        for name in (
            "tensor", "pipeline", "virtual_pipeline", "context", "data", "token_alignment"
        ):  # fmt: skip
            value = getattr(self, name)
            if name == "data" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"Layout.{name}: expected a positive integer, got {value!r}")
        if self.context_keys not in get_args(ContextKeys):
            raise ValueError(f"Layout.context_keys: expected one of {get_args(ContextKeys)}, got {self.context_keys!r}")  # fmt: skip
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"Layout.virtual_pipeline: {self.virtual_pipeline} interleaved chunks need pipeline > 1, got pipeline 1"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("Layout.sequence_parallel: needs tensor > 1, got tensor 1")

    @property
    def model_size(self) -> int:
        """The number of ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    def uses_ring(self, device_type: str) -> bool:
        """Return True if context ranks on a `device_type` ("cpu" or "cuda") pass keys around a ring."""
        automatic = "gathered" if device_type == "cpu" else "ring"
        return self.context > 1 and self.context_keys.replace("auto", automatic) == "ring"

    @property
    def token_multiple(self) -> int:
        """The number whose multiples a micro-batch's tokens are padded to (context zigzag, sequence parallel shards)."""
        zigzag = 2 * self.context if self.context > 1 else 1
        # Transformer Engine refuses a rank's own shard, before it gathers the shards of a sequence.
        return zigzag * (self.tensor if self.sequence_parallel else 1) * self.token_alignment

    def resolve(self, world_size: int, model: ModelConfig) -> "Layout":
        """Return this layout with `data` filled in. Raises ValueError that names a size that would fit."""
        parts = f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
        size = self.model_size
        if world_size % size:
            near = sorted({max(1, world_size // size) * size, (world_size // size + 1) * size})
            raise ValueError(
                f"Layout: world size {world_size} is not a multiple of {parts} = {size}; "
                f"world sizes {' or '.join(map(str, near))} would fit"
            )
        data = world_size // size
        if self.data is not None and self.data != data:
            raise ValueError(
                f"Layout.data: {self.data} was asked for, but world size {world_size} with {parts} leaves {data}"
            )
        for field, value in (
            ("num_heads", model.num_heads),
            ("num_kv_heads", model.num_kv_heads),
            ("mlp_dim", model.mlp_dim),
            ("vocab_size", model.vocab_size),
        ):
            if value % self.tensor:
                raise ValueError(
                    f"Layout.tensor: {self.tensor} does not divide the model's {field} {value}; "
                    f"tensor in {_tensor_sizes(model)} would fit"
                )
        chunks = self.pipeline * self.virtual_pipeline
        if chunks > model.num_layers:
            raise ValueError(
                f"Layout: pipeline {self.pipeline} x virtual_pipeline {self.virtual_pipeline} = {chunks} chunks, but the "
                f"model has {model.num_layers} layers; a product of at most {model.num_layers} would fit"
            )
        return replace(self, data=data)

    def layers_of_chunks(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the number of layers of each chunk, in the order of the layers: chunk i is on stage i % pipeline.

        The head costs as much as `head_cost` layers (matmul FLOPs of a token, the same ratio forward and backward), so
        the last chunk gets fewer layers. Of all splits, the one whose most expensive chunk is cheapest is taken. Layers
        left over by an even split go to later chunks, which keep fewer micro-batches' activations than earlier ones.
        """
        chunks = self.pipeline * self.virtual_pipeline
        if chunks == 1:
            return (model.num_layers,)
        head_cost = model.num_layers * head_flops_per_token(model) / layer_flops_per_token(model)

        def worst(last: int) -> float:
            return max(-(-(model.num_layers - last) // (chunks - 1)), last + head_cost)

        last = min(range(1, model.num_layers - chunks + 2), key=lambda n: (worst(n), -n))
        each, more = divmod(model.num_layers - last, chunks - 1)
        return (*(each + (i >= chunks - 1 - more) for i in range(chunks - 1)), last)


def _tensor_sizes(model: ModelConfig) -> list[int]:
    return [
        n
        for n in range(1, model.num_kv_heads + 1)
        if all(
            v % n == 0
            for v in (model.num_heads, model.num_kv_heads, model.mlp_dim, model.vocab_size)
        )
    ]
