"""State of a run, read from the files of its folder without its lock: its present step, and how its last command ended.

`phimini watch RUN` draws it again every second on a terminal until the run's command ends.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from phimini.model.io.json_files import read_json, write_json
from phimini.stages.run.lock import LOCK_FILE
from phimini.stages.run.outputs import METRICS, SUMMARY
from phimini.stages.run.progress import PROGRESS

ENDED = ".ended.json"
"""file in the run's folder: the last command, and how it ended; `end` is null while it runs, or if it was killed"""
DATA = ("distill", "curate", "base", "tokenize")
STAGES = (*DATA, "midtrain", "sft", "rollout_dpo", "rlvr")
_TAIL_BYTES = 1 << 16
"""of a metrics file: its last rows"""

REFRESH_S = 1.0
_SHOWN = ("loss", "validation_loss", "reward", "accuracy", "response_length", "entropy")
"""metrics of a stage's newest step, in this order"""

Row = dict[str, Any]


@contextmanager
def recorded(out: str | Path, verb: str, *, is_main: bool = True) -> Iterator[None]:
    """Record in the run's folder that a command runs, and how it ends. The caller holds the run's lock."""
    path = Path(out) / ENDED

    def note(end: str | None, message: str = "") -> None:
        if is_main and path.parent.exists():
            write_json(path, {"verb": verb, "end": end, "message": message, "at": time.time()})

    note(None)
    with suppress(OSError):
        if is_main:
            (path.parent / PROGRESS).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        stopped = type(error).__name__ in ("Stopped", "GuardStop", "KeyboardInterrupt")
        with suppress(OSError):  # the error itself is the message: a full disk must not hide it
            note("stopped" if stopped else "failed", str(error) or type(error).__name__)
        raise
    note("complete")


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage of a run."""

    name: str
    complete: bool
    summary: Row = field(default_factory=dict)
    last: Row = field(default_factory=dict)
    """the newest row of its metrics"""
    alarms: dict[str, list[int]] = field(default_factory=dict)
    """steps of the newest rows, from 1, in which a guard tripped"""


@dataclass(frozen=True, slots=True)
class Status:
    """A run's folder at one moment."""

    state: str
    """empty, running, complete, stopped, failed, killed, or unfinished: no command of it is known"""
    holder: str
    """the process that uses the folder, or used it last"""
    where: str
    """the stage that runs, or in which the run ended"""
    message: str
    """why it ended"""
    progress: Row
    """content of PROGRESS, if a command runs"""
    stages: list[StageStatus]

    @property
    def line(self) -> str:
        """One sentence: the state, in which stage, and why."""
        named = self.where and self.state != "complete" and not self.progress
        place = f" in {self.where}" if named else ""
        reason = f": {self.message}" if self.message else ""
        if self.state == "running":
            reason = f": {described(self.progress)}" if self.progress else ""
        if self.state == "killed":
            reason = f": {self.holder} ended without a word (killed, or out of memory)"
        return f"{self.state}{place}{reason}"


def described(progress: Row) -> str:
    """Return label, share and time left of a progress."""
    share = 100 * progress["done"] / max(progress["total"], 1)
    return f"{progress['label']} {progress['done']:,}/{progress['total']:,} ({share:.0f} %), {progress['left_s']:.0f} s left"


def read_status(out: Path) -> Status:
    """Return the state of the run in a folder. Raises ValueError if there is no such folder."""
    if not out.is_dir():
        raise ValueError(f"{out}: expected the folder of a run, got {'a file' if out.exists() else 'nothing there'}")  # fmt: skip
    stages = [_stage(out, name) for name in STAGES if (out / name).is_dir()]
    ended, holder = _object(out / ENDED), _text(out / LOCK_FILE)
    where = _current(out, stages, ended.get("verb"))
    if is_held(out / LOCK_FILE, holder):
        return Status("running", holder, where, "", _object(out / PROGRESS), stages)
    if not stages and not ended:
        return Status("empty", holder, "", "no stage of a run is here", {}, stages)
    state = (ended["end"] or "killed") if ended else "unfinished"
    if not ended and len(stages) == len(STAGES) and all(stage.complete for stage in stages):
        state = "complete"
    return Status(state, holder, where, ended.get("message", ""), {}, stages)


def is_held(path: Path, holder: str) -> bool:
    """Return True if a process holds the lock, as the kernel lists it; of one on another machine, if it wrote lately."""
    if not path.exists():
        return False
    if holder and not holder.endswith(f" on {socket.gethostname()}"):
        newest = max((p.stat().st_mtime for p in (path.parent / PROGRESS, path) if p.exists()), default=0.0)  # fmt: skip
        return time.time() - newest < 600
    inode = str(path.stat().st_ino)
    return any(line.split()[1] == "FLOCK" and line.split()[5].endswith(f":{inode}") for line in _text(Path("/proc/locks")).splitlines())  # fmt: skip


def _current(out: Path, stages: list[StageStatus], verb: str | None) -> str:
    """Return the step that a command is in: its own or, of a recipe, the first that is not complete."""
    if verb not in ("recipe", None):
        return verb
    done = {stage.name for stage in stages if stage.complete}
    steps: list[str] = list(STAGES)
    for name in reversed(STAGES):  # an evaluation after each model; the base's, after the data
        if name == "base" or name not in DATA:
            place = len(DATA) if name == "base" else steps.index(name) + 1
            steps.insert(place, f"evaluate {name}")
            if (out / "evaluate" / f"{name}.json").exists():
                done.add(f"evaluate {name}")
    return next((step for step in steps if step not in done), "report")


def _stage(out: Path, name: str) -> StageStatus:
    rows = last_rows(out / name / METRICS)
    alarms: dict[str, list[int]] = {}
    for row in rows:
        for key in row:
            if key.startswith("alarm_"):
                alarms.setdefault(key.removeprefix("alarm_"), []).append(row["step"] + 1)
    summary = _object(out / name / SUMMARY)
    return StageStatus(name, bool(summary), summary, rows[-1] if rows else {}, alarms)


def last_rows(path: Path, least_bytes: int | None = _TAIL_BYTES) -> list[Row]:
    """Return the whole rows in the last bytes, or all, of a metrics file that may grow meanwhile."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = max(0, size - (least_bytes or size))
        file.seek(start)
        *lines, _ = file.read().split(b"\n")
    rows = [json.loads(line) for line in lines[bool(start) :] if line]
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _object(path: Path) -> Row:
    """Return the object in a file, or an empty one if there is no file."""
    if not path.exists():
        return {}
    try:
        found = read_json(path)
    except FileNotFoundError:  # it has been removed since
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def watch(out: Path) -> None:
    """Print the state of the run in `out`; on a terminal again and again, until no command uses it. Raises as `read_status`."""
    console = Console(highlight=False)
    status = read_status(out)
    if not console.is_interactive:
        # A file has no width: no line is cut.
        Console(highlight=False, width=200).print(page(out, status))
        return
    with Live(page(out, status), console=console, auto_refresh=False) as live:
        while status.state == "running":
            time.sleep(REFRESH_S)
            status = read_status(out)
            live.update(page(out, status), refresh=True)


def page(out: Path, status: Status) -> RenderableType:
    """Return the state, a row for each stage, and the alarms."""
    table = Table.grid(padding=(0, 2))
    for stage in status.stages:
        table.add_row(stage.name, *_cells(stage, status))
    alarms = [
        f"alarm: {stage.name}: {name} in {len(steps)} steps, last in step {steps[-1]}"
        for stage in status.stages
        for name, steps in stage.alarms.items()
    ]
    return Group(Text(f"{out}: {status.line}"), table, *map(Text, alarms))


def _cells(stage: StageStatus, status: Status) -> tuple[str, str]:
    """Return the state of a stage, and the newest of its numbers."""
    label = status.progress.get("label")
    numbers = [f"{name} {stage.last[name]:.4g}" for name in _SHOWN if isinstance(stage.last.get(name), int | float)]  # fmt: skip
    if stage.complete:
        seconds = stage.summary.get("seconds")
        steps = stage.summary.get("steps")
        state = f"complete, {steps:,} steps, {seconds:.0f} s" if steps and seconds else "complete"
    elif label == stage.name:
        state = f"step {status.progress['done']:,} of {status.progress['total']:,}"
    elif stage.last:
        state = f"step {stage.last['step'] + 1:,}"
    else:
        state = "begun" if status.state == "running" else "not complete"
    return state, "  ".join(numbers)
