"""The config of a run: one frozen dataclass with a range beside every number.

A Python function returns it (`recipes.py`, or a file of the user's) and `key=value` words override it. A value that
the paper does not give (optimizer, schedule shape, DPO beta, group size, ...) is ours; the paper's are listed beside
the recipe. The line under each field is its help on the command line.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from phimini.model.checked_fields import Range, check
from phimini.model.suggest import nearest
from phimini.stages.config.data_steps import CurateConfig, DistillConfig, TokenizeConfig
from phimini.stages.config.dialect import build, read_words
from phimini.stages.config.engines import RolloutConfig
from phimini.stages.config.guards import GuardsConfig, check_actions
from phimini.stages.config.ranges import (
    AboveOne,
    AtLeastTwo,
    BelowOne,
    Count,
    NotNegative,
    Positive,
    PositiveShare,
    Seconds,
    Seed,
    Share,
)

C = TypeVar("C")
CHAT_TEMPLATES = ("instruct", "reasoning")
"""the names in `phimini.model.io.chat.TEMPLATES`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW, on every weight matrix; 1-D weights are not decayed."""

    lr: Positive
    """peak learning rate, reached after the warm-up"""
    min_lr_ratio: Share = 0.0
    """learning rate after the last step, as a share of the peak"""
    warmup_ratio: BelowOne = 0.1
    """share of the steps with linear warm-up, from 0 at the first step"""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """shape after the warm-up"""
    beta1: BelowOne = 0.9
    """decay of the first moment"""
    beta2: BelowOne = 0.95
    """decay of the second moment"""
    eps: NotNegative = 1e-8
    """added to the root of the second moment"""
    weight_decay: NotNegative = 0.1
    """decoupled weight decay"""
    clip: NotNegative = 1.0
    """global gradient norm above which gradients are scaled down"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MidtrainConfig:
    """Stage 1: packed, document-masked, on every verified-correct rollout."""

    optimizer: OptimizerSettings
    """AdamW and its schedule"""
    sequence_length: Count
    """tokens of a packed row"""
    rows_per_step: Count
    """packed rows in the global batch"""
    micro_rows: Count = 1
    """packed rows that one rank computes at once"""
    steps: Count | None = None
    """step budget; training may stop earlier, see `stop`"""
    epochs: Positive | None = None
    """the budget in passes over the packed rows; either this or `steps`"""
    stop: Literal["budget", "saturation"] = "budget"
    """`saturation`: stop when the validation loss has not improved for `patience` validations"""
    patience: Count = 3
    """validations without an improvement before `saturation` stops"""
    validate_every: Count = 100
    """steps between two measurements of the validation loss"""
    loss_on_question: bool = True
    """compute the loss on question tokens too, as a standard causal objective does; false masks them"""
    checkpoint_every: Count = 500
    """steps between two checkpoints"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Stage 2: one example per sequence, loss on the answer and its end."""

    optimizer: OptimizerSettings
    """AdamW and its schedule"""
    sequence_length: Count
    """an example longer than this is an error"""
    examples_per_step: Count
    """examples in the global batch"""
    micro_tokens: Count
    """tokens of the examples that one rank computes at once, without padding; at least sequence_length"""
    epochs: Positive = 1.0
    """passes over the data"""
    validate_every: Count = 50
    """steps between two measurements of the validation loss"""
    checkpoint_every: Count = 500
    """steps between two checkpoints"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutDpoConfig:
    """Stage 3: pairs of a verified-correct and an incorrect rollout of the same question."""

    optimizer: OptimizerSettings
    """AdamW and its schedule"""
    pairs: Literal["policy", "teacher"] = "policy"
    """source of the pairs: new rollouts of the stage-2 model, or the teacher's (as in the paper)"""
    num_prompts: Count = 600
    """questions to sample"""
    rollouts_per_prompt: AtLeastTwo = 8
    """rollouts sampled of each question"""
    temperature: Positive = 0.8
    """sampling temperature"""
    pairs_per_prompt: Count = 2
    """at most so many pairs of one question, the teacher's too; no answer is in two of them"""
    max_new_tokens: Count = 160
    """longest answer, in tokens"""
    sequence_length: Count = 256
    """longest question and answer together, in tokens"""
    beta: Positive = 0.1
    """DPO's beta: strength of the pull towards the reference model"""
    loss: Literal["dpo", "ipo"] = "dpo"
    """log-sigmoid of the margin (DPO), or its squared distance from 1 / (2 beta) (IPO)"""
    length_normalized: bool = False
    """the margin is of mean log-probs per token, not of sums"""
    nll_weight: NotNegative = 0.0
    """weight of the mean log-likelihood per token of the chosen answer; 0 is plain DPO"""
    nll_mean: Literal["pair", "tokens"] = "pair"
    """that mean is over each chosen answer's tokens, or over all chosen tokens of the step"""
    pairs_per_step: Count = 32
    """pairs in the global batch"""
    micro_tokens: Count = 512
    """tokens of the pairs that one rank computes at once, without padding; at least two of sequence_length"""
    epochs: Positive = 1.0
    """passes over the data"""
    checkpoint_every: Count = 500
    """steps between two checkpoints"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RlvrConfig:
    """Stage 4: group-relative policy gradient on +1/-1 rewards, with the paper's three remedies."""

    optimizer: OptimizerSettings
    """AdamW and its schedule"""
    steps: Count
    """optimizer steps"""
    prompts_per_step: Count = 32
    """questions of one step"""
    rollouts_per_prompt: AtLeastTwo = 8
    """rollouts sampled of each question"""
    max_new_tokens: Count = 160
    """longest answer, in tokens"""
    sequence_length: Count = 256
    """longest question and answer together, in tokens"""
    micro_tokens: Count = 256
    """tokens of the rollouts that one rank trains on at once, without padding; at least sequence_length"""
    clip_low: Share = 0.2
    """lower clip of the policy ratio: 1 - clip_low"""
    clip_high: NotNegative = 0.28
    """upper clip of the policy ratio: 1 + clip_high"""
    kl_coef: NotNegative = 0.0
    """weight of the k3 estimate of KL(policy || stage-3 model)"""
    objective: Literal["clip", "cispo", "gspo"] = "clip"
    """clipped policy ratio of each token (PPO, GRPO), clipped factor with a gradient for every token (CISPO), or
    one clipped ratio for each rollout (GSPO: set the clips to about 3e-4 and 4e-4)"""
    dual_clip: AboveOne | None = None
    """upper limit of the ratio of a rollout with a negative advantage; not with cispo"""
    advantage: Literal["normalized", "centered"] = "normalized"
    """reward minus the group's mean, over its standard deviation (GRPO) or not (Dr. GRPO)"""
    normalizer: Literal["token", "sequence", "constant"] = "token"
    """a batch's loss is averaged over its tokens (DAPO), per rollout first (GRPO), or each rollout's sum over
    max_new_tokens, whatever its length (Dr. GRPO)"""
    truncated: Literal["negative", "masked"] = "negative"
    """treatment of a rollout without an end token: counted as wrong, or left out of the loss"""
    min_rollouts: Count = 64
    """an update with fewer usable rollouts is skipped and its rollouts wait for the next; learning rate and temperature
    follow the steps, skipped ones too"""
    uniform_length: bool = True
    """remedy 1: probe prompts and keep those with the most uniform response lengths"""
    probe_prompts: Count = 1200
    """questions probed"""
    probe_rounds: Count = 1
    """rounds of sampling of each probed question"""
    probe_rollouts: Count = 4
    """rollouts of each probed question and round"""
    keep_share: PositiveShare = 0.8
    """share of the remaining probed prompts that is kept, those with the most uniform lengths first"""
    rebalance: bool = True
    """remedy 2: oversample hard prompts, keep all positives and as many random negatives"""
    oversample_to: Count = 16
    """a prompt that proves hard gets up to so many rollouts: twice as many in each round, until max_accuracy of
    rollouts_per_prompt are right"""
    max_accuracy: PositiveShare = 0.5
    """prompts above this share of correct rollouts are dropped"""
    anneal: bool = True
    """remedy 3: temperature linear over the first half of the steps, then fixed"""
    start_temperature: Positive = 1.0
    """temperature of the first step"""
    end_temperature: Positive = 0.6
    """temperature of the second half of the steps"""
    reward: str | None = None
    """a function of yours, FILE.py:FUNCTION, called with question, answer, response and finish reason, that returns
    the reward, above 0 for a right answer (in rollout_dpo.pairs=policy too); none: +1 for an answer that ended and verifies,
    else -1"""
    max_mismatch: Positive | None = None
    """the run stops when sampler and trainer differ by more than this in mean |log-prob|; none: 1e-3 for a sampler
    in float32, 0.02 in bfloat16, 0.06 in FP8, 0.15 with keys and values in FP8"""
    importance: Literal[
        "auto", "off", "token_truncated", "token_masked", "sequence_truncated", "sequence_masked"
    ] = "auto"
    """weights that correct what is left of the difference, and for older weights; see `mismatch.py`. auto:
    token_truncated if rollout.asynchronous, whose answers are always of older weights, else off"""
    importance_cap: Positive = 2.0
    """truncated: largest weight"""
    importance_low: NotNegative = 0.5
    """masked: tokens (or sequences) whose weight is outside [low, cap] are left out"""
    checkpoint_every: Count = 500
    """steps between two checkpoints"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """The paper's setting: temperature 0.6, top-p 0.95."""

    samples: Annotated[int, Range(8, 1000)] = 8
    """answers of each held-out question"""
    temperature: NotNegative = 0.6
    """sampling temperature"""
    top_p: PositiveShare = 0.95
    """nucleus sampling: smallest set of tokens with this probability"""
    max_new_tokens: Count = 160
    """longest answer, in tokens"""
    seed: Seed = 123
    """seed of every random choice"""
    judge: str | None = None
    """a function of yours, as rlvr.reward, whose numbers above 0 mean a right answer; by default the verifier"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Experiment trackers, in addition to metrics.jsonl (extra `log`)."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """trackers that get every step's metrics, e.g. tensorboard,wandb"""
    project: str = "phimini"
    """project name in Weights & Biases and Trackio"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run: model, parallel layout, data, the four stages, evaluation and rollouts."""

    name: str
    """name of the run"""
    out: str
    """run directory"""
    seed: Seed = 0
    """seed of every random choice"""
    model: str = "tiny"
    """shape of the model: tiny, phi-400m, phi-4-mini, or the path of a Hugging Face config.json (phi3 or llama)"""
    base: str = "random"
    """`random` (a new model and tokenizer) or a Hugging Face directory to start from"""
    chat_template: str = "instruct"
    """chat format of questions and answers: instruct, reasoning (Phi-4-mini's), or the path of a .jinja file"""
    rope_factors: Literal["short", "long"] = "long"
    """LongRoPE table of every stage, the sampler and vLLM"""
    processes: Count = 1
    """ranks to start on this machine when not under torchrun"""
    collective_deadline_s: Seconds = 600.0
    """a rank that waits longer than this for another ends the run with an error that names it; must exceed the time of
    work that rank 0 does alone, e.g. sampling one step's answers"""
    tensor_parallel: Count = 1
    """ranks that share each weight matrix"""
    pipeline_parallel: Count = 1
    """groups of consecutive layers on ranks of their own"""
    virtual_pipeline: Count = 1
    """layer groups per pipeline rank, interleaved"""
    context_parallel: Count = 1
    """ranks that share each sequence"""
    context_keys: Literal["auto", "gathered", "ring"] = "auto"
    """exchange of keys and values between context-parallel ranks: all at once, or rank by rank during the
    computation; auto: gathered on a CPU, ring on GPUs"""
    sequence_parallel: bool = False
    """split norms and residuals over the tensor-parallel ranks by token"""
    distributed_optimizer: bool = False
    """ZeRO-1: optimizer state split over the data-parallel ranks"""
    overlap: bool = False
    """reduce gradients (and gather ZeRO-1's parameters) during the computation"""
    recompute: Literal["none", "full", "selective"] = "none"
    """activations to compute again in backward: those of whole layers, or only the outputs of norms and SwiGLU"""
    background_checkpoints: bool = True
    """write each checkpoint in a forked process while training goes on"""
    fp8: Literal["none", "emulate", "te"] = "none"
    """the linears between the first and the last layer in FP8: by Transformer Engine, or rounded to its values"""
    fp8_recipe: Literal["auto", "tensorwise", "blockwise", "mxfp8"] = "auto"
    """elements that share a scale; auto: tensorwise (current scaling), on Blackwell mxfp8; blockwise is the other on Hopper"""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """data: questions and the teacher's rollouts"""
    curate: CurateConfig = field(default_factory=CurateConfig)
    """data: the subset for stage 2"""
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    """data: the rows as token ids"""
    midtrain: MidtrainConfig
    """stage 1"""
    sft: SftConfig
    """stage 2"""
    rollout_dpo: RolloutDpoConfig
    """stage 3"""
    rlvr: RlvrConfig
    """stage 4"""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """evaluation after each stage"""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """the sampling engine"""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """alarms of training, each with a threshold and an action; may be changed when a run goes on"""
    audit: Share = 0.1
    """share of the verdicts on sampled answers that a second check repeats: other reading, other parser, sympy"""
    log: LogConfig = field(default_factory=LogConfig)
    """experiment trackers"""

    def __post_init__(self) -> None:
        check(self)
        check_together(self)


def check_together(run: RunConfig) -> None:
    """Raise ValueError for the first field whose value another field's does not allow."""
    if run.chat_template not in CHAT_TEMPLATES and not run.chat_template.endswith(".jinja"):
        raise ValueError(
            f"chat_template: {nearest(run.chat_template, CHAT_TEMPLATES)} or a .jinja file, got {run.chat_template!r:.60}"
        )
    check_actions(run.guards)
    longest = {"sft": 1, "rollout_dpo": 2, "rlvr": 1}  # in sequence lengths
    for name, number in longest.items():
        stage = getattr(run, name)
        if stage.micro_tokens < number * stage.sequence_length:
            raise ValueError(
                f"{name}.micro_tokens: expected at least {number * stage.sequence_length}, because {name}.sequence_length is "
                f"{stage.sequence_length}, got {stage.micro_tokens}"
            )
    if run.rlvr.dual_clip is not None and run.rlvr.objective == "cispo":
        raise ValueError(
            f"rlvr.dual_clip: expected none with rlvr.objective=cispo, which has no ratio to limit, got {run.rlvr.dual_clip}"
        )
    teacher = run.distill.teacher.model
    if teacher is not None and run.distill.source == "generator":
        raise ValueError(
            f"distill.teacher.model={teacher}: expected distill.source to have its questions, got generator"
        )


def override(config: C, assignments: list[str]) -> C:
    """Return `config` with each `key=value` applied; a nested field is `stage.field=value`.

    Raises ValueError for an unknown field (with the nearest ones), another type or a number out of its range.
    """
    return build(type(config), read_words(assignments, type(config), "override"), default=config)


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)
