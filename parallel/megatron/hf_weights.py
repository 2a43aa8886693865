"""Conversion of weights between this rank's shards and Hugging Face files or tensors, one tensor at a time.

`weight_names.py` defines the name and the split of each tensor. The whole model is never in memory: reading takes
slices, and writing and rollout sync stream whole tensors one after another.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor, nn

from phimini.model.config import ModelConfig
from phimini.model.io.huggingface import check_tensors, save_config
from phimini.model.io.safetensors_folder import read_tensors, write_tensors
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.megatron.weight_names import (
    LAYER_NAMES,
    Split,
    hf_names,
    merge_shards,
    take_shard,
)
from phimini.parallel.ranks.world import World, on_main

__all__ = [
    "export_hf",
    "from_hf",
    "gather_parameters",
    "gradients_to_hf",
    "hf_names",
    "load_hf",
    "plain",
    "slots",
    "to_hf",
]


class MegatronModel(Protocol):
    """The part of `builder.Model` used here: the shape, and this rank's chunks, one per virtual stage."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def chunks(self) -> Sequence[nn.Module]: ...


class TrainedModel(MegatronModel, Protocol):
    @property
    def world(self) -> World: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A Megatron parameter of this rank, with its Hugging Face name and split."""

    hf_name: str
    split: Split
    parameter: nn.Parameter


def slots(model: MegatronModel) -> Iterator[Slot]:
    """Yield this rank's parameters with their Hugging Face names; with a tied head a name may occur twice."""
    for chunk in model.chunks:
        gpt = _unwrap(chunk)
        layer_numbers = [layer.layer_number for layer in gpt.decoder.layers]  # global, from 1
        for name, parameter in gpt.named_parameters():
            hf_name, split = _to_hf_name(name, layer_numbers, model.config.tie_embeddings)
            yield Slot(hf_name=hf_name, split=split, parameter=parameter)


def from_hf(
    model: MegatronModel,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    source: str = "the given tensors",
) -> None:
    """Copy this rank's part of Hugging Face `tensors` into the model. No communication.

    `tensors` is a mapping or (name, tensor) pairs in any order. Of a mapping only the names that this rank holds are
    read, so that a mapping over files opens no others. An existing optimizer keeps its fp32 masters: build the
    optimizer afterwards, or call its `reload_model_params`.

    Raises ValueError that names `source` and the tensor for a missing, unknown or misshapen tensor. A tied model
    accepts `lm_head.weight` only if it equals the embedding.
    """
    config, expected = model.config, hf_names(model.config)
    wanted: dict[str, list[Slot]] = {}
    for slot in slots(model):
        wanted.setdefault(slot.hf_name, []).append(slot)
    accepted = set(expected) | ({"lm_head.weight"} if config.tie_embeddings else set())
    seen: set[str] = set()
    if isinstance(tensors, Mapping):
        mapping: Mapping[Any, Tensor] = tensors
        seen.update(mapping)
        _refuse_names(seen, expected, accepted, config, source)
        read = set(wanted)
        if "model.embed_tokens.weight" in wanted and config.tie_embeddings:
            read.add("lm_head.weight")
        tensors = ((name, mapping[name]) for name in mapping if name in read)
    copies: dict[str, Tensor] = {}  # head and embedding of a tied model
    for name, whole in tensors:
        if name not in accepted:
            raise ValueError(f"{source}: unknown tensor {name!r} for {_kind(config)}")
        shape = expected.get(name, expected["model.embed_tokens.weight"])
        if tuple(whole.shape) != shape:
            raise ValueError(
                f"{source}: tensor {name!r} has shape {tuple(whole.shape)}, expected {shape}"
            )
        if config.tie_embeddings and name in ("lm_head.weight", "model.embed_tokens.weight"):
            copies[name] = whole
        seen.add(name)
        for slot in wanted.get(name, ()):
            _fill(slot, whole, config)
    _refuse_names(seen, expected, accepted, config, source)
    if len(copies) == 2 and not torch.equal(*copies.values()):
        raise ValueError(
            f"{source}: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', but the "
            "model config ties them"
        )


def to_hf(
    model: MegatronModel, *, every_rank: bool = True, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Stream the model as (Hugging Face name, whole tensor), in the order of `hf_names`. Collective.

    One tensor exists at a time, on the parameters' device, so the extra memory peaks at the largest tensor. Every
    rank must exhaust the iterator, or the others wait forever. A tensor that needed no gather may share memory with
    the model: copy it if it must outlive the next optimizer step.

    every_rank: yield every tensor on every rank (rollout sync). If False only global rank 0 yields (export): the
    other ranks of its replica take part, and other data-parallel replicas return at once.
    dtype: of the yielded tensors; None is the parameters' dtype.
    """
    gather_parameters(model)
    params_dtype = _unwrap(model.chunks[0]).config.params_dtype
    return _stream(model, plain, dtype or params_dtype, every_rank)


def gather_parameters(model: MegatronModel) -> None:
    """Gather parameters that ZeRO-1 with overlap would gather only in the next forward. Collective."""
    for chunk in model.chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def gradients_to_hf(
    model: MegatronModel, *, every_rank: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Stream the gradients like `to_hf`, in fp32: DDP's `main_grad`, else `grad`, else zeros. Collective.

    With ZeRO-1 the reduce-scatter leaves each rank only its shard; the shards are first gathered into the gradient
    buffers.
    """
    for chunk in model.chunks:
        if (
            isinstance(chunk, DistributedDataParallel)
            and chunk.ddp_config.use_distributed_optimizer
        ):
            _gather_gradient_shards(chunk)
    return _stream(model, _gradient, torch.float32, every_rank)


def load_hf(model: MegatronModel, directory: str | os.PathLike[str]) -> None:
    """Load a Hugging Face folder with `from_hf`; reads only the tensors that this rank holds. No communication.

    Raises ValueError that names file and tensor.
    """
    files = read_tensors(directory)
    check_tensors(model.config, files)
    from_hf(model, files, source=str(directory))


def export_hf(
    model: TrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face folder from any layout, atomically. Collective; rank 0 writes.

    An existing folder of that name is replaced once the new one is complete. Rank 0 holds the tensors of one file at a
    time. `tokenizer` is saved with the weights and defines the ids that end a generation.
    Raises OSError on every rank if the folder cannot be written; an existing folder then stays unchanged.
    """
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    stream = to_hf(model, every_rank=False, dtype=dtype)

    def write() -> None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            write_tensors(stream, temporary, max_shard_bytes=max_shard_bytes)
            params_dtype = dtype or _unwrap(model.chunks[0]).config.params_dtype
            stop_ids = () if tokenizer is None else tokenizer.stop_ids
            save_config(model.config, temporary, stop_ids=stop_ids, dtype=params_dtype)
            if tokenizer is not None:
                tokenizer.save(temporary)
            _replace_directory(temporary, directory)
        finally:
            for _ in stream:  # the other ranks are still sending, so drain it
                pass
            shutil.rmtree(temporary, ignore_errors=True)

    if not model.world.is_main:
        for _ in stream:
            pass
    on_main(model.world, write)


def _replace_directory(new: Path, directory: Path) -> None:
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        new.rename(directory)
        shutil.rmtree(old)
    else:
        new.rename(directory)


def _stream(
    model: MegatronModel,
    value: Callable[[nn.Parameter], Tensor],
    dtype: torch.dtype,
    every_rank: bool,
) -> Iterator[tuple[str, Tensor]]:
    if not every_rank and parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    tp_group, pp_group = _model_parallel_groups()
    expected = hf_names(model.config)
    held: dict[str, Slot] = {}
    for slot in slots(model):
        held.setdefault(slot.hf_name, slot)
    device = next(model.chunks[0].parameters()).device
    owners = _owning_stages(list(expected), held, pp_group, device)
    sees = every_rank or (pp_group.rank() == 0 and tp_group.rank() == 0)
    for (name, shape), owner in zip(expected.items(), owners, strict=True):
        owned = pp_group.rank() == owner
        if owned:
            shard = value(held[name].parameter).to(dtype)
            whole = _gather_whole(shard, held[name].split, model.config, tp_group)
            assert whole.shape == shape, f"{name}: merged to {tuple(whole.shape)}, expected {shape}"
        elif sees:
            whole = torch.empty(shape, dtype=dtype, device=device)
        else:
            continue
        if every_rank:
            if pp_group.size() > 1:
                dist.broadcast(whole, group=pp_group, group_src=owner)
        elif owner != 0 and tp_group.rank() == 0:
            if owned:
                dist.send(whole, group=pp_group, group_dst=0)
            else:
                dist.recv(whole, group=pp_group, group_src=owner)
        if sees:
            yield name, whole
        del whole  # frees it before the next one is allocated


def _gather_whole(
    shard: Tensor, split: Split, config: ModelConfig, group: dist.ProcessGroup
) -> Tensor:
    shard = shard.contiguous()
    if group.size() == 1 or split == "whole":
        return merge_shards(shard[None], split, config)
    shards = torch.empty((group.size(), *shard.shape), dtype=shard.dtype, device=shard.device)
    dist.all_gather_into_tensor(shards.flatten(0, 1), shard, group=group)
    return merge_shards(shards, split, config)


def _owning_stages(
    names: list[str], held: Mapping[str, Slot], group: dist.ProcessGroup, device: torch.device
) -> list[int]:
    """Return the first pipeline stage that holds each name; layers need not be split evenly."""
    nobody = group.size()
    mine = [group.rank() if name in held else nobody for name in names]
    owners = torch.tensor(mine, dtype=torch.int32, device=device)
    if group.size() > 1:
        dist.all_reduce(owners, op=dist.ReduceOp.MIN, group=group)
    found = owners.tolist()
    assert nobody not in found, f"no pipeline stage holds {names[found.index(nobody)]!r}"
    return found


def _model_parallel_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    tp_group = parallel_state.get_tensor_model_parallel_group()
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    assert isinstance(tp_group, dist.ProcessGroup), "the layout has been initialised"
    assert isinstance(pp_group, dist.ProcessGroup), "the layout has been initialised"
    return tp_group, pp_group


def plain(parameter: nn.Parameter) -> Tensor:
    """Return the values of a parameter; those of an FP8 weight in bf16."""
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter.detach()


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = getattr(parameter, "main_grad", None)
    if gradient is None:
        gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else gradient.view(parameter.shape)


def _gather_gradient_shards(chunk: DistributedDataParallel) -> None:
    for bucket_group in chunk.bucket_groups:
        group: Any = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


@torch.no_grad()
def _fill(slot: Slot, whole: Tensor, config: ModelConfig) -> None:
    group, _pp_group = _model_parallel_groups()
    shard = take_shard(whole, slot.split, group.rank(), group.size(), config)
    assert shard.shape == slot.parameter.shape, (
        f"{slot.hf_name}: this rank's shard is {tuple(shard.shape)}, the parameter is "
        f"{tuple(slot.parameter.shape)}"
    )
    slot.parameter.copy_(shard)
    if hasattr(slot.parameter, "_high_precision_init_val"):
        # Megatron initialises the optimizer's fp32 master from this attribute. Without it, the master would keep the
        # weight as built, not as loaded.
        slot.parameter._high_precision_init_val = shard.detach().float().cpu().contiguous()  # pyright: ignore[reportAttributeAccessIssue]


def _to_hf_name(name: str, layer_numbers: list[int], tied: bool) -> tuple[str, Split]:
    """Return the Hugging Face name and split of a parameter; `layer_numbers` are global, from 1."""
    if name == "embedding.word_embeddings.weight":
        return "model.embed_tokens.weight", "rows"
    if name == "output_layer.weight":
        return "model.embed_tokens.weight" if tied else "lm_head.weight", "rows"
    if name == "decoder.final_layernorm.weight":
        return "model.norm.weight", "whole"
    layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
    assert layer.isdigit() and rest in LAYER_NAMES, (
        f"Megatron parameter {name!r} has no Hugging Face name"
    )
    suffix, split = LAYER_NAMES[rest]
    return f"model.layers.{layer_numbers[int(layer)] - 1}.{suffix}", split


def _unwrap(chunk: nn.Module) -> Any:
    """Return the GPTModel inside DDP and Float16Module."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def _refuse_names(
    names: set[str],
    expected: Mapping[str, object],
    accepted: set[str],
    config: ModelConfig,
    source: str,
) -> None:
    if unknown := names - accepted:
        raise ValueError(f"{source}: unknown tensor {min(unknown)!r} for {_kind(config)}")
    if missing := [name for name in expected if name not in names]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{source}: missing tensor {missing[0]!r}{more} of {_kind(config)}")


def _kind(config: ModelConfig) -> str:
    tied = "tied" if config.tie_embeddings else "untied"
    return f"a {config.num_layers}-layer Phi3 model of width {config.model_dim}, {tied} embeddings"
