"""Before the first GPU second: does everything that a run reads exist and fit together, and what will the run cost?

`phimini recipe NAME --dry-run [gpu=h100] [gpus=8] [key=value ...]` checks base model, tokenizer, data and run
directory, then plans every stage on the run's layout. It starts no rank and writes nothing. `phimini recipe NAME`
makes the same checks, in every rank of torchrun's before it joins the job; memory is planned for the GPU that it runs
on (or `gpu=` names).
"""

import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from phimini.model.config import ModelConfig
from phimini.model.io.chat import check_template, template_of
from phimini.model.io.huggingface import check_tensors, config_of, read_tensors
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.suggest import nearest
from phimini.model.user_file import function_of
from phimini.parallel.plan.choice import choices
from phimini.parallel.plan.engine import (
    EngineMemory,
    decode_bytes_per_token,
    engine_memory,
    kv_bytes_per_token,
)
from phimini.parallel.plan.layouts import Plan, plan_stage
from phimini.parallel.plan.rates import GIB, GPUS, Gpu, table
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.stages.base import base_config
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.check_rows import check_files, problems_of
from phimini.stages.midtrain import step_budget
from phimini.stages.rl.groups import check_room
from phimini.stages.rollout.launch import check_addresses
from phimini.stages.run.trackers import missing_packages
from phimini.stages.run.training import layout_of
from phimini.stages.run.workloads import engine_of, workloads

# The model card of Phi-4-mini-reasoning: 128 H100, 2 days, 150 B tokens (30 B tokens, 5 epochs).
CARD_TOKENS, CARD_GPU_HOURS, CARD_EPOCH_TOKENS = 150e9, 128 * 48.0, 30e9
ASSUMED_PAIRS = 300_000
"""of a teacher's rollouts, before there are any: the preference samples of the March report (arXiv 2503.01743)"""
CHECKPOINT_BYTES = 12
"""per parameter: fp32 master, two moments"""


@dataclass(frozen=True, slots=True)
class StageCost:
    """The steps, tokens and samples of a stage, and its plan; lengths are the configured limits."""

    stage: str
    steps: int
    tokens: float
    plan: Plan
    counted: str
    """where the number of steps comes from"""
    bytes_per_sampled_token: float
    """read from the GPU's memory"""

    @property
    def samples(self) -> int:
        """Answers that are sampled in the whole stage."""
        workload = self.plan.workload
        return workload.samples_before + self.steps * workload.samples_per_step

    @property
    def sampled_tokens(self) -> int:
        """Tokens of the sampled answers and their questions, at most."""
        return self.samples * self.plan.workload.sequence_length

    @property
    def sampling_hours(self) -> float:
        """GPU hours of sampling, at the full speed of the memory that decoding reads."""
        seconds = self.sampled_tokens * self.bytes_per_sampled_token / self.plan.gpu.bandwidth
        return seconds / 3600

    @property
    def gpu_hours(self) -> float:
        """Predicted GPU hours of the stage: training and sampling."""
        step = self.plan.layouts[0].time.total
        return self.steps * step * self.plan.world_size / 3600 + self.sampling_hours


def dry_run(run: RunConfig, gpu: str = "h100", gpus: int = 8) -> int:
    """Print the problems and the plan of a run. Return 0 if it can start, 1 if not.

    gpu: a name of `plan.memory.GPUS`. Raises as `examine`.
    """
    problems, costs = examine(run, gpus, gpu, print)
    print(
        f"{run.name}: {run.model}, {config_of(run.model).num_parameters:,} parameters, on {gpus} x {gpu}"
    )
    if costs:
        print(cost_table(costs, gpus))
        print(first_choice(run, GPUS[gpu], gpus))
    for problem in problems:
        print(f"NOT READY: {problem}")
    if not problems:
        print("ready: every path, the tokenizer and every stage's memory were checked")
    return 1 if problems else 0


def is_ready(run: RunConfig, gpu: str | None, gpus: int) -> bool:
    """Return False for a run that `dry_run` refuses, and print the same words on stderr."""
    problems, _ = examine(run, gpus, gpu or gpu_at_hand())
    for problem in problems:
        print(f"NOT READY: {problem}", file=sys.stderr)
    return not problems


def examine(
    run: RunConfig, gpus: int, gpu: str | None, told: Callable[[str], None] = lambda line: None
) -> tuple[list[str], list[StageCost]]:
    """Return the problems that prevent the run from starting and, for a `gpu`, the costs of its stages.

    told: gets lines on the amount of data.
    Raises ValueError for an unknown GPU or preset, an impossible layout, or a stage without a budget.
    """
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"dry run: gpu={gpu}: {nearest(gpu, GPUS)}")
    if gpus < 1:
        raise ValueError(f"dry run: gpus={gpus}: expected at least 1")
    config = config_of(run.model)
    problems = missing_packages(run) + check_inputs(run, config, told) + check_lengths(run)
    problems += problems_of(lambda: check_addresses(run))
    layout = planned_layout(run).resolve(gpus, config)
    for stage in workloads(run):
        number_of_steps(run, stage)
    costs = []
    if gpu is not None:
        costs = stage_costs(run, config, layout, GPUS[gpu], gpus)
    for cost in costs:
        if not cost.plan.fits:
            problems.append(f"{cost.stage} does not fit: {cost.plan.because}")
    if gpu is not None:
        problems += check_max_batch(run, config, GPUS[gpu], costs[-1].plan)
    return problems, costs


def gpu_at_hand() -> str | None:
    """Return the plan's name of this machine's GPU, or None without a GPU or, with a line on stderr, for an unknown one."""
    if not torch.cuda.is_available():
        return None
    ask = torch.cuda.get_device_name
    # In a process of its own: where CUDA has started, no ranks can be forked any more.
    name = ask() if torch.cuda.is_initialized() else run_ranks(ask, 1)[0]
    for gpu in GPUS:
        if gpu in name.lower():
            return gpu
    print(
        f"memory was not planned: expected one of {', '.join(GPUS)}, this is a {name}",
        file=sys.stderr,
    )
    return None


# --- inputs --------------------------------------------------------------------------------------
def check_inputs(
    run: RunConfig, config: ModelConfig, told: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Return every missing or wrong thing, each with its file or field."""
    found: list[str] = []
    tokenizer = None
    if run.base != "random":
        base = Path(run.base)
        if not base.is_dir():
            found.append(f"base={run.base}: expected a Hugging Face folder, found none")
        else:
            found += problems_of(lambda: _check_base(run, base, config))
            try:
                tokenizer = Tokenizer.load(base)
            except (ValueError, OSError) as error:
                found.append(str(error))
            else:
                if tokenizer.vocab_size > config.vocab_size:
                    found.append(
                        f"{base}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
                        f"{config.vocab_size}"
                    )
    try:
        tokenizer = _with_template(run, tokenizer)
    except ValueError as error:
        found.append(str(error))
        tokenizer = None
    for field, name in (("rlvr.reward", run.rlvr.reward), ("evaluate.judge", run.evaluate.judge)):
        if name is not None:
            found += problems_of(partial(_check_function, name, field))
    if run.distill.source != "generator":
        check_prompts = lambda prompts: check_room(prompts, run.rlvr, "rlvr")
        found += check_files(run, Path(run.distill.source), tokenizer, check_prompts, told)
    return found + _check_out(run, config)


def _with_template(run: RunConfig, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """Return the base model's tokenizer with the run's chat template, or None if it is yet to be trained.

    Raises ValueError that names the template's file if it does not fit the tokenizer.
    """
    template = template_of(run.chat_template)
    if tokenizer is None and run.base != "random":  # it cannot be read
        return None
    check_template(run.chat_template, tokenizer)
    return tokenizer and Tokenizer(tokenizer.inner, tokenizer.config | {"chat_template": template})


def _check_function(name: str, field: str) -> None:
    function_of(name, field)


def _check_base(run: RunConfig, base: Path, want: ModelConfig) -> None:
    """Raise ValueError unless the base model fits `model`; only headers are read."""
    config = base_config(run)
    for name in ("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size"):  # fmt: skip
        if getattr(config, name) != getattr(want, name):
            raise ValueError(
                f"{base / 'config.json'}: {name} is {getattr(config, name)}, but model={run.model} has {getattr(want, name)}"
            )
    check_tensors(config, read_tensors(base))


def _check_out(run: RunConfig, config: ModelConfig) -> list[str]:
    """Return problems with the run's folder: it must be writable and have room for two checkpoints."""
    folder = Path(run.out).absolute()
    while not folder.exists():
        folder = folder.parent
    found = []
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        found.append(f"out={run.out}: {folder} is not a folder that can be written")
    need, free = 2 * CHECKPOINT_BYTES * config.num_parameters, shutil.disk_usage(folder).free
    if free < need:
        found.append(
            f"out={run.out}: two checkpoints need {need / GIB:,.3g} GiB, {folder} has {free / GIB:,.3g} GiB free"
        )
    return found


def check_lengths(run: RunConfig) -> list[str]:
    """Return problems with lengths: an answer must leave room for its question in rows of `sequence_length`."""
    samplers = {"rlvr": run.rlvr}
    if run.rollout_dpo.pairs == "policy":
        samplers |= {"rollout_dpo": run.rollout_dpo}
    return [
        f"{stage}.max_new_tokens: {config.max_new_tokens} leave no room for a question in "
        f"{stage}.sequence_length={config.sequence_length}"
        for stage, config in samplers.items()
        if config.max_new_tokens >= config.sequence_length
    ]


def planned_layout(run: RunConfig) -> Layout:
    """Return the run's layout for the plan, without the padding that FP8 needs on the GPU at hand."""
    return layout_of(dataclasses.replace(run, fp8="none"))


# --- costs ---------------------------------------------------------------------------------------
def stage_costs(
    run: RunConfig, config: ModelConfig, layout: Layout, gpu: Gpu, gpus: int
) -> list[StageCost]:
    """Return the cost of each training stage on `gpus` GPUs."""
    costs = []
    for stage, workload in workloads(run).items():
        plan = plan_stage(
            config, workload, gpu, gpus, layouts=[layout], recomputes=(run.recompute,)
        )
        steps, counted = number_of_steps(run, stage)
        engine = engine_of(run)
        sequences = engine.max_batch or engine_beside(run, config, gpu, plan).sequences
        read = decode_bytes_per_token(config, engine, sequences, workload.sequence_length)
        costs.append(StageCost(stage, steps, steps * plan.tokens_per_step, plan, counted, read))
    return costs


def engine_beside(run: RunConfig, config: ModelConfig, gpu: Gpu, rlvr: Plan) -> EngineMemory:
    """Return the memory of the run's engine, on the trainer's GPUs or on its own."""
    planned = rlvr.layouts[0].engine
    return planned or engine_memory(config, engine_of(run), gpu.memory_bytes, 0)


def check_max_batch(run: RunConfig, config: ModelConfig, gpu: Gpu, rlvr: Plan) -> list[str]:
    """Return a problem if vLLM may decode less than half of the sequences that its memory holds."""
    asked = run.rollout.max_batch
    if asked is None or run.rollout.engine != "vllm" or not rlvr.fits:
        return []
    memory = engine_beside(run, config, gpu, rlvr)
    if 2 * asked >= memory.sequences:
        return []
    engine = engine_of(run)
    return [
        f"rollout.max_batch: expected at least {-(-memory.sequences // 2)}, half of the {memory.sequences} sequences that a "
        f"{gpu.name} holds beside what else is in it ({memory.kv / GIB:.1f} GiB of keys and values, "
        f"{kv_bytes_per_token(config, engine):,} bytes a token, {engine.longest:,} tokens at most and a quarter of that on "
        f"average), got {asked}; none takes all {memory.sequences}"
    ]


def first_choice(run: RunConfig, gpu: Gpu, gpus: int) -> str:
    """Return a line with the layout that the plan would choose for the whole run, beside the run's own."""
    stages = workloads(run)
    steps = {stage: number_of_steps(run, stage)[0] for stage in stages}
    found = choices(config_of(run.model), stages, steps, gpu, gpus)
    return f"first choice of the plan: {found[0]}" if found else "no layout fits every stage"


def number_of_steps(run: RunConfig, stage: str) -> tuple[int, str]:
    """Return (steps, origin of the number) as far as the config decides; stage 1's epochs assume the model card's tokens."""
    if stage == "midtrain":
        rows = math.ceil(CARD_EPOCH_TOKENS / run.midtrain.sequence_length)
        counted = "midtrain.steps"
        if run.midtrain.epochs is not None:
            counted = f"midtrain.epochs={run.midtrain.epochs:g} over the model card's 30 B tokens"
        return step_budget(run.midtrain, rows), counted
    if stage == "sft":
        steps = math.ceil(run.sft.epochs * run.curate.sft_examples / run.sft.examples_per_step)
        return steps, f"sft.epochs={run.sft.epochs:g} over curate.sft_examples"
    if stage == "rollout_dpo":
        dpo = run.rollout_dpo
        pairs, counted = dpo.num_prompts * dpo.pairs_per_prompt, "num_prompts x pairs_per_prompt"
        if dpo.pairs == "teacher":
            pairs, counted = ASSUMED_PAIRS, f"assuming {ASSUMED_PAIRS:,} pairs from the teacher"
        return max(1, math.floor(dpo.epochs * pairs / dpo.pairs_per_step)), counted
    return run.rlvr.steps, "rlvr.steps, rollouts_per_prompt answers of each prompt"


def cost_table(costs: list[StageCost], gpus: int) -> str:
    """Return the text about all stages' costs, and the model card's figure beside them."""
    hours = sum(cost.gpu_hours for cost in costs)
    total = (
        f"all four stages: {hours:,.0f} GPU hours predicted, {hours / gpus / 24:.1f} days on {gpus} GPUs, "
        f"with sampling of at most {sum(cost.sampled_tokens for cost in costs) / 1e9:,.2f} B tokens"
    )
    rates = ", ".join(f"{n} {r:.3g}" for n, r in table(costs[0].plan.gpu).items())
    return "\n".join(
        [*map(describe, costs), total, f"predicted with rates, not measured: {rates}", card(costs)]
    )


def describe(cost: StageCost) -> str:
    """Return three lines of text about one stage's cost."""
    planned, workload = cost.plan.layouts[0], cost.plan.workload
    parts = ", ".join(f"{n} {b / GIB:.1f}" for n, b in planned.memory_bytes.items() if b)
    sampled = (
        f"\n  samples at most {cost.samples:,} answers, {cost.sampled_tokens / 1e9:,.2f} B tokens: "
        f"{workload.samples_before:,} before the first step, {workload.samples_per_step:,} in each;\n"
        f"  {cost.sampling_hours:,.0f} of the hours, with the memory's {cost.plan.gpu.bandwidth / 1e12:.2f} TB/s in full use"
    )
    # Of an oversampled group all right answers are trained on, be they many or few.
    limit = "about" if workload.samples_per_step > workload.rows_per_step else "at most"
    return (
        f"{cost.stage}: {cost.steps:,} steps ({cost.counted}), {limit} {cost.tokens / 1e9:,.2f} B tokens\n"
        f"  {cost.gpu_hours:,.0f} GPU hours predicted, {planned.time.total:.2f} s a step, MFU {cost.plan.mfu(planned):.0%}; {planned.peak_bytes / GIB:.1f} of "
        f"{cost.plan.gpu.memory_bytes / GIB:.1f} GiB: {parts}{sampled if cost.samples else ''}"
    )


def card(costs: Iterable[StageCost]) -> str:
    """Return a line with the model card's GPU hours, as the MFU that they imply."""
    first = next(iter(costs))
    flops = CARD_TOKENS * first.plan.flops_per_token
    mfu = flops / (CARD_GPU_HOURS * 3600 * first.plan.gpu.peak_flops)
    return (
        f"model card of Phi-4-mini-reasoning: {CARD_TOKENS / 1e9:.0f} B tokens in {CARD_GPU_HOURS:,.0f} H100 hours (128 "
        f"GPUs, 2 days); at stage 1's {first.plan.flops_per_token / 1e9:.1f} GFLOP per token that is {mfu:.0%} of a {first.plan.gpu.name}'s peak"
    )
