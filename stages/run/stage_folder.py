"""One stage's folder in a run directory: what it was made from, whether it is complete, how it is stopped.

runs/tiny/
  config.json        the whole config
  distill/ curate/   rows
  base/model/        what stage 1 starts from
  tokenize/          the rows as token ids
  midtrain/ sft/ rollout_dpo/ rlvr/
    begun.json       what an unfinished stage was begun from: settings, inputs, and the files that a resumed run reads
    model/           the result, a Hugging Face folder
    checkpoints/     to resume from; gone once the stage is complete
    metrics.jsonl    a row per step
    rollouts/        stage 4's tables of rollouts, one per step
    summary.json     written last: its presence says that the stage is complete; describes the stage's other files
  evaluate/STAGE.json

Each JSON file but the first carries its own checksum (`checked_files`). Before a stage begins, all files of its inputs
are compared with their summary.json.
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

from phimini.model.io.checked_files import (
    check_file,
    describe_file,
    read_sealed,
    write_sealed,
)
from phimini.parallel.ranks.world import World, on_every, on_main
from phimini.stages.config.schema import RunConfig, to_dict
from phimini.stages.run.outputs import (
    BEGUN,
    METRICS,
    ON_READING,
    SUMMARY,
    check_outputs,
    check_sources,
    describe_sources,
    output_names,
    write_summary,
)
from phimini.stages.run.remains import REMOVED

# What a stage reads; a stage is stale when one of these was made again after it.
INPUTS = {
    "distill": [],
    "curate": ["distill"],
    "base": ["curate"],
    "tokenize": ["base", "curate", "distill"],
    "midtrain": ["base", "tokenize"],
    "sft": ["midtrain", "tokenize"],
    "rollout_dpo": ["sft", "curate", "distill"],
    "rlvr": ["rollout_dpo", "distill"],
    "controls/sft_continued": ["sft", "tokenize", "rollout_dpo", "rlvr"],
    "controls/rejection_sft": ["sft", "tokenize", "rollout_dpo", "rlvr"],
    "controls/rl_without_dpo": ["sft", "distill", "rollout_dpo", "rlvr"],
    "controls/rl_without_uniform_length": ["distill", "rollout_dpo", "rlvr"],
    "controls/rl_without_rebalance": ["distill", "rollout_dpo", "rlvr"],
    "controls/rl_without_anneal": ["distill", "rollout_dpo", "rlvr"],
    "controls/rl_without_remedies": ["distill", "rollout_dpo", "rlvr"],
}
# Settings that decide the result of every stage, in addition to its own.
SHARED = ("seed", "model", "base", "chat_template", "rope_factors")
# Settings of a stage that do not change its result: an unfinished stage may resume with others.
FREE = (
    "micro_rows",
    "micro_tokens",
    "checkpoint_every",
    "workers",
    "url",
    "key_variable",
    "per_request",
    "concurrency",
    "attempts",
    "timeout_s",
    "prompt_price",
    "answer_price",
)
PACKING = "packing"
"""the folder of arrays that rank 0 makes at each start of a stage"""


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
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    """rank 0's descriptions of the files that are whole, by name, for a resumed run and `finish`"""

    @classmethod
    def open(
        cls, run: RunConfig, name: str, *, redo: bool = False, share: slice = slice(None)
    ) -> "Stage":
        """Return the stage with its state, after a check of its inputs' files, or of its own if it is complete.

        share: the inputs' files that this rank reads through. Raises ValueError if the stage is complete with other settings
        or inputs, inputs are missing, or a file is damaged or lost.
        """
        out = Path(run.out)
        path = out / name
        for earlier in INPUTS[name]:
            if not (out / earlier / SUMMARY).exists():
                raise ValueError(
                    f"{name}: {out / earlier} is not complete; run `phimini {earlier}` first"
                )
        complete = (path / SUMMARY).exists() and not redo
        if complete:
            then = read_sealed(path / SUMMARY)
            _check_origin(path, then, _origin(run, name))
            check_sources(run, name, path, then["sources"])
            check_outputs(path, content=False)
        else:
            if not redo and not (path / BEGUN).exists() and (left := output_names(path)):
                raise ValueError(
                    f"{path / SUMMARY}: this file is missing beside {left[0]}: the folder is damaged"
                )
            for earlier in INPUTS[name]:
                check_outputs(out / earlier, share=share)
        return cls(run, name, path, complete)

    @classmethod
    def begin(cls, run: RunConfig, name: str, world: World, *, redo: bool = False) -> "Stage":
        """Open and prepare the stage on all ranks together. Collective.

        Raises ValueError as `open`, and if the stage would resume from a start with other settings or inputs.
        """

        def opened() -> Stage:
            share = slice(world.rank, None, world.world_size)
            stage = cls.open(run, name, redo=redo, share=share)
            if not (redo or stage.complete):
                stage.check_begun()
            return stage

        # Every rank has looked before any removes or finishes something.
        stage = on_every(world, opened)
        if not stage.complete:
            on_main(world, lambda: stage.prepare(redo=redo))
        return stage

    def check_begun(self) -> None:
        """Raise ValueError if an unfinished stage that has made something was begun with other settings or inputs."""
        begun = self.path / BEGUN
        if begun.exists() and {p.name for p in self.path.iterdir()} - {BEGUN, METRICS, PACKING}:
            _check_origin(self.path, read_sealed(begun), _origin(self.run, self.name))

    def prepare(self, *, redo: bool) -> None:
        """Make the folder; with `redo`, delete its content first. One rank calls it.

        Raises ValueError if a file that an interrupted run recorded is damaged or lost.
        """
        if redo and self.path.exists():
            # First out of the way: half a removal would leave a summary without its model, or checkpoints to go on from.
            old = self.path.with_name(f".{self.path.name}{REMOVED}")
            self.path.rename(old)
            shutil.rmtree(old)
        begun = self.path / BEGUN
        if begun.exists():
            self.go_on_with(read_sealed(begun)["files"])
        sources = describe_sources(self.run, self.name)
        write_sealed(begun, _origin(self.run, self.name) | {"sources": sources, "files": self.made})

    def go_on_with(self, files: dict[str, dict[str, Any]]) -> None:
        """Take over the files of an interrupted run. One rank calls it. Raises ValueError for a damaged or lost one."""
        self.made.update(files)
        self._check_made()

    def _check_made(self) -> None:
        for name, described in self.made.items():
            content = not name.endswith(ON_READING)
            check_file(self.path / name, described, content=content, prefix=name == METRICS)

    def note(self, name: str, **more: int) -> None:
        """Describe a whole file, with `more` in its description, for the next checkpoint. One rank calls it."""
        self.made[name] = describe_file(self.path / name) | more

    def record(self, *names: str) -> None:
        """Describe whole files in begun.json: only then a resumed run reads them. One rank calls it."""
        for name in names:
            self.note(name)
        begun = read_sealed(self.path / BEGUN)
        write_sealed(self.path / BEGUN, begun | {"files": self.made})

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the stage complete. One rank calls it. Raises ValueError for a file that was damaged or lost meanwhile."""
        self._check_made()
        whole = {name: described for name, described in self.made.items() if name != METRICS}
        begun = read_sealed(self.path / BEGUN)
        write_summary(self.path, {"id": uuid.uuid4().hex} | begun | summary, whole)
        (self.path / BEGUN).unlink()
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


def settings(run: RunConfig, name: str) -> dict[str, Any]:
    """Return the settings that decide the result of stage `name`, as JSON values."""
    config_of = {c: "rlvr" if "/rl_" in c else "sft" for c in INPUTS if c.startswith("controls/")}
    own = getattr(run, config_of.get(name, name), None)
    shared = {key: getattr(run, key) for key in SHARED}
    if name == "rollout_dpo" and run.rollout_dpo.pairs == "policy" and run.rlvr.reward is not None:
        shared |= {"reward": run.rlvr.reward}  # it judges the rollouts
    if run.fp8 != "none" and name not in ("distill", "curate", "base", "tokenize"):
        shared |= {"fp8": run.fp8, "fp8_recipe": run.fp8_recipe}
    return json.loads(
        json.dumps(shared | ({name: to_dict(own)} if dataclasses.is_dataclass(own) else {}))
    )


def _origin(run: RunConfig, name: str) -> dict[str, Any]:
    out = Path(run.out)
    inputs = {e: read_sealed(out / e / SUMMARY)["id"] for e in INPUTS[name]}
    return {"stage": name, "inputs": inputs, "settings": settings(run, name)}


def _check_origin(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if then["stage"] != now["stage"]:
        raise ValueError(
            f"{path}: holds the record of stage {then['stage']}: the folder is damaged"
        )
    check_same_settings(then["settings"], now["settings"], path)
    for earlier, id in then["inputs"].items():
        if now["inputs"][earlier] != id:
            raise ValueError(f"{path}: {earlier} was made again since; use --redo, or another out=")


def check_same_settings(then: dict, now: dict, path: Path, prefix: str = "") -> None:
    """Raise ValueError for the first field, at any depth, in which two settings differ, but for FREE ones."""
    for key in sorted((then.keys() | now.keys()) - set(FREE)):
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            check_same_settings(a, b, path, f"{prefix}{key}.")
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
