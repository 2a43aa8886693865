"""A run is one frozen config, returned by a Python function of `recipes.py` and overridden by `key=value`.

Where the paper is silent (optimizer, schedule shape, DPO beta, group size, ...) the value is a knob of
ours; the fields that carry the paper's values say so in `recipes.phi4_mini_reasoning`.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from phimini.stages.config.ranges import check_ranges

C = TypeVar("C")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW, on every weight matrix; 1-D weights are not decayed."""

    lr: float
    """peak learning rate"""
    min_lr_ratio: float = 0.0
    """learning rate after the last step, over the peak"""
    warmup_ratio: float = 0.1
    """share of the steps with linear warm-up, from 0 at the first step"""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """shape after the warm-up"""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """global gradient norm above which gradients are scaled down"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Questions, the teacher's rollouts of them, and a verdict on each rollout."""

    source: str = "generator"
    """`generator` (our own problems and teacher); a folder of your own with rollouts.jsonl, validation.jsonl,
    prompts.jsonl and heldout.jsonl; or one JSONL file of rollouts, whose questions are then divided over these"""
    num_problems: int = 1000
    """training questions that the teacher answers"""
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """relative share of each level among the training questions"""
    rollouts_per_problem: int = 4
    """teacher rollouts of each question"""
    quick: float = 0.5
    """share of operations that the generator's teacher does in its head"""
    slip: float = 0.2
    """share of the operations done in the head (facts of one digit excepted) that come out wrong"""
    num_prompts: int = 2000
    """questions without a teacher rollout, kept for stages 3 and 4"""
    gym_tasks: tuple[str, ...] = ()
    """if given, those questions come from these tasks of reasoning-gym, e.g. chain_sum,gcd (extra `prompts`)"""
    num_heldout: int = 504
    """evaluation questions; none of their numbers occur in any other set"""
    num_validation: int = 150
    """questions whose teacher rollouts measure the validation loss"""
    heldout_seed: int = 777
    """the evaluation set is the same for every seed of the run"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurateConfig:
    """Stage 2's compact, balanced subset of stage 1's rollouts."""

    sft_examples: int = 1000
    """how many examples stage 2 gets, spread evenly over families and levels"""
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """relative share of each level"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MidtrainConfig:
    """Stage 1: packed, document-masked, on every verified-correct rollout."""

    optimizer: OptimizerSettings
    sequence_length: int
    """tokens of a packed row"""
    rows_per_step: int
    """packed rows in the global batch"""
    micro_rows: int = 1
    """packed rows that one rank computes at once"""
    steps: int | None = None
    """step budget; training may stop earlier, see `stop`"""
    epochs: float | None = None
    """the budget in passes over the packed rows; either this or `steps`"""
    stop: Literal["budget", "saturation"] = "budget"
    """`saturation`: stop when the validation loss has not improved for `patience` validations"""
    patience: int = 3
    validate_every: int = 100
    """steps between two measurements of the validation loss"""
    loss_on_question: bool = True
    """the paper's words are a standard causal objective; False masks the question"""
    checkpoint_every: int = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Stage 2: one example per sequence, loss on the answer and its end."""

    optimizer: OptimizerSettings
    sequence_length: int
    """an example longer than this is an error"""
    examples_per_step: int
    micro_examples: int = 8
    """examples that one rank computes at once"""
    epochs: float = 1.0
    validate_every: int = 50
    checkpoint_every: int = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutDpoConfig:
    """Stage 3: pairs of a verified-correct and an incorrect rollout of the same question."""

    optimizer: OptimizerSettings
    pairs: Literal["policy", "teacher"] = "policy"
    """rollouts freshly sampled from the stage-2 model, or those of the teacher (the paper's way)"""
    num_prompts: int = 600
    rollouts_per_prompt: int = 8
    temperature: float = 0.8
    pairs_per_prompt: int = 2
    """at most so many pairs of one question, the teacher's too; no answer is in two of them"""
    max_new_tokens: int = 160
    sequence_length: int = 256
    beta: float = 0.1
    nll_weight: float = 0.0
    """weight of the mean token likelihood of the chosen answer; 0 is plain DPO"""
    pairs_per_step: int = 32
    micro_pairs: int = 8
    epochs: float = 1.0
    checkpoint_every: int = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RlvrConfig:
    """Stage 4: group-relative policy gradient on +1/-1 rewards, with the paper's three remedies."""

    optimizer: OptimizerSettings
    steps: int
    prompts_per_step: int = 32
    rollouts_per_prompt: int = 8
    max_new_tokens: int = 160
    sequence_length: int = 256
    micro_rollouts: int = 64
    """rollouts that one rank trains on at once"""
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    """weight of the k3 estimate of KL(policy || stage-3 model)"""
    normalizer: Literal["token", "sequence"] = "token"
    """a batch's loss is averaged over its tokens (DAPO), or per rollout first (GRPO)"""
    truncated: Literal["negative", "masked"] = "negative"
    """a rollout without an end counts as wrong, or is left out of the loss"""
    min_rollouts: int = 64
    """an update with fewer usable rollouts is skipped and its rollouts wait for the next; learning rate and temperature
    follow the steps, skipped ones too"""
    # Remedy 1: prompt selection by uniform response length, over rounds of sampling. Too easy ones are left out.
    uniform_length: bool = True
    probe_prompts: int = 1200
    probe_rounds: int = 1
    probe_rollouts: int = 4
    keep_share: float = 0.8
    """share of the remaining probed prompts that is kept, those with the most uniform lengths first"""
    # Remedy 2: oversampling, keep all positives and as many random negatives.
    rebalance: bool = True
    oversample_to: int = 16
    """a prompt that proves hard gets up to so many rollouts: twice as many in each round, until max_accuracy of
    rollouts_per_prompt are right"""
    max_accuracy: float = 0.5
    """prompts above this share of correct rollouts are dropped"""
    # Remedy 3: temperature, linear over the first half of the steps, then fixed.
    anneal: bool = True
    start_temperature: float = 1.0
    end_temperature: float = 0.6
    max_mismatch: float | None = None
    """the run stops when sampler and trainer differ by more than this in mean |log-prob|; none: 1e-3 for a sampler
    in float32, 0.02 in bfloat16, 0.06 in FP8"""
    importance: Literal[
        "auto", "off", "token_truncated", "token_masked", "sequence_truncated", "sequence_masked"
    ] = "auto"
    """weights that correct what is left of the difference, and for older weights; see `mismatch.py`. auto:
    token_truncated if rollout.asynchronous, whose answers are always of older weights, else off"""
    importance_cap: float = 2.0
    importance_low: float = 0.5
    """masked: tokens (or sequences) whose weight is outside [low, cap] are left out"""
    checkpoint_every: int = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """The paper's setting: temperature 0.6, top-p 0.95."""

    samples: int = 8
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 160
    seed: int = 123


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """Who samples."""

    engine: Literal["local", "vllm"] = "local"
    """`local`: the reference model's sampler, embedded in the training ranks"""
    max_batch: int = 256
    """sequences decoded at once by one engine"""
    placement: Literal["colocated", "separate"] = "colocated"
    """vLLM in the training ranks, or in processes of its own"""
    addresses: tuple[str, ...] = ()
    """separate: host:port of running engines; none: rank 0 starts `num_engines` on its machine"""
    num_engines: int = 1
    """separate: engines to start"""
    devices: tuple[str, ...] = ()
    """separate: CUDA_VISIBLE_DEVICES of each engine to start, e.g. 4,5"""
    trainer_host: str = "127.0.0.1"
    """separate: the address of rank 0's machine as the engines see it"""
    transport: Literal["auto", "inproc", "shm", "gloo", "ipc", "nccl"] = "auto"
    """how weights travel; auto: inproc when colocated, else shm or gloo on a CPU, ipc or nccl on GPUs"""
    pause: Literal["keep", "wait", "abort"] = "keep"
    """separate: what a sync does to requests under way: they go on with the new weights, finish first, or are cut
    short and continued"""
    max_model_len: int | None = None
    """longest prompt and answer together, in tokens; none: vLLM gets the longest sequence_length of stages 3 and 4, the
    local engine goes to the model's max_positions"""
    engine_tensor_parallel: int = 1
    """GPUs (or ranks) that share one vLLM engine"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """vLLM's; auto: bfloat16 on a GPU, float32 on a CPU"""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: the trainer rounds the linears' weights to FP8, block by block, before they travel; needs a GPU"""
    memory_share: float = 0.5
    """of a GPU's memory, for one colocated vLLM engine"""
    oversample: float = 1.0
    """separate: stage 4 asks for so many times rollouts_per_prompt and stops a group once it has enough; above 1,
    quick answers are favoured"""
    asynchronous: bool = False
    """separate: stage 4 samples the next step while it trains on this one"""
    partial: bool = False
    """asynchronous: weights are synced while answers are under way, which then go on with the new ones"""
    max_staleness: int = 1
    """stage 4 drops answers with a token that is older than so many updates"""
    bucket_mib: int | None = None
    """weights travel in buckets of this size; none: what the largest tensor needs, at least 64"""
    deadline_s: float = 120.0
    """a weight sync or a silent engine is an error after this long"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Experiment trackers, in addition to metrics.jsonl (extra `log`)."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """trackers that get every step's metrics, e.g. tensorboard,wandb"""
    project: str = "phimini"
    """project name in Weights & Biases and Trackio"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    name: str
    out: str
    """run directory"""
    seed: int = 0
    model: str = "tiny"
    """a preset of `phimini.model.config`"""
    base: str = "random"
    """`random` (a new model and tokenizer) or a Hugging Face directory to start from"""
    chat_template: Literal["instruct", "reasoning"] = "instruct"
    rope_factors: Literal["short", "long"] = "long"
    """which LongRoPE table every stage, the sampler and vLLM use"""
    processes: int = 1
    """ranks to start on this machine when not under torchrun"""
    collective_deadline_s: float = 600.0
    """ranks that wait longer than this for another end the run and name it; above what rank 0 alone may take, e.g. to
    sample one step's answers"""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    context_parallel: int = 1
    context_keys: Literal["auto", "gathered", "ring"] = "auto"
    """how context-parallel ranks meet each other's keys: all at once, or one rank's after the other's while they
    compute; auto: gathered on a CPU, in a ring on GPUs"""
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    """ZeRO-1: optimizer state split over the data-parallel ranks"""
    overlap: bool = False
    """gradients are reduced (and ZeRO-1's parameters gathered) beside the computation"""
    recompute: Literal["none", "full", "selective"] = "none"
    """what is computed again in backward: whole layers, or only the outputs of norms and SwiGLU"""
    background_checkpoints: bool = True
    """a forked process writes each checkpoint while training goes on"""
    fp8: Literal["none", "emulate", "te"] = "none"
    """the linears between the first and the last layer in FP8: by Transformer Engine, or rounded to its values"""
    fp8_recipe: Literal["auto", "tensorwise", "blockwise", "mxfp8"] = "auto"
    """which elements share a scale; auto: what the GPU does best, blockwise when emulated"""
    distill: DistillConfig = field(default_factory=DistillConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    midtrain: MidtrainConfig
    sft: SftConfig
    rollout_dpo: RolloutDpoConfig
    rlvr: RlvrConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.collective_deadline_s <= 1e6:
            raise ValueError(
                f"collective_deadline_s: expected 1 to 1e6 seconds, got {self.collective_deadline_s:g}"
            )
        check_ranges(self)


def override(config: C, assignments: list[str]) -> C:
    """`config` with each `key=value` applied; nested fields are `stage.field=value`.

    Raises ValueError for an unknown key (naming the nearest fields), a value of another type or outside its range.
    """
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"override {assignment!r}: expected key=value")
        config = _set(config, key.split("."), text, key)
    return config


def _set(config: Any, path: list[str], text: str, key: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(config)}
    if path[0] not in fields:
        raise ValueError(
            f"unknown config key {key!r}: {type(config).__name__} has {', '.join(fields)}"
            f"{_meant(path[-1], key)}"
        )
    old = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(old):
            raise ValueError(f"unknown config key {key!r}: {path[0]} is a plain value")
        return dataclasses.replace(config, **{path[0]: _set(old, path[1:], text, key)})
    if dataclasses.is_dataclass(old):
        raise ValueError(f"config key {key!r} is a group; set one of its fields: {key}.field=value")
    expected = typing.get_type_hints(type(config))[path[0]]
    return dataclasses.replace(config, **{path[0]: parse_value(text, expected, key)})


def parse_value(text: str, expected: Any, key: str) -> Any:
    """`text` as a value of type `expected`; ValueError names key, type and text."""
    origin = typing.get_origin(expected)
    if origin is Literal:
        if text not in typing.get_args(expected):
            raise ValueError(
                f"{key}: expected one of {', '.join(typing.get_args(expected))}; got {text!r}"
            )
        return text
    if origin in (typing.Union, types.UnionType):
        inner = [t for t in typing.get_args(expected) if t is not type(None)]
        return None if text == "none" else parse_value(text, inner[0], key)
    if origin is tuple:
        return tuple(
            parse_value(part, typing.get_args(expected)[0], key) for part in text.split(",")
        )
    if expected is bool:
        if text not in ("true", "false", "True", "False", "1", "0"):
            raise ValueError(f"{key}: expected true or false, got {text!r}")
        return text in ("true", "True", "1")
    try:
        return expected(text)
    except ValueError:
        raise ValueError(f"{key}: expected {expected.__name__}, got {text!r}") from None


def _meant(last: str, key: str) -> str:
    """The fields of a run, at any depth, that `key` may stand for."""
    paths = _paths(RunConfig)
    same = [path for path in paths if path.split(".")[-1] == last]
    close = same or difflib.get_close_matches(key, paths, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _paths(config: Any, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(config)
    found = []
    for name, kind in hints.items():
        found += (
            _paths(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
        )
    return found


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)
