"""The GPU side of `phimini bench peers --provider ...`: Megatron-Bridge's settings, verl and NeMo-RL beside our stages

Nothing here has run on a GPU. What was checked without one: every setting exists in their own configuration files
(tests/bench/peers/peers_recorded.json says which commits), their log lines are parsed as they print them, and the head that the
Bridge arm puts in the place of ours gives our loss and gradients.

    megatron_bridge   our own trainer with what Bridge's closest recipe sets (`bench/peers/megatron_bridge.py`): same data, order
                      and layers, so that what differs is ours. SFT
    verl              `verl.trainer.sft_trainer` (FSDP), `verl.trainer.main_ppo` (GRPO, vLLM). From its own environment
    nemo_rl           `examples/run_sft.py`, `examples/run_grpo.py` of the checkout that `nemo_rl` is imported from

A turn is a process of its own, because two trainers of 3.8 billion parameters do not fit one GPU; turns alternate, each
first step is left out as a warm-up, and a rate is per second and GPU. verl and NeMo-RL shuffle with their own seeds:
their first loss is shown and not held to ours. Bridge's is (SAME_LOSS: bf16).
"""

import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from phimini.bench.gate.environment import environment
from phimini.bench.gate.rows import read
from phimini.model.io.json_files import read_rows, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.config.schema import RunConfig
from phimini.stages.run.training import read_examples

Row = dict[str, Any]
Lines = Iterable[tuple[float, str]]
"""what a process prints, each line with the second at which it came"""
UNITS = {"sft": "tokens", "grpo": "samples"}
SAME_LOSS = 2e-2
TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class Job:
    """What one turn of one side is to do, on `gpus` GPUs of this machine."""

    task: str
    run: RunConfig
    folder: Path
    """of rows: sft.jsonl, grpo.jsonl, and the parquet files that verl reads"""
    model: Path
    """Hugging Face folder to start from"""
    steps: int
    gpus: int
    tokens_per_step: float
    """trained tokens, of SFT: NeMo-RL does not print them"""


@dataclass(frozen=True, slots=True)
class Result:
    """Of one turn."""

    step_s: list[float]
    """wall seconds, without the first step"""
    units: float
    """per step, over all GPUs"""
    first_loss: float
    peak_bytes: int | None = None

    def rate(self, gpus: int) -> float:
        return self.units / statistics.median(self.step_s) / gpus


@dataclass(frozen=True, slots=True)
class Provider:
    tasks: tuple[str, ...]
    modules: tuple[str, ...]
    """importable where it runs"""
    command: Callable[[Job, str], list[str]]
    """of a turn, with the provider's interpreter"""
    parse: Callable[[Job, Lines], Result]
    versions: tuple[str, ...] = field(default=())
    """distributions"""


# --- verl ----------------------------------------------------------------------------------------
def verl_settings(job: Job) -> dict[str, Any]:
    """Keys of verl/trainer/config/sft_trainer_engine.yaml, or of ppo_trainer.yaml."""
    sizes = {"trainer.nnodes": 1, "trainer.n_gpus_per_node": job.gpus, "trainer.total_training_steps": job.steps,
             "trainer.logger": '["console"]', "trainer.save_freq": -1, "trainer.test_freq": -1,
             "trainer.resume_mode": "disable", "trainer.default_local_dir": job.folder / "verl"}  # fmt: skip
    if job.task == "sft":
        stage = job.run.sft
        o = stage.optimizer
        return sizes | {
            "data.train_files": job.folder / "sft.parquet", "data.messages_key": "messages",
            "data.train_batch_size": stage.examples_per_step, "data.micro_batch_size_per_gpu": 1,
            "data.use_dynamic_bsz": True, "data.pad_mode": "no_padding", "data.truncation": "error",
            "data.max_length": stage.sequence_length, "data.max_token_len_per_gpu": stage.sequence_length,
            "model.path": job.model, "model.use_remove_padding": True,
            "model.enable_gradient_checkpointing": job.run.recompute != "none",
            "optim.lr": o.lr, "optim.weight_decay": o.weight_decay, "optim.betas": f"[{o.beta1},{o.beta2}]",
            "optim.clip_grad": o.clip,
        }  # fmt: skip
    stage, actor, rollout = job.run.rlvr, "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return sizes | {
        "algorithm.adv_estimator": "grpo", "algorithm.use_kl_in_reward": False,
        "data.train_files": job.folder / "grpo.parquet", "data.val_files": job.folder / "grpo.parquet",
        "data.train_batch_size": stage.prompts_per_step, "data.max_prompt_length": 1024, "data.truncation": "error",
        "data.max_response_length": stage.max_new_tokens,
        "actor_rollout_ref.model.path": job.model, "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.model.enable_gradient_checkpointing": job.run.recompute != "none",
        f"{actor}.optim.lr": stage.optimizer.lr, f"{actor}.optim.weight_decay": stage.optimizer.weight_decay,
        f"{actor}.ppo_mini_batch_size": stage.prompts_per_step, f"{actor}.ppo_micro_batch_size_per_gpu": 1,
        f"{actor}.use_dynamic_bsz": True, f"{actor}.use_kl_loss": bool(stage.kl_coef),
        f"{actor}.kl_loss_coef": stage.kl_coef, f"{actor}.clip_ratio_low": stage.clip_low,
        f"{actor}.clip_ratio_high": stage.clip_high, f"{actor}.loss_agg_mode": "token-mean",
        f"{rollout}.name": "vllm", f"{rollout}.n": stage.rollouts_per_prompt,
        f"{rollout}.temperature": stage.start_temperature, f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.gpu_memory_utilization": 0.5, f"{rollout}.log_prob_micro_batch_size_per_gpu": 1,
        "trainer.critic_warmup": 0, "trainer.val_before_train": False,
    }  # fmt: skip


def verl_command(job: Job, python: str) -> list[str]:
    words = [f"{key}={value}" for key, value in verl_settings(job).items()]
    if job.task == "sft":
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.gpus}"]
        return [python, *launch, "-m", "verl.trainer.sft_trainer", "engine=fsdp", *words]
    return [python, "-m", "verl.trainer.main_ppo", *words]


def parse_verl(job: Job, lines: Lines) -> Result:
    """Its console logger's lines: `step:3 - train/loss:0.42 - train/global_tokens:4096 - ...`."""
    rows, came = [], []
    for second, line in lines:
        if match := re.search(r"\bstep:\d+ - (.*)", line):
            parts = (part.rpartition(":") for part in match.group(1).split(" - "))
            # numpy's numbers print as np.float64(0.42)
            row = {
                key: re.sub(r"^np\.\w+\((.*)\)$", r"\1", value.strip()) for key, _, value in parts
            }
            if "train/loss" in row or "perf/time_per_step" in row:
                rows.append(row)
                came.append(second)
    _enough(rows, "verl")
    if job.task == "sft":
        steps = [b - a for a, b in zip(came, came[1:], strict=False)]
        units = statistics.mean(float(row["train/global_tokens"]) for row in rows[1:])
        return Result(steps, units, float(rows[0]["train/loss"]))
    steps = [float(row["perf/time_per_step"]) for row in rows[1:]]
    units = job.run.rlvr.prompts_per_step * job.run.rlvr.rollouts_per_prompt
    peak = [float(row["perf/max_memory_allocated_gb"]) for row in rows if "perf/max_memory_allocated_gb" in row]  # fmt: skip
    return Result(steps, units, float(rows[0]["actor/pg_loss"]), int(max(peak) * 2**30) if peak else None)  # fmt: skip


# --- NeMo-RL -------------------------------------------------------------------------------------
def nemo_settings(job: Job) -> dict[str, Any]:
    """Keys of examples/configs/sft.yaml, or of grpo_math_1B.yaml; those with a + are not in the file, but in its comments."""
    o = job.run.sft.optimizer if job.task == "sft" else job.run.rlvr.optimizer
    both = {
        "policy.model_name": job.model, "policy.tokenizer.name": job.model, "policy.precision": "bfloat16",
        "policy.optimizer.kwargs.lr": o.lr, "policy.optimizer.kwargs.weight_decay": o.weight_decay,
        "policy.optimizer.kwargs.betas": f"[{o.beta1},{o.beta2}]", "policy.max_grad_norm": o.clip,
        "policy.dtensor_cfg.activation_checkpointing": job.run.recompute != "none",
        "policy.sequence_packing.enabled": True, "policy.train_micro_batch_size": 1,
        "checkpointing.enabled": False, "logger.wandb_enabled": False, "logger.tensorboard_enabled": False,
        "logger.log_dir": job.folder / "nemo_rl", "cluster.gpus_per_node": job.gpus, "cluster.num_nodes": 1,
        "data.train.dataset_name": "ResponseDataset", "+data.train.data_path": job.folder / f"{job.task}_nemo.jsonl",
        "+data.train.input_key": "input", "+data.train.output_key": "output", "data.validation": "null",
    }  # fmt: skip
    if job.task == "sft":
        return both | {
            "sft.max_num_steps": job.steps, "sft.val_period": 0, "sft.val_at_start": False,
            "policy.train_global_batch_size": job.run.sft.examples_per_step,
            "policy.max_total_sequence_length": job.run.sft.sequence_length,
        }  # fmt: skip
    stage = job.run.rlvr
    return both | {
        "grpo.num_prompts_per_step": stage.prompts_per_step, "grpo.num_generations_per_prompt": stage.rollouts_per_prompt,
        "grpo.max_num_steps": job.steps, "grpo.val_period": 0, "grpo.val_at_start": False,
        "loss_fn.reference_policy_kl_penalty": stage.kl_coef, "loss_fn.ratio_clip_min": stage.clip_low,
        "loss_fn.ratio_clip_max": stage.clip_high,
        "policy.train_global_batch_size": stage.prompts_per_step * stage.rollouts_per_prompt,
        "policy.max_total_sequence_length": 1024 + stage.max_new_tokens,
        "policy.generation.max_new_tokens": stage.max_new_tokens,
        "policy.generation.temperature": stage.start_temperature,
        "policy.generation.vllm_cfg.gpu_memory_utilization": 0.5, "data.default.prompt_file": "null",
        "data.train.split_validation_size": 0,
    }  # fmt: skip


NEMO_FILES = {
    "sft": ("examples/run_sft.py", "examples/configs/sft.yaml"),
    "grpo": ("examples/run_grpo.py", "examples/configs/grpo_math_1B.yaml"),
}


def nemo_command(job: Job, python: str) -> list[str]:
    root = Path(_said(python, "import nemo_rl; print(nemo_rl.__file__)")).parent.parent
    script, config = (root / name for name in NEMO_FILES[job.task])
    words = [f"{key}={value}" for key, value in nemo_settings(job).items()]
    return [python, str(script), "--config", str(config), *words]


def parse_nemo(job: Job, lines: Lines) -> Result:
    """What its trainers print after each step: `  • Loss: 0.4200`, then `  • Total step time: 1.25s`."""
    losses, seconds = [], []
    for _, line in lines:
        if match := re.search(r"• Loss: (\S+)", line):
            losses.append(float(match.group(1)))
        elif match := re.search(r"• Total step time: ([\d.]+)s", line):
            seconds.append(float(match.group(1)))
    _enough(seconds, "NeMo-RL")
    samples = job.run.rlvr.prompts_per_step * job.run.rlvr.rollouts_per_prompt
    return Result(seconds[1:], job.tokens_per_step if job.task == "sft" else samples, losses[0])


# --- ours, and ours with Bridge's settings ---------------------------------------------------------
def own_command(module: str) -> Callable[[Job, str], list[str]]:
    def command(job: Job, python: str) -> list[str]:
        stage = {"sft": "sft", "grpo": "rlvr"}[job.task]
        words = [
            "--steps",
            str(job.steps),
            "--run",
            job.run.out,
            "--json",
            str(job.folder / "own.jsonl"),
        ]
        layout = [
            f"{name}={getattr(job.run, name)}"
            for name in ("tensor_parallel", "context_parallel", "recompute")
        ]
        layout += [f"distributed_optimizer={job.gpus > 1}", f"overlap={job.gpus > 1}"]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.gpus}"]
        return [python, *launch, "-m", *module.split(), stage, *words, *layout]

    return command


def parse_own(job: Job, lines: Lines) -> Result:
    """The row that `phimini bench train` has written once its output ends."""
    list(lines)
    (row,) = read(job.folder / "own.jsonl")
    if not row.samples:
        raise RuntimeError("bench peers: ours: a loss or a gradient norm was not finite")
    # A rate of one unit of work: as many "seconds" as it takes for one, over all GPUs.
    return Result([1 / rate for rate in row.samples], 1.0, row.info["first_loss"], row.peak_bytes)


OURS = Provider(tuple(UNITS), (), own_command("phimini.bench.cli bench train"), parse_own)
PROVIDERS = {
    "megatron_bridge": Provider(("sft",), ("transformer_engine",), own_command("phimini.bench.peers.megatron_bridge"), parse_own,
                                ("megatron-core", "transformer-engine", "torch")),
    "verl": Provider(tuple(UNITS), ("verl", "pandas"), verl_command, parse_verl, ("verl", "vllm", "torch")),
    "nemo_rl": Provider(tuple(UNITS), ("nemo_rl",), nemo_command, parse_nemo, ("nemo-rl", "vllm", "torch")),
}  # fmt: skip


# --- the comparison --------------------------------------------------------------------------------
def why_not(name: str, task: str, python: str) -> str | None:
    """Why this provider cannot be compared with here; None: it can."""
    provider = PROVIDERS[name]
    if task not in provider.tasks:
        return f"{name} is compared in {' and '.join(provider.tasks)}, not in {task}"
    if not torch.cuda.is_available():
        return f"{name} needs a CUDA GPU; this machine has none"
    for module in provider.modules:
        found = (
            "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
        )
        if subprocess.run([python, "-P", "-c", found, module]).returncode:
            return f"{name} needs the module {module}; {python} has none (--python names its interpreter)"
    return None


def job_of(task: str, run: RunConfig, folder: Path, steps: int, gpus: int) -> Job:
    """The models that the stage starts from, and the trained tokens of its steps."""
    start = Path(run.out) / {"sft": "midtrain", "grpo": "rollout_dpo"}[task] / "model"
    if not start.exists():  # a small run that ended with stage 2
        start = Path(run.out) / "sft" / "model"
    tokens = 0.0
    if task == "sft":
        tokenizer = Tokenizer.load(start)
        examples = read_examples(
            Path(run.out) / "curate" / "sft.jsonl", tokenizer, run.chat_template
        )
        tokens = (
            statistics.mean(len(e.tokens) - e.loss_from for e in examples)
            * run.sft.examples_per_step
        )
    return Job(task, run, folder, start, steps, gpus, tokens)


def describe(rows: list[Row]) -> str:
    ours, theirs = rows
    peaks = " and ".join(
        "?" if r["peak_gpu_bytes"] is None else f"{r['peak_gpu_bytes'] / 2**30:.1f}" for r in rows
    )
    return (
        f"{ours['task']}: {ours['per_gpu_second']:,.1f} against {theirs['provider']}'s {theirs['per_gpu_second']:,.1f} "
        f"{ours['unit']} per second and GPU on {ours['gpus']} {ours['device']}: {ours['ratio']:.2f} times; "
        f"peak {peaks} GiB; first loss {ours['first_loss']:.4f} and {theirs['first_loss']:.4f}"
    )


def no_row(name: str, task: str, why: str) -> Row:
    """The row of what was not measured, which says so."""
    return {"task": task, "provider": name, "unit": UNITS.get(task, "pairs"), "per_cpu_second": None,
            "peak_rss_bytes": None, "first_loss": None, "versions": {}, "ratio": None, "verdict": f"not measured: {why}"}  # fmt: skip


def compare(name: str, job: Job, python: str, rounds: int) -> list[Row]:
    """Ours and `name`'s rows. RuntimeError where a side fails or Bridge's first loss is another."""
    _write_data(job, python)
    sides = {"phimini": (OURS, sys.executable), name: (PROVIDERS[name], python)}
    results: dict[str, list[Result]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            provider, interpreter = sides[side]
            command = provider.command(job, interpreter)
            results[side].append(provider.parse(job, _lines(side, command)))
    losses = {side: results[side][0].first_loss for side in sides}
    if name == "megatron_bridge" and not math.isclose(*losses.values(), rel_tol=SAME_LOSS):
        raise RuntimeError(f"bench peers {job.task}: the same batch has other losses: {losses}")
    rates = {side: [result.rate(job.gpus) for result in results[side]] for side in sides}
    ratio = statistics.median(a / b for a, b in zip(rates["phimini"], rates[name], strict=True))
    versions = {side: _versions(sides[side][1], PROVIDERS[name].versions) for side in sides}
    return [
        {
            "task": job.task, "provider": side, "unit": UNITS[job.task], "per_cpu_second": None, "peak_rss_bytes": None,
            "first_loss": losses[side], "versions": versions[side], "ratio": ratio if side == "phimini" else None,
            "per_gpu_second": statistics.median(rates[side]), "gpus": job.gpus, "device": environment().device,
            "peak_gpu_bytes": max((r.peak_bytes for r in results[side] if r.peak_bytes), default=None),
        }
        for side in sides
    ]  # fmt: skip


def _lines(side: str, command: list[str]) -> Lines:
    """As they come. RuntimeError with the last ones where the process fails."""
    last: list[str] = []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-20:], line]
            yield time.perf_counter(), line
        if process.wait(TIMEOUT_S):
            log.seek(0)
            raise RuntimeError(f"bench peers: {side} ended with status {process.returncode}:\n{''.join(last)}{log.read()[-3000:]}")  # fmt: skip


def _enough(steps: list[Any], name: str) -> None:
    if len(steps) < 2:
        raise RuntimeError(f"bench peers: {name}: expected at least 2 steps in its output, got {len(steps)}")  # fmt: skip


def _write_data(job: Job, python: str) -> None:
    """The run's questions and answers in the shape that each side reads; verl's parquet by its own pandas."""
    if job.task == "sft":
        rows = read_rows(
            Path(job.run.out) / "curate" / "sft.jsonl", {"question": str, "response": str}
        )
        pairs = [(row["question"], row["response"]) for row in rows]
        verl = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]  # fmt: skip
    else:
        rows = read_rows(
            Path(job.run.out) / "distill" / "prompts.jsonl", {"question": str, "answer": str}
        )
        pairs = [(row["question"], row["answer"]) for row in rows]
        # This data_source makes verl compare what is in \\boxed{} with the answer.
        verl = [{"data_source": "lighteval/MATH", "prompt": [{"role": "user", "content": q}],
                 "reward_model": {"style": "rule", "ground_truth": a}} for q, a in pairs]  # fmt: skip
    write_rows(job.folder / f"{job.task}_nemo.jsonl", [{"input": q, "output": a} for q, a in pairs])
    source = job.folder / f"{job.task}_verl.jsonl"
    write_rows(source, verl)
    if _said(python, "import importlib.util as u; print(bool(u.find_spec('verl')))") == "True":
        _said(python, "import sys, pandas; pandas.read_json(sys.argv[1], lines=True).to_parquet(sys.argv[2])",
              str(source), str(job.folder / f"{job.task}.parquet"))  # fmt: skip


def _said(python: str, code: str, *arguments: str) -> str:
    done = subprocess.run([python, "-P", "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench peers: {python}: {done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def _versions(python: str, names: tuple[str, ...]) -> dict[str, str | None]:
    code = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({n: next((d.version for d in m.distributions(name=n)), None) for n in sys.argv[1:]}))"
    )
    return json.loads(_said(python, code, *names))
