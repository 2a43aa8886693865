"""The settings of `phimini clean`, which verifies, annotates and cleans a corpus of rollouts before a run."""

from dataclasses import dataclass, field
from typing import Literal

from phimini.stages.config.data_steps import Layout, TeacherConfig
from phimini.stages.config.ranges import Count, Positive, Share

DOMAINS = (
    "arithmetic", "algebra", "geometry", "number theory", "combinatorics", "probability and statistics", "calculus",
    "linear algebra", "logic", "other",
)  # fmt: skip
LEVELS = ("elementary school", "middle school", "high school", "college", "beyond college")
"""levels 0 to 4"""
JUDGE = (
    "Below are a mathematical question, its reference answer and the end of a student's response. Decide whether the final "
    "answer of the response is mathematically the same as the reference answer; how it is written does not matter. Do not "
    "solve the question yourself. Reply with one JSON object and nothing else: "
    '{"verdict": "right" or "wrong", "reason": one short sentence}'
)
"""before the question, the reference answer and the end of a response that the verifier marks wrong"""
LABEL = (
    "Below is a mathematical question. Name its domain and the level of school that it belongs to. Reply with one JSON "
    f'object and nothing else: {{"domain": one of {", ".join(DOMAINS)}, "level": a number, '
    f"{', '.join(f'{number} {name}' for number, name in enumerate(LEVELS))}}}"
)
"""before each question"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """MinHash over the words of question and response. Rows of which J of the sequences are the same meet with probability
    1 - (1 - J^hashes)^buckets: 0.92 for J = 0.8, 0.06 for J = 0.5."""

    remove: bool = True
    """keep one of each group of correct rows that are nearly the same"""
    words: Count = 5
    """words of a sequence"""
    buckets: Count = 14
    """rows that agree in all hashes of one bucket are near-duplicates"""
    hashes: Count = 8
    """hashes of a bucket"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJobs:
    """Settings of the job arrays."""

    partition: str | None = None
    """Slurm's partition; required"""
    account: str | None = None
    """Slurm's account"""
    time: str = "04:00:00"
    """time limit of a task"""
    memory_gb: Count = 4
    """memory of a task"""
    venv: str | None = None
    """virtual environment to activate; default: that of the submission"""
    array: Count = 1001
    """tasks of an array, at most; the cluster's MaxArraySize"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanOptions:
    """SOURCE and OUT: rollouts in any layout that `distill` reads, and the folder of their clean rows, for distill.source=OUT/rows."""

    source: str = ""
    """a file of rollouts or a folder of such files; the word SOURCE"""
    out: str = ""
    """a folder for rows/, dropped/ and report.json; the word OUT"""
    layout: Layout = "auto"
    """published layout of the rows, as `distill.layout`"""
    fields: tuple[str, ...] = ()
    """fields of any other layout, as `distill.fields`"""
    licence: str | None = None
    """licence of those rows that do not name their own"""
    heldout: tuple[str, ...] = ()
    """files or folders of evaluation questions, benchmarks included; rows that ask one of them are dropped"""
    heldout_words: Count | None = 13
    """also drop rows whose question has so many consecutive words of one of them; default: keep them"""
    heldout_masked: bool = False
    """also drop rows whose question is one of them with other numbers; too strict for questions made from templates"""
    max_repetition: Share | None = None
    """drop responses of which a larger share are sequences of 10 words that occurred before in the response"""
    near: NearDuplicates = field(default_factory=NearDuplicates)
    """near-duplicates"""
    judge: TeacherConfig = field(
        default_factory=lambda: TeacherConfig(instruction=JUDGE, temperature=0.0, top_p=1.0, max_tokens=2048)
    )  # fmt: skip
    """a model that looks again at whole responses marked wrong; the concurrency is that of each task"""
    label: TeacherConfig = field(
        default_factory=lambda: TeacherConfig(instruction=LABEL, temperature=0.0, top_p=1.0, max_tokens=2048)
    )  # fmt: skip
    """a model that names domain and level of each question"""
    shard_mb: Positive = 64.0
    """a larger file of JSON Lines is divided into shards of this size; any other file is one shard"""
    executor: Literal["local", "slurm"] = "local"
    """where the tasks run, one for each shard and step: here, or as job arrays"""
    workers: Count = 1
    """tasks that run at once; of Slurm's, in each array"""
    slurm: SlurmJobs = field(default_factory=SlurmJobs)
    """settings of the job arrays"""
    redo: bool = False
    """clean again what is complete, or was begun with other settings"""
