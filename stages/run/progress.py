"""Progress of a long step: a bar on a terminal, elsewhere a line for each of the first steps, then every few seconds."""

import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LINE_EVERY_S = 5.0
"""least time between two lines where there is no terminal"""
FIRST_STEPS = 3
"""steps of this run that have a line each, however fast they are: the first may compile kernels"""
_REDRAW_EVERY_S = 0.1


class StepProgress:
    """A display of how many of `total` steps are done, with the latest values and the time left."""

    def __init__(
        self, total: int, label: str, enabled: bool = True, stream: IO[str] | None = None
    ) -> None:
        self.total = total
        self._label = label
        self._enabled = enabled
        self._stream = stream or sys.stdout
        console = Console(file=self._stream, highlight=False)
        self._bar = _bar(console) if enabled and console.is_interactive else None
        self._done = 0
        self._updates = 0
        self._values: dict[str, float | int] = {}
        self._speed = ""
        self._last_time = time.perf_counter()
        """of the last line or drawing"""
        self._last_done: int | None = None
        """steps done at that time"""

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
            self._last_done = done - 1
            if self._bar is not None:
                self._bar.add_task(
                    self._label, total=self.total, completed=done - 1, values="", speed=""
                )
                self._bar.start()
        self._done, self._speed, self._updates = done, speed, self._updates + 1
        self._values |= values
        since = time.perf_counter() - self._last_time
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
            if self._updates == 1 or since >= _REDRAW_EVERY_S:
                self._draw()
        elif self._updates <= FIRST_STEPS or since >= LINE_EVERY_S:
            self._print_line()

    def close(self) -> None:
        """Show the last step, if it has not been shown."""
        if self._last_done is None:
            return
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        elif self._done > self._last_done:
            self._print_line()
        self._last_done = None

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
        self._values = {}


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
