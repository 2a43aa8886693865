"""The steps from questions to token ids: settings of a run."""

from dataclasses import dataclass, field
from typing import Literal

from phimini.stages.config.ranges import (
    AboveOne,
    AtLeastTwo,
    Count,
    CountOrZero,
    NotNegative,
    PositiveShare,
    Seconds,
    Seed,
    Share,
)

Layout = Literal[
    "auto", "plain", "cleaned", "openr1_math", "openthoughts", "conversation", "gsm8k", "math", "aqua_rat"
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """A model behind an OpenAI-compatible endpoint, e.g. of `vllm serve`."""

    model: str | None = None
    """its name there; without a name no model is asked. Answers may take longer than `collective_deadline_s`: run the verb on its
    own"""
    url: str = "http://127.0.0.1:8000/v1"
    """address of the endpoint, up to the part before /chat/completions"""
    key_variable: str = "PHIMINI_TEACHER_KEY"
    """the environment variable with the endpoint's key, if it wants one"""
    instruction: str | None = (
        "Please reason step by step, and put your final answer within \\boxed{}."
    )
    """text before each question"""
    temperature: NotNegative = 0.6
    """sampling temperature"""
    top_p: PositiveShare = 0.95
    """nucleus sampling: smallest set of tokens with this probability"""
    max_tokens: Count = 16_384
    """longest answer, in tokens; one that is cut off counts as wrong"""
    per_request: Count = 1
    """answers asked for in one request (`n`); some endpoints take 1 only"""
    concurrency: Count = 64
    """requests under way at once"""
    attempts: Count = 10
    """failures of one question in a row before the run stops; the same command resumes"""
    timeout_s: Seconds = 1800.0
    """a request without an answer after this long counts as failed"""
    prompt_price: NotNegative = 0.0
    """price of a million tokens of prompts, in any currency"""
    answer_price: NotNegative = 0.0
    """price of a million tokens of answers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Questions, the teacher's rollouts of them, and a verdict on each rollout."""

    source: str = "generator"
    """`generator` (our own problems and teacher); a folder of your own with the sets rollouts, validation, prompts and
    heldout; or rollouts whose questions are then divided over these. With `teacher.model` it has questions. A set is a file (.jsonl, .jsonl.gz, .jsonl.zst,
    .parquet, .csv) or a folder of such files"""
    layout: Layout = "auto"
    """published layout of the source's rows; auto: recognised by the fields of each row"""
    fields: tuple[str, ...] = ()
    """fields of any other layout, each OURS:PATH, e.g. question:prompt.0.content,answer:reward_model.ground_truth"""
    licence: str | None = None
    """licence of those rows of the source that do not name their own"""
    workers: CountOrZero = 0
    """processes that verify the source's rollouts; 0: this one"""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """a model that answers the source's questions; without one the source has the rollouts"""
    accept_judged: bool = False
    """count answers as correct that the judge of `phimini clean` found right after the verifier had not"""
    num_problems: Count = 1000
    """training questions that the generated teacher answers"""
    level_weights: tuple[NotNegative, ...] = (1.0, 1.0, 1.0)
    """relative share of each level among the training questions"""
    rollouts_per_problem: Count = 4
    """teacher rollouts of each question, of the generated teacher or of `teacher.model`"""
    quick: Share = 0.5
    """share of its operations that the generated teacher does in one step, without writing them out"""
    slip: Share = 0.2
    """share of those operations (except facts of one digit) that come out wrong"""
    num_prompts: Count = 2000
    """questions without a teacher rollout, kept for stages 3 and 4"""
    min_pass_rate: Share = 0.0
    """questions of a source become prompts if at least this share of their rollouts is correct"""
    max_pass_rate: Share = 1.0
    """and at most this share"""
    gym_tasks: tuple[str, ...] = ()
    """if given, those questions come from these tasks of reasoning-gym, e.g. chain_sum,gcd (extra `prompts`)"""
    num_heldout: AtLeastTwo = 504
    """evaluation questions, which are in no other set, not even reworded"""
    num_validation: Count = 150
    """questions whose teacher rollouts measure the validation loss"""
    heldout_seed: Seed = 777
    """the evaluation set is the same for every seed of the run"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurateConfig:
    """Stage 2's compact, balanced subset of stage 1's rollouts, and the teacher's pairs for stage 3."""

    sft_examples: Count = 1000
    """examples of stage 2, spread evenly over families and levels"""
    level_weights: tuple[NotNegative, ...] = (1.0, 1.0, 1.0)
    """relative share of each level"""
    max_repetition: Share | None = None
    """stages 2 and 3 leave out answers of which a larger share are sequences of 10 words that occurred before in the answer"""
    pairs: Count | None = None
    """number of the teacher's pairs of stage 3, equal over the questions' pass rates; by default all"""
    pairs_per_question: Count | None = None
    """at most so many of them of one question"""
    pair_length_ratio: AboveOne | None = None
    """the longer answer of such a pair is at most so many times as long as the shorter one"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """Token ids of the rows of stages 1 and 2."""

    workers: Count | None = None
    """processes that encode; default: one for each core"""
