"""vLLM as a rollout engine: its settings from the recipe, and the engine that lives in the training ranks.

vLLM is imported inside functions only: whoever samples with the local engine does not need it.

The rope table agrees with the trainer's by construction. vLLM picks short or long factors once per engine, by
whether max_model_len exceeds original_max_position_embeddings, and without max_model_len stops silently at that
length. Here the config.json that vLLM reads has the run's table under both names, and max_model_len always comes
from the recipe.
"""

import contextlib
import dataclasses
import importlib.util
import os
import random
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.huggingface import check_tensors, read_tensors, save_config
from phimini.model.sampler import SamplingParams
from phimini.parallel.builder import Model
from phimini.parallel.weight_names import hf_names
from phimini.parallel.weight_sync import SyncReport, WeightSync, smallest_bucket
from phimini.parallel.weight_sync_transport import InprocTransport
from phimini.parallel.weight_sync_wait import WeightSyncError, completed
from phimini.parallel.weights import to_hf
from phimini.parallel.world import World
from phimini.stages.config import RunConfig
from phimini.stages.rollout_engine import LOADED, Sampled, Span, check_prompts

WORKER_EXTENSION = "phimini.parallel.weight_sync_receiver.WorkerExtension"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs where it is made
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CPU_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1"
}  # a helper that is compiled even in eager mode: 20 s of g++

STEP_TOKENS = 4096
"""that an engine on a CPU computes at once, prompts and answers together"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one vLLM engine is started with; JSON's types, so that it can travel to another node."""

    max_model_len: int
    """tokens of the longest prompt and answer together"""
    max_num_seqs: int
    dtype: Literal["float32", "bfloat16"]
    transport: str
    tensor_parallel: int = 1
    quantization: str | None = None
    kv_cache_bytes: int | None = None
    """None: vLLM takes `memory_share` of the GPU"""
    memory_share: float = 0.5
    sleeps: bool = False
    """the engine's memory can be given to the trainer between rollouts"""


def require_vllm() -> None:
    """Raises ValueError, saying how to get it, where vLLM is not installed. Sets what it reads at import."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine=vllm: the package vllm is not installed; `make test` sets up its CPU engine, "
            "`pip install 'phimini[gpu]'` the one for CUDA, and rollout.engine=local needs neither"
        )
    for name, value in (
        ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENVIRONMENT)
    ).items():
        os.environ.setdefault(name, value)


def engine_settings(run: RunConfig, config: ModelConfig, transport: str) -> EngineSettings:
    """Raises ValueError if the recipe's sequences do not fit the model."""
    rollout, on_gpu = run.rollout, torch.cuda.is_available()
    length = rollout.max_model_len or max(run.rlvr.sequence_length, run.rollout_dpo.sequence_length)
    if length > config.max_positions:
        raise ValueError(
            f"rollout.max_model_len: {length} tokens exceed the model's max_positions {config.max_positions}"
        )
    dtype = rollout.dtype if rollout.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    if rollout.quantization == "fp8" and not on_gpu:
        raise ValueError(
            "rollout.quantization=fp8: needs a GPU with FP8 units; expected none on a CPU"
        )
    per_token = (
        2
        * config.num_layers
        * config.num_kv_heads
        * config.head_dim
        * getattr(torch, dtype).itemsize
    )
    blocks = -(-length // 128) + 1  # of 128 tokens, on a CPU
    enough = per_token * 128 * blocks * rollout.max_batch
    return EngineSettings(
        max_model_len=length,
        max_num_seqs=rollout.max_batch,
        dtype=dtype,
        transport=transport,
        tensor_parallel=rollout.engine_tensor_parallel,
        quantization=None if rollout.quantization == "none" else rollout.quantization,
        kv_cache_bytes=None if on_gpu else max(enough, 1 << 24),
        memory_share=rollout.memory_share,
        sleeps=on_gpu and rollout.placement == "colocated",
    )


def engine_arguments(settings: EngineSettings, folder: str) -> dict[str, Any]:
    """Keyword arguments of vLLM's `LLM` and `AsyncEngineArgs` alike; `folder` holds config.json."""
    require_vllm()
    from vllm.config import WeightTransferConfig

    from phimini.parallel import weight_sync_receiver

    weight_sync_receiver.register()
    on_gpu = torch.cuda.is_available()
    return {
        "model": folder,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "load_format": "dummy",  # weights come by sync, and nothing is sampled before
        "generation_config": "vllm",
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        # A prompt cut in two winds its request's generator back, which one on a CPU cannot do: vLLM 0.32 then dies.
        "enable_chunked_prefill": on_gpu,
        "max_num_batched_tokens": None if on_gpu else max(STEP_TOKENS, settings.max_model_len),
        "tensor_parallel_size": settings.tensor_parallel,
        "quantization": settings.quantization,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "gpu_memory_utilization": settings.memory_share,
        "enforce_eager": not on_gpu,
        "enable_sleep_mode": settings.sleeps,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "seed": 0,  # every request has its own
        "weight_transfer_config": WeightTransferConfig(backend=settings.transport),  # pyright: ignore[reportArgumentType]
        "worker_extension_cls": WORKER_EXTENSION,
    }


def write_engine_config(config: ModelConfig, folder: str) -> None:
    """config.json for vLLM, with the run's rope table as the short one and as the long one."""
    if config.long_factor is not None:
        table = config.rope_divisors
        config = dataclasses.replace(config, short_factor=table, long_factor=table)
    save_config(config, folder)


def vllm_params(params: SamplingParams, seed: int) -> Any:
    """The request's own temperature and seed, and the log-prob of each token under what it was drawn from."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VllmSamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        seed=seed & (2**63 - 1),
        max_tokens=params.max_new_tokens,
        stop_token_ids=list(params.stop_ids),
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled(output: Any) -> Sampled:
    """Of one finished vLLM CompletionOutput."""
    tokens = list(output.token_ids)
    return Sampled(
        tokens=tokens,
        logprobs=[at[token].logprob for token, at in zip(tokens, output.logprobs, strict=True)],
        finish_reason="stop" if output.finish_reason == "stop" else "length",
        versions=tuple(
            Span(int(span.version), span.start, span.end) for span in output.weight_versions or ()
        ),
    )


def bucket_bytes(run: RunConfig, config: ModelConfig, dtype: torch.dtype) -> int:
    """`rollout.bucket_mib`, or what the largest tensor needs, at least 64 MiB."""
    if run.rollout.bucket_mib is not None:
        return run.rollout.bucket_mib << 20
    needed = smallest_bucket(config, dtype, merging=run.tensor_parallel > 1)
    return max(64 << 20, *needed.values())


def files_of(
    directory: Path, config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """A Hugging Face folder's tensors in the order of a sync. ValueError names file and tensor."""
    files = read_tensors(directory)
    check_tensors(config, files)
    return ((name, files[name].to(dtype)) for name in hf_names(config))


class ColocatedVllm:
    """A vLLM engine in every training rank, or one over each `engine_tensor_parallel` of them.

    vLLM allows one engine per process: `colocated_vllm` keeps it from stage to stage.
    """

    def __init__(
        self, config: ModelConfig, settings: EngineSettings, world: World, deadline_s: float
    ) -> None:
        if world.world_size % settings.tensor_parallel:
            raise ValueError(
                f"rollout.engine_tensor_parallel: {settings.tensor_parallel} does not divide the "
                f"{world.world_size} ranks"
            )
        self.config, self.settings, self._world = config, settings, world
        self._dtype = getattr(torch, settings.dtype)
        self._llm = _start_llm(config, settings, world)
        self.version: int | None = None
        """of the weights that may be sampled from; None: none, or mixed"""
        self._asleep = False
        self.last_sync: SyncReport | None = None
        self._sync = WeightSync(
            config,
            InprocTransport(),
            [_InprocReceiver(self)],
            bucket_bytes=0,  # tensors are handed over one by one
            deadline_s=deadline_s,
            where=f"trainer rank {world.rank}",
        )

    def load(self, directory: Path) -> None:
        self._take(files_of(directory, self.config, self._dtype), LOADED)

    def sync(self, model: Model) -> None:
        self._take(to_hf(model, dtype=self._dtype), model.num_updates)

    def rest(self) -> None:
        """Gives the engine's GPU memory to the trainer; its weights are gone and must be synced before sampling."""
        if self.settings.sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self.version, self._asleep = None, True

    def reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vllm: the prefix cache is in use and was not reset")

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Sampled]:
        check_prompts(prompts, params, self.config.vocab_size, self.settings.max_model_len)
        if self.version is None:
            raise RuntimeError(
                "vllm: the engine has no whole set of weights; sync or load comes first"
            )
        # Ranks of one engine get the same prompts in the same order.
        size = self.settings.tensor_parallel
        engine, engines = self._world.rank // size, self._world.world_size // size
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        mine = order[engine::engines]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompts[i]} for i in mine],
            [vllm_params(params, seeds[i]) for i in mine],
            use_tqdm=False,
        )
        done = {i: sampled(output.outputs[0]) for i, output in zip(mine, outputs, strict=True)}
        everyone = {i: c for part in self._world.all_gather_objects(done) for i, c in part.items()}
        return [everyone[i] for i in range(len(prompts))]

    def generate_groups(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        groups: list[str],
        wanted: int | None,
    ) -> list[Sampled]:
        return self.generate(prompts, params, seeds)

    def _take(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        old, self.version = self.version, None
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        error: WeightSyncError | None = None
        try:
            self.last_sync = self._sync.sync(tensors, version)
            self.version = version
        except WeightSyncError as e:
            error = e
            self.version = old if e.whole else None
        # One rank's engine on other weights than the rest is as bad as none: all ranks hear of it.
        for other in self._world.all_gather_objects(error):
            if other is not None:
                raise other from error

    def call(self, phase: str, info: dict[str, Any]) -> list[dict[str, Any]]:
        """One phase of a sync, for the trainer's side of it in this very process."""
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
    with tempfile.TemporaryDirectory(prefix="phimini-vllm-") as folder:
        write_engine_config(config, folder)
        arguments = engine_arguments(settings, folder)
        if world.world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        with _own_shared_memory(settings, world):
            return _undisturbed(lambda: _llm(arguments))


def _llm(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**arguments)


@contextlib.contextmanager
def _own_shared_memory(settings: EngineSettings, world: World) -> Iterator[None]:
    """On a CPU, ranks of one engine meet in shared memory whose name vLLM 0.32 makes from `env://`.

    It is the same for every job of the machine and never removed: a second job, or one after a crash, fails to
    start. Here it has a name of this job's own, which goes once the ranks have met.
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
    """`action()`, with what an engine does to its process undone: seeds, and torch.set_num_threads made a no-op."""
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
    """This process's engine, started by the first call. ValueError if a later one asks for another."""
    global _engine
    settings = engine_settings(run, config, "inproc")
    if _engine is None:
        _engine = ColocatedVllm(config, settings, world, run.rollout.deadline_s)
    if (_engine.config, _engine.settings) != (config, settings):
        raise ValueError(
            f"vllm: this process has an engine for {_engine.settings}, and can have no other; asked for {settings}"
        )
    return _engine
