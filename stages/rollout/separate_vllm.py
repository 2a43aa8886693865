"""Engines of `vllm serve` as one rollout engine: rank 0 talks to them.

rollout.addresses has the URLs of running engines (`phimini serve`); without it rank 0 starts `rollout.num_engines`
on its machine. Weights travel by rollout.transport: shm and gloo on a CPU, ipc and nccl on GPUs.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.world import World
from phimini.parallel.weight_sync.cpu_transports import GlooTransport, ShmTransport
from phimini.parallel.weight_sync.deadline import WeightSyncError
from phimini.parallel.weight_sync.gpu_transports import IpcTransport, NcclTransport
from phimini.parallel.weight_sync.sync import SyncReport, Transport, WeightSync
from phimini.stages.config.schema import RunConfig
from phimini.stages.rollout.dispatch import Request, RolloutError, RolloutService
from phimini.stages.rollout.engine import (
    LOADED,
    Arrived,
    First,
    Sampled,
    check_prompts,
    check_temperature,
    unnoticed,
)
from phimini.stages.rollout.launch import (
    EngineProcess,
    check_addresses,
    own_key,
    shared_key,
    tokenizer_of,
    transport_of,
)
from phimini.stages.rollout.served_engine import EventLoop, ServedEngine
from phimini.stages.rollout.vllm_settings import (
    EngineSettings,
    as_sent,
    bucket_bytes,
    dtype_of,
    engine_settings,
    files_of,
    outgoing,
)

T = TypeVar("T")


class EngineSampler:
    """The sampler of rank 0: sends prompts to the engine processes. Its methods are not collective.

    A thread of rank 0 may call it while the ranks train.
    """

    def __init__(self, engine: "SeparateVllm") -> None:
        self._engine = engine

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        arrived: Arrived = unnoticed,
        first: First | None = None,
    ) -> list[Sampled | None]:
        """Return the completions; see `Sampler`. Raises RolloutError if all engines are lost."""
        check_temperature("temperature", params.temperature)
        vocab_size, longest = self._engine.config.vocab_size, self._engine.settings.max_model_len
        check_prompts(prompts, seeds, params, vocab_size, longest)
        groups, sizes = first or ([""] * len(prompts), {})
        requests = [
            Request(id=str(i), prompt=prompt, params=params, seed=seed, group=group)
            for i, (prompt, seed, group) in enumerate(zip(prompts, seeds, groups, strict=True))
        ]
        done = self._engine.service.run(
            requests, sizes=sizes, arrived=lambda id, c: arrived(int(id), c)
        )
        return [done.get(request.id) for request in requests]


class SeparateVllm:
    """Engines behind HTTP. Rank 0 talks to them, and has their completions; every method is collective."""

    def __init__(
        self, run: RunConfig, config: ModelConfig, settings: EngineSettings, world: World
    ) -> None:
        self.config, self.settings, self._world = config, settings, world
        self._service: RolloutService | None = None
        self._sync: WeightSync | None = None
        self.last_sync: SyncReport | None = None
        self.on_main = EngineSampler(self)
        self._run_on_main(lambda: self._open(run))

    def load(self, directory: Path) -> None:
        """Send the weights of a Hugging Face folder. Raises WeightSyncError."""
        self._send(files_of(directory, self.config, self.settings), LOADED)

    def sync(self, model: Model) -> None:
        """Send the trainer's weights. If an engine is lost on the way and others are left, send them to those."""
        while True:
            try:
                self._send(outgoing(model, self.settings, every_rank=False), model.num_updates)
                return
            except WeightSyncError as error:
                if not self._run_on_main(lambda error=error: self._gave_up_lost(error)):
                    raise

    def as_sent(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Return a model's tensors as a sync sends them."""
        return as_sent(tensors, self.settings)

    def reset_prefix_cache(self) -> None:
        """Drop cached keys and values in every engine."""

        def reset() -> None:
            for engine in self.service.alive:
                engine.call("reset", {}).result(engine.deadline_s)

        self._run_on_main(reset)

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        arrived: Arrived = unnoticed,
        first: First | None = None,
    ) -> list[Sampled | None]:
        """Return the completions on rank 0; see `Sampler`."""
        done: list[Sampled | None] = []
        action = lambda: done.extend(self.on_main.generate(prompts, params, seeds, arrived, first))
        self._run_on_main(action)
        return done or [None] * len(prompts)

    def close(self) -> None:
        """End the connections; engines that this run started end too."""
        if self._service is not None:
            close(self._service.engines)

    @property
    def service(self) -> RolloutService:
        """The dispatcher of requests; only rank 0 has it."""
        assert self._service is not None, "rank 0 has the service"
        return self._service

    def _open(self, run: RunConfig) -> None:
        rollout = run.rollout
        engines = self._served(run) if rollout.addresses else self._started(run)
        self._service = RolloutService(engines, per_engine=2 * self.settings.max_num_seqs)
        self._sync = WeightSync(
            self.config,
            _transport(run, self.config, self.settings),
            engines,
            bucket_bytes=bucket_bytes(run, self.config, self.settings),
            deadline_s=rollout.deadline_s,
            dtype=dtype_of(self.settings),
            fp8=self.settings.fp8,
            merging=self._world.layout.tensor > 1,
            pause=rollout.pause,
        )

    def _served(self, run: RunConfig) -> list[ServedEngine]:
        check_addresses(run)
        key = shared_key("rollout.addresses")
        try:
            return self._connected(run, key, list(run.rollout.addresses), [])
        except (RuntimeError, OSError) as error:
            raise ValueError(f"rollout.addresses: {error}") from error

    def _started(self, run: RunConfig) -> list[ServedEngine]:
        rollout, key = run.rollout, own_key()
        devices = rollout.devices or ("",) * rollout.num_engines
        if len(devices) != rollout.num_engines:
            raise ValueError(
                f"rollout.devices: expected one entry for each of {rollout.num_engines} engines, got {devices}"
            )
        processes: list[EngineProcess] = []
        try:
            for device in devices:
                processes.append(
                    EngineProcess(
                        self.config,
                        self.settings,
                        key,
                        devices=device,
                        tokenizer=tokenizer_of(run),
                        chat_template=run.chat_template,
                    )  # fmt: skip
                )
            for process in processes:
                process.wait()
            engines = self._connected(run, key, [process.url for process in processes], processes)
        except BaseException:  # Ctrl-C too
            for process in processes:
                process.close()
            raise
        # At this process's end, which waits for its children.
        Finalize(self, close, args=(engines,), exitpriority=1)
        return engines

    def _connected(
        self, run: RunConfig, key: str, urls: list[str], processes: list[EngineProcess]
    ) -> list[ServedEngine]:
        """Return connections to all engines, each with its lease."""
        loop, engines = EventLoop(), []
        owned = processes or [None] * len(urls)
        try:
            for i, (url, process) in enumerate(zip(urls, owned, strict=True)):
                engine = ServedEngine(
                    url,
                    key,
                    loop,
                    name=f"engine {i}",
                    deadline_s=run.rollout.deadline_s,
                    process=process,
                )
                engines.append(engine)
                engine.connect(self.config, self.settings, str(Path(run.out).resolve()))
        except BaseException:
            close(engines)
            raise
        return engines

    def _send(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        if not self._world.is_main:
            for _ in tensors:  # every rank takes part in the gather
                pass
        self.last_sync = self._run_on_main(lambda: self._send_to_engines(tensors, version))

    def _gave_up_lost(self, error: WeightSyncError) -> bool:
        """Give up the engines that died or fell silent. Return False if all are well, or no other engine is left."""
        assert self._sync is not None, "rank 0 has the sync"
        asked = [engine for engine in self.service.engines if engine in self._sync.receivers]
        lost = [e for e in asked if not e.loop.run(e.is_heard(e.deadline_s / 2))]
        if not lost or len(lost) == len(asked):
            return False
        without = ", ".join(engine.name for engine in lost)
        print(f"phimini: {error}; it is repeated without {without}", file=sys.stderr, flush=True)
        return True

    def _send_to_engines(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        assert self._sync is not None, "rank 0 has the sync"
        alive = self.service.alive
        if not alive:
            for _ in tensors:
                pass
            raise RolloutError("no vLLM engine is left to sync with")
        self._sync.set_receivers(alive)
        return self._sync.sync(tensors, version)

    def _run_on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0. Its result is returned, or its error raised, on every rank. Collective."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self._world.is_main:
            try:
                outcome = (action(), None)
            except (WeightSyncError, RuntimeError, ValueError, OSError) as error:
                outcome = (None, error)
        result, error = self._world.broadcast_object(outcome)
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]


def _transport(run: RunConfig, config: ModelConfig, settings: EngineSettings) -> Transport:
    size = bucket_bytes(run, config, settings)
    host, workers = run.rollout.trainer_host, settings.tensor_parallel
    if settings.transport == "shm":
        return ShmTransport(size)
    if settings.transport == "gloo":
        return GlooTransport(size, host=host, workers_per_engine=workers)
    if settings.transport == "ipc":
        return IpcTransport(size, workers_per_engine=workers)
    if settings.transport == "nccl":
        return NcclTransport(size, workers_per_engine=workers)
    raise ValueError(
        f"rollout.transport: expected shm, gloo, ipc or nccl for engines of their own, got {settings.transport!r}"
    )


def close(engines: list[ServedEngine]) -> None:
    """End connections; engines that this run started end too."""
    for engine in engines:
        engine.close()


_engines: SeparateVllm | None = None


def separate_vllm(run: RunConfig, config: ModelConfig, world: World) -> SeparateVllm:
    """Return this job's engines, which the first call starts or connects. Raises ValueError if a later one asks for others."""
    global _engines
    settings = engine_settings(run, config, transport_of(run))
    if _engines is None:
        _engines = SeparateVllm(run, config, settings, world)
    if (_engines.config, _engines.settings) != (config, settings):
        raise ValueError(
            f"vllm: this job's engines were started for {_engines.settings}; asked for {settings}"
        )
    return _engines
