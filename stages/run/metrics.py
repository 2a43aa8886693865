"""What a stage says while it runs: one row per step in metrics.jsonl, one log line, one progress bar.

Rank 0 writes and prints; on every other rank the same calls only keep count.
"""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import IO, SupportsFloat

from phimini.model.io.json_files import Row, dump, write_rows
from phimini.parallel.ranks.timing import step_done

_RECENT_STEPS = 20
_BAR_WIDTH = 24


class MetricsLog:
    """The metrics of one stage, as a context manager.

        with MetricsLog(folder / "metrics.jsonl", total_steps, "sft", is_main) as log:
            for step in range(first_step, total_steps):
                ...
                log.write(step, tokens=num_tokens, loss=loss, lr=lr, grad_norm=norm)

    A file from an interrupted run is continued: the first `write(step)` cuts the rows from `step` on,
    which the run does a second time, and a last line that a crash tore. Each row is one write of its own,
    so a process that dies loses none. Raises ValueError for a damaged file, OSError for a full disk.
    """

    def __init__(self, path: str | Path, total_steps: int, stage: str, is_main: bool) -> None:
        self.path = Path(path)
        self.is_main = is_main
        self._stage = stage
        self._bar = ProgressBar(total_steps, stage, is_main)
        self._file: IO[bytes] | None = None
        self._last_step: int | None = None
        self._since = time.perf_counter()

    def __enter__(self) -> "MetricsLog":
        self._since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def write(self, step: int, *, tokens: int, **values: SupportsFloat | None) -> None:
        """Records a finished step, counted from 0. `tokens` are this step's, over all ranks.

        `values` are numbers, also tensors of one element, which are read here; None leaves a field out.
        A value that is not finite is written as null. `seconds` is the time since the step before,
        `tokens_per_second` what follows from it.
        """
        assert self._last_step is None or step > self._last_step, (
            f"step {step} after step {self._last_step}"
        )
        seconds = time.perf_counter() - self._since
        if self.is_main and self._file is None:
            self._continue_file(step)
        self._last_step = step
        if self.is_main:
            numbers = {name: _plain(value) for name, value in values.items() if value is not None}
            rate = tokens / seconds if seconds > 0 else 0.0
            row = {
                "step": step,
                **numbers,
                "tokens": tokens,
                "tokens_per_second": rate,
                "seconds": seconds,
            }
            self._append(row)
            shown = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items())
            self._bar.say(
                f"{self._stage} {step + 1}/{self._bar.total}  {shown}  {rate:,.0f} tokens/s  {seconds:.2f} s"
            )
        self._bar.advance(step + 1, tokens)
        # From before the row was written: that time is part of the next step.
        self._since += seconds
        step_done()

    def _append(self, row: Row) -> None:
        assert self._file is not None, "the file is opened by the first write"
        line = {name: value if math.isfinite(value) else None for name, value in row.items()}
        data = dump(line, f"{self.path}: step {row['step']}").encode() + b"\n"
        try:
            written = self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(self.path)) from error
        if written != len(data):  # the disk took a part of the row, and no more
            raise OSError(errno.ENOSPC, "cannot write: No space left on device", str(self.path))

    def _continue_file(self, first_step: int) -> None:
        """Opens the file behind the rows before `first_step`; later rows and a torn last line go."""
        kept: list[Row] = []
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        # What follows the last \n is empty or torn.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                row = json.loads(line)
                step, _tokens, _seconds = (
                    int(row["step"]),
                    int(row["tokens"]),
                    float(row["seconds"]),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: not a row of metrics: {line[:60]!r}"
                ) from error
            if step < first_step:
                kept.append(row)
        if len(kept) != len(lines) - 1 or lines[-1] or not self.path.exists():
            write_rows(self.path, kept)
        self._file = self.path.open("ab", buffering=0)


class ProgressBar:
    """A bar with tokens/s and time left on a terminal; elsewhere only what is said, line by line.

    Everything goes to `stream` (standard output), lines above the bar. With `enabled` false nothing does.
    """

    def __init__(
        self, total: int, label: str, enabled: bool = True, stream: IO[str] | None = None
    ) -> None:
        self.total = total
        self._label = label
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._on_terminal = enabled and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        # time, done, tokens
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_RECENT_STEPS + 1)
        self._recent.append((time.perf_counter(), 0, 0))
        self._drawn = ""

    def say(self, line: str) -> None:
        if not self._enabled:
            return
        self._erase()
        print(line, file=self._stream, flush=True)
        self._draw(self._drawn)

    def advance(self, done: int, tokens: int = 0) -> None:
        """`done` of the total are finished; `tokens` more went through since the last call."""
        if not self._on_terminal:
            return
        if len(self._recent) == 1 and done > 1:
            # A run that goes on: what was done before has no time here.
            self._recent[0] = (self._recent[0][0], done - 1, 0)
        self._recent.append((time.perf_counter(), done, self._recent[-1][2] + tokens))
        self._erase()
        self._draw(self._text(done))

    def close(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._drawn:
            print(file=self._stream, flush=True)
            self._drawn = ""

    def _text(self, done: int) -> str:
        (start, first, tokens_before), (now, last, tokens) = self._recent[0], self._recent[-1]
        seconds = max(now - start, 1e-9)
        left = (self.total - done) * seconds / max(last - first, 1)
        filled = _BAR_WIDTH * min(done, self.total) // max(self.total, 1)
        bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
        rate = f"  {(tokens - tokens_before) / seconds:,.0f} tokens/s" if tokens else ""
        text = f"{self._label} {bar} {done}/{self.total}{rate}  {_clock(left)} left"
        return text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be erased

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write("\r\x1b[K")

    def _draw(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()
        self._drawn = text


def _plain(value: SupportsFloat) -> float | int:
    return int(value) if isinstance(value, (bool, int)) else float(value)


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
