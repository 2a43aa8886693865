"""Micro runs of the whole recipe for the fault suite: commands in forked processes, and a comparison of two runs' files.

A coin gives the verdicts, because an untrained model has no right answer: so every stage trains.
"""

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phimini.stages.cli import main
from phimini.stages.run import training
from phimini.stages.run.progress import PROGRESS
from phimini.stages.run.status import ENDED
from phimini.stages.verify import verdict as scorer

MICRO = [
    "distill.num_problems=24", "distill.rollouts_per_problem=2", "distill.num_prompts=12", "distill.num_heldout=12",
    "distill.num_validation=6", "curate.sft_examples=8",
    "midtrain.steps=4", "midtrain.sequence_length=256", "midtrain.rows_per_step=2", "midtrain.micro_rows=1",
    "midtrain.validate_every=2", "midtrain.checkpoint_every=1",
    "sft.epochs=2", "sft.examples_per_step=4", "sft.sequence_length=256", "sft.checkpoint_every=2",
    "rollout_dpo.num_prompts=8", "rollout_dpo.rollouts_per_prompt=4", "rollout_dpo.max_new_tokens=6",
    "rollout_dpo.sequence_length=256", "rollout_dpo.pairs_per_step=3", "rollout_dpo.epochs=1", "rollout_dpo.checkpoint_every=1",
    "rlvr.steps=4", "rlvr.prompts_per_step=2", "rlvr.rollouts_per_prompt=4", "rlvr.probe_prompts=8", "rlvr.probe_rounds=1",
    "rlvr.probe_rollouts=4", "rlvr.oversample_to=8", "rlvr.max_new_tokens=6", "rlvr.sequence_length=256",
    "rlvr.min_rollouts=2", "rlvr.max_accuracy=0.9", "rlvr.checkpoint_every=1",
    "evaluate.max_new_tokens=4", "rollout.max_batch=32", "rollout.deadline_s=60",
]  # fmt: skip
VLLM = ["rollout.engine=vllm", "rollout.placement=colocated"]
TIME_LIMIT_S = 300.0
# Clocks, and names that differ from run to run.
_VOLATILE = {
    "id", "model_id", "model_ids", "inputs", "seconds", "cpu_seconds", "tokens_per_second", "evaluation_seconds",
    "wall_seconds", "peak_rss_bytes", "date", "out", "sha256", "mtime_ns", "metrics.jsonl",
    "made", "data_seconds", "rollout_seconds", "verify_seconds", "sync_seconds",
}  # fmt: skip


def words_of(out: Path, *more: str, verb: str = "recipe") -> list[str]:
    """Return the words of a command for the run in `out`."""
    ranks = [] if any(word.startswith("processes=") for word in more) else ["processes=1"]
    return [verb, "tiny", f"out={out}", *MICRO, *ranks, *more]


def command(words: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    """Run `phimini WORDS` in a forked process, after `prepare`; return its exit status, or minus the signal that ended it.

    log: gets what the command prints.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 97
        try:
            status = _in_child(words, log, prepare)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    deadline = time.monotonic() + TIME_LIMIT_S
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"{words[:3]}: not ended in {TIME_LIMIT_S:.0f} s; see {log}")
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def _in_child(words: list[str], log: Path, prepare: Callable[[], None] | None) -> int:
    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # pytest's streams write elsewhere than to descriptors 1 and 2.
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                 "TORCHELASTIC_USE_AGENT_STORE"):  # fmt: skip
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    coin: Any = lambda text: len(text) % 2 == 0
    scorer.is_right = lambda question, answer, response, finish_reason: coin(response)
    if prepare is not None:
        prepare()
    return main(words)


def snapshot(out: Path) -> dict[str, Any]:
    """Return what must be equal in two runs: every file by name, without clocks and random names."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or name in (".lock", ENDED, PROGRESS):
            continue
        if name == "report.html":  # full of times
            found[name] = "</html>" in path.read_text()
        elif path.name == "README.md":  # of a model: the same
            found[name] = path.read_text().startswith("---")
        elif path.name == "metrics.jsonl":
            found[name] = [_steady(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json" and "model" not in path.parts:
            found[name] = _steady(json.loads(path.read_text()))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of files that two snapshots do not share or that differ."""
    return [n for n in sorted(one.keys() | other.keys()) if one.get(n) != other.get(n)]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _steady(v) for k, v in value.items() if k not in _VOLATILE}
    return [_steady(v) for v in value] if isinstance(value, list) else value


def interrupt(stage: str, step: int) -> Callable[[], None]:
    """Return a `prepare` for `command` that ends the process with SIGKILL after `step` steps of a stage."""

    def prepare() -> None:
        progress: Any = training.Progress
        after_step = progress.after_step

        def then_killed(self: Any, done: int, *args: Any) -> None:
            after_step(self, done, *args)
            if self.stage.name == stage and done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        progress.after_step = then_killed

    return prepare
