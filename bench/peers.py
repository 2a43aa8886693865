"""`phimini bench peers [sft] [dpo] [grpo] [--rounds N] [--steps N] [--json PATH]`: TRL beside our stages, taking turns

Each side is a process of one thread on the tiny preset in fp32: ours runs the real stage (`stages/sft.py`,
`rollout_dpo.py`, `rlvr.py`), TRL its SFTTrainer, DPOTrainer or GRPOTrainer on Phi3ForCausalLM, from the same model
folder, on the same token ids, with the same batch. Before anything is timed the two must agree, within 1e-4, on the loss
of the same batch. Then they take turns of a few optimizer steps; what counts is each process's CPU time. Ours includes
reading its batches, metrics and, for DPO, the reference's forward pass; for GRPO sampling, verifying and weight sync.
A GRPO sample is a sampled answer: our stage does not train on groups with equal rewards, whose gradient is zero; TRL does.

TRL lives in an environment of its own (`make bench-peers`); `--python` names another. On a GPU the same command compares
with TRL there; trainers that cannot be installed beside it (verl, NeMo-RL) are not compared.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from phimini.kernels import linear_logprob
from phimini.model.chat import render
from phimini.model.huggingface import load_config
from phimini.model.tokenizer import Tokenizer
from phimini.parallel.batch import IGNORE, PackedBatch, pack
from phimini.parallel.builder import Model
from phimini.parallel.launch import run_ranks
from phimini.parallel.layout import Layout
from phimini.parallel.step import forward_backward, forward_only
from phimini.parallel.world import World, initialize
from phimini.stages import rlvr, rollout_dpo, sft
from phimini.stages.cli import model_config
from phimini.stages.config import RunConfig, override
from phimini.stages.jsonl import read_json, read_rows, write_json, write_rows
from phimini.stages.metrics import MetricsLog
from phimini.stages.mismatch import MismatchMeter
from phimini.stages.packing import documents
from phimini.stages.recipe import DATA, TRAINING
from phimini.stages.recipes import tiny
from phimini.stages.rollout_groups import Rollout
from phimini.stages.training import cross_entropy_head, load_model, read_examples

Row = dict[str, Any]
UNITS = {"sft": "tokens", "dpo": "pairs", "grpo": "samples"}
TARGETS = {"sft": 1.8, "dpo": 2.2, "grpo": 4.0}
"""of our rate over TRL's"""
BATCH = {"sft": 32, "dpo": 32, "grpo": 192}
GROUP, MAX_NEW_TOKENS, BETA = 8, 160, 0.1
SAME_LOSS = 1e-4
WARM_UP = 2
PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
SETTINGS = [
    "processes=1", "distill.num_problems=1500", "distill.rollouts_per_problem=4", "distill.num_prompts=600",
    "distill.num_heldout=24", "distill.num_validation=24", "curate.sft_examples=1500", "midtrain.steps=500",
    "midtrain.validate_every=500", "sft.epochs=2", "sft.validate_every=1000000", "sft.examples_per_step=32",
]  # fmt: skip
# The stages as they are timed: TRL's defaults where they decide how much work a step is.
TIMED = [
    "sft.epochs=1000", "rollout_dpo.pairs=teacher", "rollout_dpo.epochs=1", "rollout_dpo.pairs_per_step=32",
    "rollout_dpo.nll_weight=0", f"rollout_dpo.beta={BETA}", "rlvr.steps=100000",
    f"rlvr.prompts_per_step={BATCH['grpo'] // GROUP}", f"rlvr.rollouts_per_prompt={GROUP}", "rlvr.rebalance=false",
    "rlvr.uniform_length=false", "rlvr.anneal=false", "rlvr.start_temperature=1", "rlvr.min_rollouts=1",
    "rlvr.probe_prompts=300", f"rlvr.max_new_tokens={MAX_NEW_TOKENS}",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """0; 1 where the two sides' losses differ or a target is missed; 2 without TRL's environment."""
    parser = argparse.ArgumentParser(prog="phimini bench peers", description=__doc__)
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help=f"of {', '.join(UNITS)}; none: all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a turn")
    parser.add_argument("--python", type=Path, default=PYTHON, help="TRL's interpreter")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    if unknown := [t for t in args.tasks if t not in UNITS]:
        parser.error(f"unknown task {unknown[0]!r}; expected {', '.join(UNITS)}")
    if not args.python.exists():
        print(f"phimini bench peers: {args.python} does not exist; `make bench-peers` sets it up", file=sys.stderr)  # fmt: skip
        return 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        run = prepare(Path(name))
        for task in args.tasks or list(UNITS):
            rows += compare(task, run, args.python, args.rounds, args.steps)
            print(describe(rows[-2:]), flush=True)
    if args.json is not None:
        write_rows(args.json, rows)
    wrong = [
        r for r in rows if r["provider"] == "phimini" and (r["ratio"] or 0) < TARGETS[r["task"]]
    ]
    return 1 if wrong else 0


# --- the common ground ---------------------------------------------------------------------------
def prepare(folder: Path) -> RunConfig:
    """A small run up to stage 2, and what TRL reads of it: models, rows of token ids, settings."""
    run = override(tiny(), [f"out={folder / 'run'}", *SETTINGS])
    run_ranks(_train, 1, run)
    out = folder / "run"
    tokenizer = Tokenizer.load(out / "sft" / "model")
    for task in UNITS:
        _for_transformers(
            out / ("midtrain" if task == "sft" else "sft") / "model", folder / task / "model"
        )
        _for_transformers(out / "midtrain" / "model", folder / task / "reference")
    examples = read_examples(out / "curate" / "sft.jsonl", tokenizer, run.chat_template)
    write_rows(
        folder / "sft" / "sft.jsonl",
        [
            {"input_ids": e.tokens, "labels": [IGNORE] * e.loss_from + e.tokens[e.loss_from :]}
            for e in examples
        ],
    )
    pairs = rollout_dpo.read_pairs(out / "curate" / "pairs.jsonl", tokenizer, run.chat_template)
    rows = []
    for pair in pairs:
        prompt = pair.chosen.loss_from
        rows.append({"prompt": "", "prompt_ids": pair.chosen.tokens[:prompt],
                     "chosen_ids": pair.chosen.tokens[prompt:], "rejected_ids": pair.rejected.tokens[prompt:]})  # fmt: skip
    write_rows(folder / "dpo" / "dpo.jsonl", rows)
    problems = read_rows(out / "distill" / "prompts.jsonl", {"question": str, "answer": str})
    write_rows(
        folder / "grpo" / "grpo.jsonl",
        [{"prompt": _prompt(p["question"], run), "answer": p["answer"]} for p in problems],
    )  # fmt: skip
    tokens = statistics.mean(len(e.tokens) - e.loss_from for e in examples) * BATCH["sft"]
    for task in UNITS:
        write_json(folder / task / "settings.json", {"batch": BATCH[task], "beta": BETA, "group": GROUP,
                   "max_new_tokens": MAX_NEW_TOKENS, "tokens_per_step": tokens})  # fmt: skip
    return run


def _for_transformers(model: Path, copy: Path) -> None:
    """Transformers picks a LongRoPE table per batch, by length; with both lists equal it computes what we do.

    Where an answer crosses the border, at 128 tokens here, its generate computes the whole cache again, a cost that no
    real Phi-4-mini batch has in this proportion: the border is moved to the end, its attention factor kept.
    """
    shutil.copytree(model, copy)
    config = read_json(copy / "config.json")
    rope = config["rope_scaling"]
    rope["short_factor"] = rope["long_factor"]
    rope["attention_factor"] = load_config(model).attention_factor
    config["original_max_position_embeddings"] = config["max_position_embeddings"]
    write_json(copy / "config.json", config)


def _prompt(question: str, run: RunConfig) -> str:
    message = {"role": "user", "content": question}
    return render([message], run.chat_template, add_generation_prompt=True)


def _train(run: RunConfig) -> None:
    for stage in DATA.values():
        stage(run)
    world = initialize(Layout(), model_config(run))
    for stage in ("midtrain", "sft"):
        TRAINING[stage](run, world)
    world.close()


# --- our side ------------------------------------------------------------------------------------
def our_side(task: str, folder: str, steps: int) -> None:
    """A process that runs the stage and lets `steps` optimizer steps pass per `go` that it reads."""
    torch.set_num_threads(1)
    out = Path(folder) / "run"
    run = override(tiny(), [f"out={out}", *SETTINGS, *TIMED])
    world = initialize(Layout(), model_config(run))
    turns = Turns(task, steps, FIRST_LOSS[task](run, world, Path(folder) / task))
    TurnLog.turns = turns
    bench_run = dataclasses.replace(run, out=str(_linked(out, task)))
    if task == "sft":
        sft.MetricsLog = TurnLog  # pyright: ignore[reportAttributeAccessIssue]
        sft.sft(bench_run, world)
    elif task == "dpo":
        rollout_dpo.MetricsLog = TurnLog  # pyright: ignore[reportAttributeAccessIssue]
        rollout_dpo.reference_logps = turns.timed_reference(rollout_dpo.reference_logps)
        rollout_dpo.rollout_dpo(bench_run, world)
    else:
        rlvr.MetricsLog = TurnLog  # pyright: ignore[reportAttributeAccessIssue]
        rlvr.rlvr(bench_run, world)


def _linked(out: Path, task: str) -> Path:
    """A run directory of the task's own, whose earlier stages are the prepared ones (stage 3's is stage 2's)."""
    bench = out.parent / f"{task}-run"
    bench.mkdir()
    stages = {"sft": ("midtrain",), "dpo": ("midtrain", "sft"), "grpo": ("midtrain", "sft")}[task]
    for stage in ("distill", "curate", "base", *stages):
        os.symlink(out / stage, bench / stage)
    if task == "grpo":
        os.symlink(out / "sft", bench / "rollout_dpo")
    return bench


class Turns:
    """What our process says to the one that compares: JSON lines, as TRL's side says them."""

    def __init__(self, task: str, steps: int, first_loss: float) -> None:
        self.task, self.steps, self.first_loss = task, steps, first_loss
        self.done, self.units, self.since = 0, 0.0, 0.0
        self.reference_seconds = 0.0
        """of DPO: the reference's forward pass per pair"""

    def timed_reference(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def timed(model: Model, pairs: list, *args: Any) -> Any:
            since = time.process_time()
            result = fn(model, pairs, *args)
            self.reference_seconds = (time.process_time() - since) / len(pairs)
            return result

        return timed

    def after_step(self, row: Row) -> None:
        self.units += {"sft": row["tokens"], "dpo": BATCH["dpo"], "grpo": row.get("rollouts", 0)}[
            self.task
        ]
        self.done += 1
        past = self.done - WARM_UP
        if past < 0 or past % self.steps:
            return
        if past:
            spent = time.process_time() - self.since
            if self.task == "dpo":
                spent += self.reference_seconds * self.units
            self.say(cpu_seconds=spent, units=self.units)
        else:
            self.say(first_loss=self.first_loss, versions={p: version(p) for p in ("phimini", "megatron-core", "torch")})  # fmt: skip
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self.units, self.since = 0.0, time.process_time()

    def say(self, **values: Any) -> None:
        values["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("PEERS " + json.dumps(values), flush=True)


class TurnLog(MetricsLog):
    """The stage's own log; a turn may end after each of its rows."""

    turns: Turns

    def write(self, step: int, *, tokens: int, **values: Any) -> None:
        super().write(step, tokens=tokens, **values)
        self.turns.after_step(values | {"tokens": tokens})


# --- the loss of the same batch ------------------------------------------------------------------
def sft_loss(run: RunConfig, world: World, folder: Path) -> float:
    model, tokenizer = load_model(run, world, "midtrain")
    rows = Path(run.out) / "curate" / "sft.jsonl"
    examples = read_examples(rows, tokenizer, run.chat_template)[: BATCH["sft"]]
    return forward_backward(model, [pack(documents(examples))], cross_entropy_head).loss


def dpo_loss(run: RunConfig, world: World, folder: Path) -> float:
    """The reference is stage 1's model here: with stage 2's the loss is ln 2, whatever the batch."""
    model, tokenizer = load_model(run, world, "sft")
    frozen, _ = load_model(run, world, "midtrain")
    rows = Path(run.out) / "curate" / "pairs.jsonl"
    pairs = rollout_dpo.read_pairs(rows, tokenizer, run.chat_template)[: BATCH["dpo"]]
    reference = rollout_dpo.reference_logps(frozen, pairs, run.rollout_dpo, world)
    batch = rollout_dpo.pair_batch(pairs, reference, world)
    return forward_backward(model, [batch], rollout_dpo.dpo_head(run.rollout_dpo)).loss


def grpo_loss(run: RunConfig, world: World, folder: Path) -> float:
    """Of teacher rollouts with advantages of both signs and old log-probs that are off, so that some are clipped."""
    model, tokenizer = load_model(run, world, "sft")
    rows = Path(run.out) / "distill" / "rollouts.jsonl"
    examples = read_examples(rows, tokenizer, run.chat_template)[:64]
    logps = _logps(model, pack(documents(examples))).split([len(e.tokens) - 1 for e in examples])
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for i, (example, logp) in enumerate(zip(examples, logps, strict=True)):
        mine = logp[example.loss_from - 1 :]
        old = mine + 0.2 * torch.randn(len(mine), generator=generator)
        rollouts.append(Rollout(
            id=str(i), prompt_id=str(i), step=0, prompt=example.tokens[: example.loss_from],
            response=example.tokens[example.loss_from :], logprobs=old.tolist(), temperature=1.0,
            reward=0.0, truncated=False, versions=[[0, 0, len(mine)]], advantage=(-1.0) ** i * (1 + i % 3),
        ))  # fmt: skip
    write_json(
        folder / "grpo_batch.json",
        [{"prompt": r.prompt, "response": r.response, "old_logps": r.logprobs, "advantage": r.advantage} for r in rollouts],
    )  # fmt: skip
    head = rlvr.policy_head(run.rlvr, MismatchMeter(), 0.0)
    batch = rlvr.rollout_batch(rollouts, 0, run.rlvr, world)
    return forward_backward(model, [batch], head).loss


def _logps(model: Model, batch: PackedBatch) -> torch.Tensor:
    def fn(hidden_MD: torch.Tensor, weight_VD: torch.Tensor, batch: PackedBatch, *, group: Any):
        return linear_logprob(hidden_MD, weight_VD, batch.targets_T, group=group).logp_M

    return forward_only(model, [batch], fn)[0].cpu()


FIRST_LOSS: dict[str, Callable[[RunConfig, World, Path], float]] = {
    "sft": sft_loss,
    "dpo": dpo_loss,
    "grpo": grpo_loss,
}


# --- taking turns --------------------------------------------------------------------------------
class Side:
    """One provider's process."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        self.rates: list[float] = []
        self.peak_rss_bytes = 0

    def hear(self) -> Row:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("PEERS "):
                said = json.loads(line.removeprefix("PEERS "))
                self.peak_rss_bytes = max(self.peak_rss_bytes, said["peak_rss_bytes"])
                return said
        self.log.seek(0)
        raise RuntimeError(f"bench peers: {self.name} ended:\n{self.log.read()[-3000:]}")

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        said = self.hear()
        self.rates.append(said["units"] / said["cpu_seconds"])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(task: str, run: RunConfig, python: Path, rounds: int, steps: int) -> list[Row]:
    """Rows of both providers; RuntimeError where a side ends early, or their losses of one batch differ."""
    folder = Path(run.out).parent
    code = "import sys; from phimini.bench.peers import our_side; our_side(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    ours = Side(
        "phimini", [sys.executable, "-W", "ignore", "-c", code, task, str(folder), str(steps)]
    )
    heard = {"phimini": ours.hear()}  # first: it writes the batch that both compute
    script = (
        Path(__file__).parent / "peers_trl.py"
    )  # -P: its folder has a kernels.py, which transformers would import
    trl = Side(
        "trl",
        [str(python), "-P", "-W", "ignore", str(script), task, str(folder / task), str(steps)],
    )
    try:
        heard["trl"] = trl.hear()
        losses = {name: said["first_loss"] for name, said in heard.items()}
        if not math.isclose(*losses.values(), rel_tol=0, abs_tol=SAME_LOSS):
            raise RuntimeError(
                f"bench peers {task}: the same batch has other losses: {losses}; nothing was timed"
            )
        for i in range(rounds):
            for side in (ours, trl) if i % 2 == 0 else (trl, ours):
                side.turn()
    finally:
        ours.end()
        trl.end()
    ratio = statistics.median(a / b for a, b in zip(ours.rates, trl.rates, strict=True))
    return [
        {
            "task": task,
            "provider": side.name,
            "unit": UNITS[task],
            "per_cpu_second": statistics.median(side.rates),
            "peak_rss_bytes": side.peak_rss_bytes,
            "first_loss": heard[side.name]["first_loss"],
            "versions": heard[side.name]["versions"],
            "ratio": ratio if side is ours else None,
        }
        for side in (ours, trl)
    ]


def table(rows: list[Row]) -> str:
    """The README's, of committed rows: a line per task."""
    lines = ["| task | ours | TRL | ratio | target | peak memory, ours and TRL | loss of one batch, both |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for ours, trl in zip(rows[::2], rows[1::2], strict=True):
        mib = " and ".join(f"{row['peak_rss_bytes'] / 2**20:,.0f}" for row in (ours, trl))
        loss = " and ".join(f"{row['first_loss']:.6f}" for row in (ours, trl))
        lines.append(
            f"| {ours['task']} | {ours['per_cpu_second']:,.1f} | {trl['per_cpu_second']:,.1f} {ours['unit']} per CPU second "
            f"| {ours['ratio']:.2f} | {TARGETS[ours['task']]} | {mib} MiB | {loss} |"
        )
    return "\n".join(lines)


def describe(rows: list[Row]) -> str:
    ours, trl = rows
    unit = ours["unit"]
    return (
        f"{ours['task']}: {ours['per_cpu_second']:,.1f} against {trl['per_cpu_second']:,.1f} {unit} per CPU second: "
        f"{ours['ratio']:.2f} times (target {TARGETS[ours['task']]}); peak {ours['peak_rss_bytes'] / 2**20:,.0f} against "
        f"{trl['peak_rss_bytes'] / 2**20:,.0f} MiB; loss of one batch {ours['first_loss']:.6f} and {trl['first_loss']:.6f}"
    )


if __name__ == "__main__":
    sys.exit(main())
