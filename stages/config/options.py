"""The settings of each verb besides those of its run, and how a recipe's name and the words after it become both."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

import tyro

from phimini.stages.config.dialect import Words, build
from phimini.stages.config.engines import RolloutConfig
from phimini.stages.config.ranges import Count, NotNegative, Positive, PositiveShare, Seed, Share
from phimini.stages.config.recipes import recipe_config
from phimini.stages.config.schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """RECIPE and any field of its config."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """the config of the run"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions(RunOptions):
    """RECIPE, any field of its config, and `--redo`."""

    redo: bool = False
    """run again what is complete"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOptions(StageOptions):
    """RECIPE, any field of its config, `--redo`, or `--dry-run [gpu=NAME] [gpus=N]`."""

    dry_run: bool = False
    """check paths, tokenizer and memory, and print steps, tokens and GPU hours, instead of running"""
    gpu: str | None = None
    """plan the memory for this GPU (a100, h100, h200, b200); none: the one at hand, in a dry run h100"""
    gpus: Count | None = None
    """number of GPUs of a dry run; none: 8"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(StageOptions):
    """RECIPE, stage=NAME, and any field of its config."""

    stage: Literal["base", "midtrain", "sft", "rollout_dpo", "rlvr"] | None = None
    """the stage whose model is evaluated; required"""


BenchmarkName = Literal[
    "aime24", "aime25", "math500", "gpqa_diamond", "gsm8k", "olympiadbench", "aqua_rat"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkOptions:
    """MODEL, benchmarks=NAMES and data=FOLDER; the defaults of sampling are the paper's."""

    model: str = ""
    """a stage's folder of a run, e.g. runs/tiny/sft, or a Hugging Face folder; the word MODEL"""
    benchmarks: tuple[BenchmarkName, ...] = ()
    """benchmarks to run, in this order"""
    data: str = ""
    """folder with a file NAME or NAME_test (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .csv) or a folder NAME for each"""
    out: str | None = None
    """folder of the results; by default benchmarks/STAGE in a stage's run, else runs/benchmarks/MODEL's name"""
    k: Count | None = None
    """samples of each question; by default 64 for AIME, 8 for the others"""
    pass_at: tuple[Count, ...] = ()
    """points of the curve of pass@k, at most k; by default the powers of 2 up to k"""
    questions: Count | None = None
    """number of questions of each benchmark, the first ones; by default all"""
    temperature: NotNegative = 0.6
    """sampling temperature"""
    top_p: PositiveShare = 0.95
    """nucleus sampling: smallest set of tokens with this probability"""
    max_new_tokens: Count = 32_768
    """longest answer, in tokens"""
    seed: Seed = 0
    """seed of every sample, and of the order of GPQA's choices"""
    processes: Count = 1
    """ranks to start on this machine when not under torchrun"""
    audit: Share = 0.1
    """share of the verdicts that a second check repeats: other reading, other parser, sympy"""
    redo: bool = False
    """sample again what is finished"""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """the sampling engine; its max_model_len is by default the longest prompt and max_new_tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """A and B: folders of two runs, or of results that `evaluate MODEL` wrote."""

    before: str = ""
    """the word A"""
    after: str = ""
    """the word B"""
    shown: Count = 20
    """changed problems that are listed for each benchmark, those that changed most first"""
    page: str = "compare.html"
    """file of the page about two runs"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """MODEL and repo=OWNER/NAME; the Hub's token is read from the environment variable HF_TOKEN and from no other place."""

    model: str = ""
    """a stage's folder of a run, e.g. runs/tiny/rlvr; the word MODEL"""
    repo: str | None = None
    """OWNER/NAME of the repository on the Hugging Face Hub (HF_ENDPOINT names another hub); made if it is not there"""
    public: bool = False
    """make a repository that everyone sees; by default only its owner does. One that is there stays as it is"""
    dry_run: bool = False
    """write the card and list the files with their sizes, without a connection"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(RunOptions):
    """RECIPE, address=HOST:PORT, and any field of its config."""

    address: str = "127.0.0.1:8765"
    """HOST:PORT to listen at; 0.0.0.0:8765 lets other nodes connect"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(RunOptions):
    """RECIPE, the GPUs, and any field of its config."""

    stage: Literal["midtrain", "sft", "rollout_dpo", "rlvr"] | None = None
    """plan one stage only"""
    gpu: str = "h100"
    """a100, h100, h200 or b200"""
    gpus: Count = 8
    """number of GPUs"""
    json: str | None = None
    """file to write the plan to as JSON"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions(RunOptions):
    """RECIPE, `--parity`, and any field of its config. `doctor --dist` and `doctor --mismatch` are pages of their own."""

    parity: bool = False
    """compare transformers, our reference, Megatron and vLLM on the base model, below, at and above the rope boundary"""
    json: str | None = None
    """file to write the page to as JSON; - prints it instead of the page"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistOptions:
    """The layout whose groups are measured, without one all ranks together, and the run's folder."""

    tensor: Count | None = None
    """ranks that share each weight matrix"""
    pipeline: Count | None = None
    """pipeline stages"""
    context: Count | None = None
    """ranks that share each sequence"""
    out: str | None = None
    """folder of the run: is it one file system for all ranks?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDayOptions:
    """The time, the folder, and whether to rehearse on a CPU."""

    minutes: Positive = 8.0
    """all parts end within these, each with a share of what is left"""
    rehearse: bool = False
    """run the parts' forms for a CPU at small shapes; without CUDA that is always so"""
    out: str = "runs/gpu-day"
    """folder of rows.jsonl and log.txt"""


R = TypeVar("R", bound=RunOptions)


def recipe_of(words: Words) -> RunConfig:
    """Return the config of the recipe that the words name; a page of help takes `tiny` by default."""
    if not words.names and not words.help:
        raise ValueError(f"{words.command}: name a recipe, e.g. `phimini {words.command} tiny`")
    return recipe_config(words.names[0] if words.names else "tiny")


def of_recipe(kind: type[R], words: Words) -> R:
    """Return the settings of a verb that starts from a recipe."""
    default = kind(run=recipe_of(words))
    return build(kind, dataclasses.replace(words, command=f"{words.command} RECIPE"), default)
