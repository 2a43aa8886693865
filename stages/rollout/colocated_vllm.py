"""vLLM engine inside the training ranks. Its settings are in `vllm_settings.py`."""

import contextlib
import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.world import World
from phimini.parallel.weight_sync.cpu_transports import InprocTransport
from phimini.parallel.weight_sync.deadline import WeightSyncError, completed
from phimini.parallel.weight_sync.sync import SyncReport, WeightSync
from phimini.stages.config.schema import RunConfig
from phimini.stages.rollout.engine import (
    LOADED,
    Arrived,
    First,
    Sampled,
    check_prompts,
    check_temperature,
    share_of,
    unnoticed,
)
from phimini.stages.rollout.engine_folder import engine_folder
from phimini.stages.rollout.vllm_settings import (
    EngineSettings,
    as_sent,
    bucket_bytes,
    dtype_of,
    engine_arguments,
    engine_settings,
    files_of,
    outgoing,
    require_vllm,
    sampled,
    vllm_params,
    write_engine_config,
)


class ColocatedVllm:
    """A vLLM engine in every training rank, or one over each `engine_tensor_parallel` of them.

    vLLM allows one engine per process: `colocated_vllm` keeps it from stage to stage.
    bucket_bytes: of tensors that it is given together in a sync, by reference.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: EngineSettings,
        world: World,
        deadline_s: float,
        *,
        bucket_bytes: int = 64 << 20,
    ) -> None:
        if world.world_size % settings.tensor_parallel:
            raise ValueError(
                f"rollout.engine_tensor_parallel: {settings.tensor_parallel} does not divide the "
                f"{world.world_size} ranks"
            )
        self.config, self.settings, self._world = config, settings, world
        self._llm = _start_llm(config, settings, world)
        self.version: int | None = None
        """of the weights that may be sampled from; None: none, or mixed"""
        self.asleep = False
        self.last_sync: SyncReport | None = None
        self._sync = WeightSync(
            config,
            InprocTransport(),
            [_InprocReceiver(self)],
            bucket_bytes=bucket_bytes,
            deadline_s=deadline_s,
            dtype=dtype_of(settings),
            fp8=settings.fp8,
            where=f"trainer rank {world.rank}",
        )

    def load(self, directory: Path) -> None:
        """Load the weights of a Hugging Face folder. Raises WeightSyncError on every rank."""
        self._receive(files_of(directory, self.config, self.settings), LOADED)

    def sync(self, model: Model) -> None:
        """Copy the trainer's weights, and verify them. Raises WeightSyncError on every rank."""
        self._receive(outgoing(model, self.settings), model.num_updates)

    def as_sent(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Return a model's tensors as a sync sends them."""
        return as_sent(tensors, self.settings)

    def sleep(self) -> None:
        """Release the engine's weights and KV cache, if its settings allow it. Sync or load before sampling again."""
        if self.settings.sleeps and not self.asleep:
            self._llm.sleep(level=2)
            self.version, self.asleep = None, True

    def reset_prefix_cache(self) -> None:
        """Drop cached keys and values. Raises RuntimeError if the cache is in use."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vllm: the prefix cache is in use and was not reset")

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        arrived: Arrived = unnoticed,
        first: First | None = None,
    ) -> list[Sampled | None]:
        """Return the completions of this engine's share of the prompts, on the first of its ranks; see `Sampler`.

        Raises ValueError for prompts, seeds or a temperature that cannot be sampled, RuntimeError without a whole set of weights.
        """
        assert first is None, "build_engine refuses rollout.oversample"
        check_temperature("temperature", params.temperature)
        check_prompts(prompts, seeds, params, self.config.vocab_size, self.settings.max_model_len)
        if self.version is None:
            raise RuntimeError(
                "vllm: the engine has no whole set of weights; sync or load comes first"
            )
        # Ranks of one engine get the same prompts in the same order, and the same answers.
        size = self.settings.tensor_parallel
        mine = share_of(prompts, self._world.rank // size, self._world.world_size // size)
        done: list[Sampled | None] = [None] * len(prompts)
        ids = self._llm.enqueue(
            [{"prompt_token_ids": prompts[i]} for i in mine],
            [vllm_params(params, seeds[i]) for i in mine],
            use_tqdm=False,
        )
        start = int(ids[0].partition("-")[0]) if ids else 0  # vLLM numbers its requests
        while self._llm.llm_engine.has_unfinished_requests():
            for output in self._llm.llm_engine.step():
                if output.finished and self._world.rank % size == 0:
                    number = mine[int(output.request_id) - start]
                    done[number] = completion = sampled(output.outputs[0])
                    arrived(number, completion)
        return done

    def _receive(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        old, self.version = self.version, None
        if self.asleep:
            # Torch keeps the blocks of activations that are gone; while the engine is awake they are its.
            torch.cuda.empty_cache()
            self._llm.wake_up()
            self.asleep = False
        error: WeightSyncError | None = None
        try:
            self.last_sync = self._sync.sync(tensors, version)
            self.version = version
        except WeightSyncError as e:
            error = e
            self.version = old if e.whole else None
        # Engines with different weights on different ranks are useless, so the error is raised on all ranks.
        for other in self._world.all_gather_objects(error):
            if other is not None:
                raise other from error

    def call(self, phase: str, info: dict[str, Any]) -> list[dict[str, Any]]:
        """Run one phase of a sync in this process and return the workers' answers; see `_InprocReceiver`."""
        if phase in ("pause", "resume"):  # nothing is being sampled while its caller is here
            return []
        answers = self._llm.collective_rpc("phimini_sync", args=(phase, info))
        if phase == "finish" and not any("error" in answer for answer in answers):
            self._llm.update_weight_version(info["version"])
            self.reset_prefix_cache()
        return answers


class _InprocReceiver:
    def __init__(self, engine: ColocatedVllm) -> None:
        self.name = "the colocated engine"
        self._engine = engine

    def call(self, phase: str, info: dict[str, Any]) -> "Future[list[dict[str, Any]]]":
        return completed(lambda: self._engine.call(phase, info))


def _start_llm(config: ModelConfig, settings: EngineSettings, world: World) -> Any:
    require_vllm()
    with engine_folder() as folder:
        write_engine_config(config, settings, str(folder))
        arguments = engine_arguments(settings, str(folder))
        if world.world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        with _own_shared_memory(settings, world):
            return _undisturbed(lambda: _llm(arguments))


def _llm(arguments: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from phimini.parallel.weight_sync.vllm_receiver import register

    register()
    transfer = WeightTransferConfig(**arguments.pop("weight_transfer_config"))
    llm = LLM(**arguments, weight_transfer_config=transfer)
    # When the process ends vLLM would end the trainer's process groups, which are gone by then.
    core: Any = llm.llm_engine.engine_core
    core._finalizer.atexit = False
    return llm


@contextlib.contextmanager
def _own_shared_memory(settings: EngineSettings, world: World) -> Iterator[None]:
    """Give the shared memory in which a CPU engine's ranks meet a name of this job's own.

    vLLM 0.32 makes the name from `env://`, which is the same for every job of the machine, and never removes the memory: a
    second job, or one after a crash, would fail to start. The memory is removed once the ranks have met.
    """
    if settings.tensor_parallel == 1 or torch.cuda.is_available():
        yield
        return
    from vllm.distributed.device_communicators import cpu_communicator

    token = world.broadcast_object(uuid.uuid4().hex)
    shared: Any = cpu_communicator._CPUSHMDistributed
    make_group_name = shared.make_group_name
    shared.make_group_name = staticmethod(lambda c: f"{token}-{make_group_name(c).lstrip('/')}")
    try:
        yield
    finally:
        shared.make_group_name = staticmethod(make_group_name)
        world.barrier()
        if world.is_main:
            for path in Path("/dev/shm").glob(f"*{token}*"):
                path.unlink()


def _undisturbed(action: Callable[[], Any]) -> Any:
    """Run `action` and undo the changes that an engine makes to its process: seeds, and torch.set_num_threads disabled."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        return action()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


_engine: ColocatedVllm | None = None


def colocated_vllm(run: RunConfig, config: ModelConfig, world: World) -> ColocatedVllm:
    """Return this process's engine, which the first call starts. Raises ValueError if a later call asks for another."""
    global _engine
    settings = engine_settings(run, config, "inproc", world.layout)
    if _engine is None:
        size = bucket_bytes(run, config, settings)
        _engine = ColocatedVllm(config, settings, world, run.rollout.deadline_s, bucket_bytes=size)
    if (_engine.config, _engine.settings) != (config, settings):
        raise ValueError(
            f"vllm: this process has an engine for {_engine.settings}, and can have no other; asked for {settings}"
        )
    return _engine
