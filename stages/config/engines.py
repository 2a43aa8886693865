"""The engine that samples rollouts: settings of a run."""

from dataclasses import dataclass
from typing import Annotated, Literal

from phimini.model.checked_fields import Range
from phimini.stages.config.ranges import Count, CountOrZero, PositiveShare, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """The engine that samples rollouts, and how weights reach it."""

    engine: Literal["local", "vllm"] = "local"
    """`local`: the reference model's sampler, embedded in the training ranks"""
    max_batch: Count | None = None
    """sequences decoded at once by one engine; by default as many as a GPU's memory holds, at most 256; on a CPU 256"""
    log: bool = True
    """stage 4 keeps each step's rollouts in rollouts/, with tokens, log-probs and texts: at 1,024 answers of 12k tokens
    about 130 MB"""
    judges: CountOrZero = 0
    """processes that score answers as they arrive, beside each rank that samples; 0: that rank itself, afterwards"""
    placement: Literal["colocated", "separate"] = "colocated"
    """vLLM in the training ranks, or in processes of its own"""
    addresses: tuple[str, ...] = ()
    """separate: http://HOST:PORT of running engines (`phimini serve`), whose key is in PHIMINI_API_KEY; by default rank 0
    starts `num_engines` on its machine"""
    num_engines: Count = 1
    """separate: engines to start"""
    devices: tuple[str, ...] = ()
    """separate: CUDA_VISIBLE_DEVICES of each engine to start, e.g. 4,5"""
    trainer_host: str = "127.0.0.1"
    """separate: the address of rank 0's machine as the engines see it, for gloo"""
    transport: Literal["auto", "inproc", "shm", "gloo", "ipc", "nccl"] = "auto"
    """transport of weights; auto: inproc when colocated, else shm or gloo on a CPU, ipc or nccl on GPUs"""
    pause: Literal["keep", "wait", "abort"] = "keep"
    """separate: running requests during a weight sync: they continue with the new weights, finish first, or are cut
    short and continued"""
    max_model_len: Count | None = None
    """longest prompt and answer together, in tokens; default: vLLM gets the longest sequence_length of stages 3 and 4, the
    local engine goes to the model's max_positions"""
    engine_tensor_parallel: Count = 1
    """GPUs (or ranks) that share one vLLM engine"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of vLLM's weights; auto: bfloat16 on a GPU, float32 on a CPU"""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: the trainer rounds the linears' weights to FP8, block by block, before they travel; needs a GPU"""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """fp8: vLLM keeps keys and values in e4m3, one byte each, which holds twice as many sequences; auto: in its dtype"""
    memory_share: PositiveShare | None = None
    """share of a GPU's memory for one vLLM engine; by default the rest beside the trainer, by the plan's arithmetic, and 0.9
    of a GPU without a trainer"""
    oversample: Annotated[float, Range(1, 1000)] = 1.0
    """separate: stage 4 asks for so many times rollouts_per_prompt and stops a group once it has enough; above 1,
    quick answers are favoured"""
    asynchronous: bool = False
    """separate: stage 4 samples the next step while it trains on this one"""
    partial: bool = False
    """asynchronous: weights are synced while answers are under way, which then go on with the new ones"""
    max_staleness: CountOrZero = 1
    """stage 4 drops answers with a token that is older than so many updates"""
    bucket_mib: Count | None = None
    """weights travel in buckets of this size; default: what the largest tensor needs, at least 64"""
    deadline_s: Seconds = 120.0
    """a weight sync or a silent engine is an error after this long"""
