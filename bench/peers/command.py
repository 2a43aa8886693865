"""Compare stages 2, 3 and 4 with TRL's SFTTrainer, DPOTrainer and GRPOTrainer, which take turns.

Each side is a process of one thread on the tiny preset in fp32. Ours runs the real stage (`stages/sft.py`,
`rollout_dpo.py`, `rlvr.py`), TRL its trainer on Phi3ForCausalLM, from the same model folder and token ids, with the same
batch. Before any timing the two must agree, within 1e-4, on the loss of the same batch. Then they take turns of a few
optimizer steps, measured in each process's CPU time. Ours includes reading its batches, metrics and, for DPO, the
reference's forward pass; for GRPO sampling, verifying and weight sync. A GRPO sample is a sampled answer: TRL also trains
on groups with equal rewards, whose gradient is zero, our stage does not.

TRL has an environment of its own (`make bench-peers`; `--python` names another interpreter). Without it the status is 2.
`--json PATH` gets two rows per task, as JSON lines in *.jsonl and as a JSON list elsewhere: task, provider, unit,
per_cpu_second, peak_rss_bytes, first_loss, versions, ratio (on our row, else null).
"""

import dataclasses
import json
import math
import os
import resource
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

from phimini.bench.gate.options import at_least_one, parser
from phimini.bench.peers.common_start import (
    BATCH,
    BETA,
    FIRST_LOSS,
    GROUP,
    MAX_NEW_TOKENS,
    SETTINGS,
    prepare,
)
from phimini.model.io.json_files import write_json, write_rows
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.stages import rlvr, rollout_dpo, sft
from phimini.stages.base import base_config
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.run import training
from phimini.stages.run.metrics import MetricsLog

Row = dict[str, Any]
UNITS = {"sft": "tokens", "dpo": "pairs", "grpo": "samples"}
TARGETS = {"sft": 1.8, "dpo": 2.2, "grpo": 4.0}
"""least ratio of our rate to TRL's"""
SAME_LOSS = 1e-4
WARM_UP = 2
PACKAGES = ("phimini", "megatron-core", "torch")
PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
# The timed stages' settings: TRL's defaults where they decide the amount of work per step.
TIMED = [
    "sft.epochs=1000", "rollout_dpo.pairs=teacher", "rollout_dpo.epochs=100", "rollout_dpo.pairs_per_step=32",
    "rollout_dpo.nll_weight=0", f"rollout_dpo.beta={BETA}", "rlvr.steps=100000",
    f"rlvr.prompts_per_step={BATCH['grpo'] // GROUP}", f"rlvr.rollouts_per_prompt={GROUP}", "rlvr.rebalance=false",
    "rlvr.uniform_length=false", "rlvr.anneal=false", "rlvr.start_temperature=1", "rlvr.min_rollouts=1",
    "rlvr.probe_prompts=300", f"rlvr.max_new_tokens={MAX_NEW_TOKENS}",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where a target is missed; 2 without TRL. RuntimeError where the losses of one batch differ."""
    options = parser("peers", __doc__)
    options.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(UNITS)}; default: all")  # fmt: skip
    options.add_argument("--rounds", type=at_least_one, default=5, help="turns of each side")
    options.add_argument("--steps", type=at_least_one, default=4, help="optimizer steps of a turn")
    options.add_argument("--python", type=Path, default=PYTHON, help="TRL's interpreter")
    args = options.parse_args(argv)
    if unknown := [t for t in args.tasks if t not in UNITS]:
        options.error(f"unknown task {unknown[0]!r}; expected {', '.join(UNITS)}")
    if not args.python.exists():
        raise ValueError(f"trl: {args.python} does not exist; `make bench-peers` sets it up")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        run = prepare(Path(name))
        for task in args.tasks or UNITS:
            rows += compare(task, run, args.python, args.rounds, args.steps)
            print(describe(rows[-2:]), flush=True)
    if args.json is not None:
        (write_rows if args.json.suffix == ".jsonl" else write_json)(args.json, rows)
    held = [row for row in rows if row["provider"] == "phimini"]
    return 1 if any(row["ratio"] < TARGETS[row["task"]] for row in held) else 0


# --- our side ------------------------------------------------------------------------------------
def our_side(task: str, folder: str, steps: int) -> None:
    """Run the stage in this process, `steps` optimizer steps per line `go` on stdin."""
    torch.set_num_threads(1)
    out = Path(folder) / "run"
    run = override(tiny(), [f"out={out}", *SETTINGS, *TIMED])
    world = initialize(Layout(), base_config(run))
    turns = Turns(task, steps, FIRST_LOSS[task](run, world, Path(folder) / task))
    TurnLog.turns = turns
    bench_run = dataclasses.replace(run, out=str(_linked(out, task)))
    training.MetricsLog = TurnLog  # pyright: ignore[reportAttributeAccessIssue]
    if task == "sft":
        sft.sft(bench_run, world)
    elif task == "dpo":
        rollout_dpo.reference_logps = turns.timed_reference(rollout_dpo.reference_logps)
        rollout_dpo.rollout_dpo(bench_run, world)
    else:
        rlvr.rlvr(bench_run, world)


def _linked(out: Path, task: str) -> Path:
    """Return a run directory for the task, with links to the prepared stages (stage 3 links to stage 2)."""
    bench = out.parent / f"{task}-run"
    bench.mkdir()
    stages = {"sft": ("midtrain",), "dpo": ("midtrain", "sft"), "grpo": ("midtrain", "sft")}[task]
    for stage in ("distill", "curate", "base", "tokenize", *stages):
        os.symlink(out / stage, bench / stage)
    if task == "grpo":
        os.symlink(out / "sft", bench / "rollout_dpo")
    return bench


class Turns:
    """Our process's half of the protocol with the comparing process: JSON lines, as TRL's side writes them."""

    def __init__(self, task: str, steps: int, first_loss: float) -> None:
        self.task, self.steps, self.first_loss = task, steps, first_loss
        self.done, self.units, self.since = 0, 0.0, 0.0
        self.reference_seconds = 0.0
        """the reference's forward pass of DPO, per pair"""

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
            self.say(first_loss=self.first_loss, versions={p: version(p) for p in PACKAGES})  # fmt: skip
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self.units, self.since = 0.0, time.process_time()

    def say(self, **values: Any) -> None:
        values["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("PEERS " + json.dumps(values), flush=True)


class TurnLog(MetricsLog):
    """The stage's log, which ends a turn after a row."""

    turns: Turns

    def write(self, step: int, *, tokens: int, **values: Any) -> None:
        super().write(step, tokens=tokens, **values)
        self.turns.after_step(values | {"tokens": tokens})


# --- taking turns --------------------------------------------------------------------------------
class Side:
    """The process of one provider."""

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
    """Return the rows of both providers. RuntimeError where a side ends early, or the losses of one batch differ."""
    folder = Path(run.out).parent
    code = "import sys; from phimini.bench.peers.command import our_side; our_side(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    ours = Side(
        "phimini", [sys.executable, "-W", "ignore", "-c", code, task, str(folder), str(steps)]
    )
    heard = {"phimini": ours.hear()}  # before TRL starts: this side writes the batch for both
    script = Path(__file__).parent / "trl_stages.py"
    # -P: its folder has a kernels.py, which transformers would import
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
