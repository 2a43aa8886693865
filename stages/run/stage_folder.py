"""One stage's folder in a run directory: what it was made from, whether it is complete, how it is stopped.

runs/tiny/
  config.json        the whole config
  distill/ curate/   rows
  base/model/        what stage 1 starts from
  midtrain/ sft/ rollout_dpo/ rlvr/
    begun.json       what an unfinished stage was begun from: settings and inputs
    model/           the result, a Hugging Face folder
    checkpoints/     to resume from; gone once the stage is complete
    metrics.jsonl    a row per step
    summary.json     written last: its presence says that the stage is complete
  evaluate/STAGE.json
"""

import dataclasses
import json
import shutil
import signal
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from phimini.model.io.json_files import read_json, write_json
from phimini.parallel.ranks.world import World
from phimini.stages.config.schema import RunConfig, to_dict
from phimini.stages.run.remains import REMOVED

# What a stage reads; a stage is stale when one of these was made again after it.
INPUTS = {
    "distill": [],
    "curate": ["distill"],
    "base": ["curate"],
    "midtrain": ["base", "curate"],
    "sft": ["midtrain", "curate"],
    "rollout_dpo": ["sft", "distill"],
    "rlvr": ["rollout_dpo", "distill"],
    "controls/sft_continued": ["sft", "curate", "rollout_dpo", "rlvr"],
    "controls/rejection_sft": ["sft", "rollout_dpo", "rlvr"],
    "controls/rl_without_dpo": ["sft", "distill", "rollout_dpo", "rlvr"],
    "controls/rl_without_uniform_length": ["distill", "rollout_dpo", "rlvr"],
    "controls/rl_without_rebalance": ["distill", "rollout_dpo", "rlvr"],
    "controls/rl_without_anneal": ["distill", "rollout_dpo", "rlvr"],
    "controls/rl_without_remedies": ["distill", "rollout_dpo", "rlvr"],
}
# Settings that decide the result of every stage, in addition to its own.
SHARED = ("seed", "model", "base", "chat_template", "rope_factors")
# Settings of a stage that do not change its result: an unfinished stage may resume with others.
FREE = ("micro_rows", "micro_examples", "micro_pairs", "micro_rollouts", "checkpoint_every")


@dataclass(frozen=True, slots=True)
class Stage:
    """The folder of one stage of a run."""

    run: RunConfig
    name: str
    path: Path
    complete: bool
    started_s: float = field(default_factory=time.perf_counter)
    """wall clock and processor time of this process when the stage was opened"""
    started_cpu_s: float = field(default_factory=time.process_time)

    @classmethod
    def open(cls, run: RunConfig, name: str, *, redo: bool = False) -> "Stage":
        """Return the stage with its state. Raises ValueError if it is complete with other settings or inputs, or inputs are missing."""
        out = Path(run.out)
        path = out / name
        for earlier in INPUTS[name]:
            if not (out / earlier / "summary.json").exists():
                raise ValueError(
                    f"{name}: {out / earlier} is not complete; run `phimini {earlier}` first"
                )
        complete = (path / "summary.json").exists() and not redo
        if complete:
            _check_origin(path, read_json(path / "summary.json"), _origin(run, name))
        return cls(run, name, path, complete)

    @classmethod
    def begin(cls, run: RunConfig, name: str, world: World, *, redo: bool = False) -> "Stage":
        """Open and prepare the stage on all ranks together. Collective.

        Raises ValueError as `open`, and if the stage would resume from a start with other settings or inputs.
        """
        stage = cls.open(run, name, redo=redo)
        begun = stage.path / "begun.json"
        if begun.exists() and not redo:
            made = {path.name for path in stage.path.iterdir()} - {"begun.json", "metrics.jsonl"}
            if made:
                _check_origin(stage.path, read_json(begun), _origin(run, name))
        world.barrier()  # every rank has looked before any removes or finishes something
        if world.is_main and not stage.complete:
            stage.prepare(redo=redo)
        world.barrier()
        return stage

    def prepare(self, *, redo: bool) -> None:
        """Make the folder; with `redo`, delete its content first. One rank calls it."""
        if redo and self.path.exists():
            # First out of the way: half a removal would leave a summary without its model, or checkpoints to go on from.
            old = self.path.with_name(f".{self.path.name}{REMOVED}")
            self.path.rename(old)
            shutil.rmtree(old)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "begun.json", _origin(self.run, self.name))

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the stage complete. One rank calls it."""
        begun = self.path / "begun.json"
        write_json(
            self.path / "summary.json", {"id": uuid.uuid4().hex} | read_json(begun) | summary
        )
        begun.unlink()
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        return read_json(self.path / "summary.json")


def settings(run: RunConfig, name: str) -> dict[str, Any]:
    """Return the settings that decide the result of stage `name`, as JSON values."""
    config_of = {c: "rlvr" if "/rl_" in c else "sft" for c in INPUTS if c.startswith("controls/")}
    own = getattr(run, config_of.get(name, name), None)
    shared = {key: getattr(run, key) for key in SHARED}
    if run.fp8 != "none":
        shared |= {"fp8": run.fp8, "fp8_recipe": run.fp8_recipe}
    return json.loads(
        json.dumps(shared | ({name: to_dict(own)} if dataclasses.is_dataclass(own) else {}))
    )


def _origin(run: RunConfig, name: str) -> dict[str, Any]:
    out = Path(run.out)
    inputs = {e: read_json(out / e / "summary.json")["id"] for e in INPUTS[name]}
    return {"inputs": inputs, "settings": settings(run, name)}


def _check_origin(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    _same_settings(then["settings"], now["settings"], path)
    for earlier, id in then["inputs"].items():
        if now["inputs"][earlier] != id:
            raise ValueError(f"{path}: {earlier} was made again since; use --redo, or another out=")


def _same_settings(then: dict, now: dict, path: Path, prefix: str = "") -> None:
    for key in sorted((then.keys() | now.keys()) - set(FREE)):
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _same_settings(a, b, path, f"{prefix}{key}.")
        elif a != b:
            raise ValueError(
                f"{path} was made with {prefix}{key}={a}, now it is {b}; use --redo, or another out="
            )


class Interrupt:
    """A handler of Ctrl-C and SIGTERM, as a context manager: the loop asks `requested` between steps.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._flag = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._flag = True
        print(
            "stopping after this step or export (Ctrl-C again: at once)",
            file=sys.stderr,
            flush=True,
        )

    def requested(self, world: World) -> bool:
        """Return True on every rank as soon as one rank was asked to stop. Collective."""
        return any(world.all_gather_objects(self._flag)) if world.world_size > 1 else self._flag


class Stopped(Exception):
    """Exception for a stage that was interrupted and saved; the message says how to resume."""
