"""The ranks of this job: process groups, this rank's place in them, and the exchange of small objects."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from phimini.model.config import ModelConfig
from phimini.parallel.ranks import process
from phimini.parallel.ranks.layout import Layout

T = TypeVar("T")
_RAISED_ON_ALL = (ValueError, OSError, ImportError)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This rank's view of the job, made by `initialize` and ended by `close`."""

    rank: int
    world_size: int
    layout: Layout
    """resolved, so `data` is filled in"""
    device: torch.device
    token_multiple: int
    """of `layout`, and so is `uses_ring`, on this device"""
    uses_ring: bool
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    """index of the replica: ranks with the same data_rank train on the same micro-batches"""
    data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_context_group: dist.ProcessGroup
    """data x context: the ranks over which gradients are summed"""

    @property
    def is_main(self) -> bool:
        """True on the rank that logs and writes."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the ranks of the last pipeline stage, which has the head."""
        return self.pipeline_rank == self.layout.pipeline - 1

    def all_gather_objects(self, value: T) -> list[T]:
        """Return the `value` of every rank, by rank. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_objects(self, value: T) -> list[T]:
        """Return the `value` of every rank, by rank, on rank 0, and an empty list on the others. Collective."""
        if self.world_size == 1:
            return [value]
        if not self.is_main:
            dist.gather_object(value)
            return []
        values: list[Any] = [None] * self.world_size
        dist.gather_object(None, values)  # its own needs no pickle
        return [value, *values[1:]]

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """Return rank `src`'s `value` on every rank. Collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=src, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here. Collective."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Destroy Megatron's process groups and torch's; another `initialize` may follow."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _group(value: Any) -> dist.ProcessGroup:
    assert isinstance(value, dist.ProcessGroup), f"expected one process group, got {value!r}"
    return value


def initialize(
    layout: Layout, model_config: ModelConfig, *, timeout_s: float = 600, seed: int = 0
) -> World:
    """Join the job that torchrun or `run_ranks` described in the environment; without one, a job of one rank.

    Uses NCCL on CUDA and gloo on a CPU. A collective that takes longer than `timeout_s` ends the job. `seed` seeds
    dropout and Megatron's per-rank random states. Raises ValueError if `layout` does not fit the world or the model,
    or if this rank has no GPU of its own.
    """
    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError("initialize: this process already has a World; close it first")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    layout = layout.resolve(world_size, model_config)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"rank {rank} of {world_size} is number {device.index} on its machine, where {torch.cuda.device_count()} "
                "GPUs are visible (from 0): one each is needed, so start fewer ranks (processes=1, or torchrun's)"
            )
        torch.cuda.set_device(device)
    process.process_group_joined = True
    if not dist.is_initialized():
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
        if world_size == 1:
            dist.init_process_group(
                backend, store=HashStore(), rank=0, world_size=1, timeout=timeout
            )
        else:
            dist.init_process_group(backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline
        if layout.virtual_pipeline > 1
        else None,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,  # a second set of groups beside NCCL's, for checkpoints that we do not write
        distributed_timeout_minutes=timeout_s / 60,  # pyright: ignore[reportArgumentType]
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return World(
        rank=rank,
        world_size=world_size,
        layout=layout,
        device=device,
        token_multiple=layout.token_multiple,
        uses_ring=layout.uses_ring(device.type),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_group=_group(parallel_state.get_tensor_model_parallel_group()),
        pipeline_group=_group(parallel_state.get_pipeline_model_parallel_group()),
        context_group=_group(parallel_state.get_context_parallel_group()),
        data_group=_group(parallel_state.get_data_parallel_group()),
        data_context_group=_group(
            parallel_state.get_data_parallel_group(with_context_parallel=True)
        ),
    )


# --- errors of one rank on every rank, so that no rank waits for another -----------------------------
def on_every(world: World, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; raise an OSError, ValueError or ImportError of any rank on all. Collective.

    `action` must not communicate: a rank that fails in it leaves early.
    """
    result, error = None, None
    try:
        result = action()
    except _RAISED_ON_ALL as e:
        error = e
    mine = None
    if error is not None:
        kind = next(i for i, kind in enumerate(_RAISED_ON_ALL) if isinstance(error, kind))
        mine = kind, str(error)
    for report in world.all_gather_objects(mine):
        if report is not None:
            kind, message = report
            raise _RAISED_ON_ALL[kind](message) from error
    return result  # pyright: ignore[reportReturnType]


def on_main(world: World, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. Raises as `on_every`. Collective."""
    result = on_every(world, action) if world.is_main else on_every(world, lambda: None)
    return world.broadcast_object(result)  # pyright: ignore[reportReturnType]
