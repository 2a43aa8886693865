"""Progress of a long step: a bar on a terminal, elsewhere a line for each of the first steps, then every few seconds.

A file of the run, PROGRESS, has the latest, for `phimini watch`.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LINE_EVERY_S = 5.0
"""least time between two lines where there is no terminal"""
FIRST_STEPS = 3
"""steps of this run that have a line each, however fast they are: the first may compile kernels"""
QUIET_S = 2.0
"""time before the first line about a piece of work"""
PROGRESS = ".progress.json"
"""file in the run's folder: label, done, total, seconds left, the latest values, and when it was written"""
_REDRAW_EVERY_S, _NOTE_EVERY_S = 0.1, 1.0

T = TypeVar("T")


class StepProgress:
    """A display of how many of `total` steps are done, with the latest values and the time left."""

    def __init__(
        self,
        total: int,
        label: str,
        enabled: bool = True,
        stream: IO[str] | None = None,
        *,
        out: str | Path | None = None,
        quiet_s: float = 0.0,
    ) -> None:
        """Show no progress before `quiet_s` seconds; then the first steps have no lines of their own. out: the run's folder, for PROGRESS."""
        self.total = total
        self._label = label
        self._enabled = enabled
        self._stream = stream or sys.stdout
        console = Console(file=self._stream, highlight=False)
        self._bar = _bar(console) if enabled and console.is_interactive else None
        self._file = Path(out) / PROGRESS if enabled and out is not None else None
        self._quiet_s = quiet_s
        self._begun = self._noted = time.perf_counter()
        self._done = 0
        self._updates = 0
        self._values: dict[str, float | int] = {}
        self._speed = ""
        self._last_time = time.perf_counter()
        """of the last line or drawing"""
        self._last_done: int | None = None
        """steps done at that time"""
        self._first = 0
        """steps that an earlier process did"""
        self._shown = False
        """there was a line"""

    def update(
        self,
        done: int,
        values: Mapping[str, float | int] = MappingProxyType({}),
        speed: str = "",
    ) -> None:
        """Report that `done` steps are finished. `values` and `speed` are shown.

        A value stays until its next report is shown, so a validation loss between two lines is not lost.
        """
        if not self._enabled:
            return
        if self._last_done is None:
            # A resumed stage: the steps of the earlier run took no time in this one.
            self._last_done = self._first = 0 if self._quiet_s else done - 1
        self._done, self._speed, self._updates = done, speed, self._updates + 1
        self._values |= values
        now = time.perf_counter()
        if now - self._begun < self._quiet_s:
            return
        since = now - self._last_time
        if self._file is not None and (now - self._noted >= _NOTE_EVERY_S or self._updates == 1):
            self._note(now)
        if self._bar is not None:
            is_new = not self._bar.task_ids
            if is_new:
                self._bar.add_task(
                    self._label, total=self.total, completed=self._first, values="", speed=""
                )
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=done)
            if is_new or since >= _REDRAW_EVERY_S:
                self._draw()
        elif self._is_due(since):
            self._print_line()

    def advance(self) -> None:
        """Report that one more step is finished."""
        self.update(self._done + 1)

    def __enter__(self) -> "StepProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_due(self, since: float) -> bool:
        if self._quiet_s and not self._shown:
            return True
        return since >= LINE_EVERY_S or (not self._quiet_s and self._updates <= FIRST_STEPS)

    def close(self) -> None:
        """Show the last step, if it has not been shown."""
        if self._last_done is None:
            return
        if self._file is not None:
            self._note(time.perf_counter())
        if self._bar is not None:
            if self._bar.task_ids:
                self._draw()
                self._bar.stop()
        elif self._done > self._last_done and (self._shown or not self._quiet_s):
            self._print_line()
        self._last_done = None

    def _note(self, now: float) -> None:
        """Write PROGRESS: not flushed to the disk, because it is for now only."""
        assert self._file is not None
        self._noted = now
        made = max(self._done - self._first, 1)
        row = {
            "label": self._label,
            "done": self._done,
            "total": self.total,
            "left_s": max(self.total - self._done, 0) * (now - self._begun) / made,
            "values": {k: v for k, v in self._values.items() if v == v and abs(v) < 1e300},
            "at": time.time(),
        }
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}.00000000.tmp")
        with contextlib.suppress(OSError):  # output never ends a run
            temporary.write_text(json.dumps(row))
            os.replace(temporary, self._file)

    def _draw(self) -> None:
        assert self._bar is not None
        (task,) = self._bar.task_ids
        self._bar.update(task, values=_described(self._values), speed=self._speed, refresh=True)
        self._last_time, self._last_done = time.perf_counter(), self._done

    def _print_line(self) -> None:
        assert self._last_done is not None
        now = time.perf_counter()
        per_step = (now - self._last_time) / max(self._done - self._last_done, 1)
        left = (self.total - self._done) * per_step
        parts = [f"{self._label} {self._done}/{self.total}", _described(self._values), self._speed]
        parts.append(f"{_clock(left)} left" if left > 0 else "")
        print("  ".join(filter(None, parts)), file=self._stream, flush=True)
        self._last_time, self._last_done = now, self._done
        self._values, self._shown = {}, True


def work(label: str, total: int, out: str | Path | None, enabled: bool = True) -> StepProgress:
    """Return the progress of work other than a stage's steps, in the run's folder `out`: it may end within seconds."""
    return StepProgress(total, label, enabled, out=out, quiet_s=QUIET_S)


def tracked(items: Iterable[T], progress: StepProgress) -> Iterator[T]:
    """Yield the items, each of which is a step of the work, and close `progress` after the last."""
    with progress:
        for item in items:
            yield item
            progress.advance()


def _bar(console: Console) -> Progress:
    """Return a bar that draws only when told: a drawing thread would be copied by a fork for a checkpoint."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn(
            "{task.fields[values]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
        console=console,
        auto_refresh=False,
        expand=True,
        get_time=time.perf_counter,
    )


def _described(values: Mapping[str, float | int]) -> str:
    return "  ".join(
        f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}"
        for name, value in values.items()
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
