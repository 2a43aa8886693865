"""Plan of an evaluation, made before an engine starts: the model, each benchmark's prompts, and the engine's run."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phimini.model.config import ModelConfig
from phimini.model.io.chat import own_template
from phimini.model.io.checked_files import describe_file, read_sealed
from phimini.model.io.huggingface import load_config
from phimini.model.io.json_files import Row
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams
from phimini.stages.benchmarks.journal import Key
from phimini.stages.benchmarks.questions import BENCHMARKS, described, file_of, questions_of
from phimini.stages.config.options import BenchmarkOptions
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.row_fields import encode_problems
from phimini.stages.run.outputs import SUMMARY, check_outputs
from phimini.stages.verify.symbolic import require_math_verify


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is evaluated."""

    name: str
    folder: Path
    """the Hugging Face folder"""
    config: ModelConfig
    tokenizer: Tokenizer
    template: str
    """the text of its chat template"""
    files: dict[str, str]
    """sha256 of the files that decide its answers"""


@dataclass(frozen=True, slots=True)
class Asked:
    """One benchmark's questions as this evaluation asks them."""

    name: str
    problems: list[Row]
    prompts: dict[str, list[int]]
    """token ids by problem id"""
    k: int
    pass_at: list[int]
    data: dict[str, str]
    """sha256 of the files of its questions"""
    made: dict[str, Any]
    """model, prompts and settings: a journal of samples is of exactly these"""

    @property
    def wanted(self) -> list[tuple[Key, Row]]:
        """The place of each sample, with its problem."""
        return [
            (Key(problem["id"], j), problem) for problem in self.problems for j in range(self.k)
        ]


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole evaluation."""

    settings: BenchmarkOptions
    model: Model
    run: RunConfig
    """of the engine"""
    params: SamplingParams
    asked: list[Asked]


def planned(settings: BenchmarkOptions) -> Plan:
    """Read the model's description and the questions.

    Raises ValueError for a model or a benchmark that cannot be read, a model without a chat template, a k that is too small,
    and prompts without room for an answer; ImportError without math-verify.
    """
    if not settings.benchmarks:
        raise ValueError(f"benchmarks: expected one or more of {', '.join(BENCHMARKS)}, got none")
    require_math_verify("the lenient verdict")
    model = opened(settings.model)
    params = SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens,
        stop_ids=model.tokenizer.stop_ids,
    )  # fmt: skip
    asked = [_asked(name, settings, model) for name in dict.fromkeys(settings.benchmarks)]
    longest = max(len(prompt) for each in asked for prompt in each.prompts.values())
    length = longest + settings.max_new_tokens
    if length > model.config.max_positions:
        raise ValueError(
            f"max_new_tokens={settings.max_new_tokens}: with the longest prompt, of {longest} tokens, that is more than the "
            f"model's max_positions {model.config.max_positions}"
        )
    rollout = replace(settings.rollout, max_model_len=settings.rollout.max_model_len or length)
    base = tiny()
    run = replace(
        base, name=model.name, out=settings.out or _results_folder(settings.model), base=str(model.folder),
        seed=settings.seed, processes=settings.processes, rope_factors=model.config.rope_factors,
        evaluate=replace(base.evaluate, temperature=settings.temperature), rollout=rollout,
        audit=settings.audit, collective_deadline_s=86_400.0,  # ranks wait for the longest answer of another
    )  # fmt: skip
    return Plan(settings, model, run, params, asked)


def opened(path: str) -> Model:
    """Return the model of a stage's folder or a Hugging Face folder. Raises ValueError if it cannot be read or is damaged."""
    given = Path(path)
    if not given.is_dir():
        raise ValueError(
            f"{path}: expected a stage's folder of a run or a Hugging Face folder, found none"
        )
    is_stage = (given / SUMMARY).exists()
    folder = given / "model" if is_stage else given
    config, tokenizer = load_config(folder), Tokenizer.load(folder)
    template = own_template(folder, tokenizer)
    if is_stage:
        check_outputs(given)
        known = read_sealed(given / SUMMARY)["files"]
        files = {Path(name).name: each for name, each in known.items() if name.startswith("model/")}
    else:
        globs = ("*.json", "*.jinja", "*.safetensors")
        files = {path.name: describe_file(path) for glob in globs for path in folder.glob(glob)}
    sums = {name: files[name]["sha256"] for name in sorted(files)}
    name = "/".join(given.resolve().parts[-2 if is_stage else -1 :])
    return Model(name, folder, config, tokenizer, template, sums)


def _results_folder(model: str) -> str:
    path = Path(model).resolve()
    is_stage = (path / SUMMARY).exists()
    return str((path.parent if is_stage else Path("runs")) / "benchmarks" / path.name)


def _asked(name: str, settings: BenchmarkOptions, model: Model) -> Asked:
    source = file_of(name, settings.data)
    problems = questions_of(name, source, settings.seed, settings.questions)
    try:
        prompts = encode_problems(model.tokenizer, problems, model.template)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    k = settings.k or BENCHMARKS[name].k
    pass_at = sorted(settings.pass_at) or [2**i for i in range(k.bit_length())]
    if pass_at[-1] > k:
        raise ValueError(f"pass_at={pass_at[-1]}: {name} needs a k of as many samples, got k={k}")
    sampling = ("temperature", "top_p", "max_new_tokens", "seed")
    rollout = {key: asdict(settings.rollout)[key] for key in ("engine", "dtype", "quantization")}
    made = {
        "model": model.files, "num_questions": len(problems), "rollout": rollout,
        "token_ids": hashlib.sha256(repr(list(prompts.items())).encode()).hexdigest(),
        **{key: getattr(settings, key) for key in sampling},
    }  # fmt: skip
    return Asked(name, problems, prompts, k, pass_at, described(source), made)
