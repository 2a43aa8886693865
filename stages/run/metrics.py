"""The metrics of a stage: a row per step in metrics.jsonl, its progress, and the rows that trackers get.

Rank 0 writes and prints. On other ranks the same calls only count steps.
"""

import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO, SupportsFloat

from phimini.model.io.json_files import Row, append_line, dump
from phimini.parallel.ranks.timing import host_times, step_done
from phimini.stages.config.schema import RunConfig
from phimini.stages.run.progress import StepProgress
from phimini.stages.run.trackers import Trackers

HOST_PHASES = ("data", "rollout", "verify", "sync")
"""phases for which a step waits on the host; the rest of a step is training"""


class MetricsLog:
    """The metrics of one stage, as a context manager.

        with MetricsLog(folder / "metrics.jsonl", total_steps, "sft", is_main, run) as log:
            for step in range(first_step, total_steps):
                ...
                log.write(step, tokens=num_tokens, loss=loss, lr=lr, grad_norm=norm)

    Of an existing file the first `kept_bytes` stay, the rows of steps that a resumed run does not repeat. Each row is
    written by one system call, so a process that dies loses no row. With a `run`, the trackers of its `log.to` get the
    rows too.

    Raises ValueError for a tracker that cannot start, OSError for a full disk.
    """

    def __init__(
        self,
        path: str | Path,
        total_steps: int,
        stage: str,
        is_main: bool,
        run: RunConfig | None = None,
        kept_bytes: int = 0,
    ) -> None:
        self.path = Path(path)
        self._kept_bytes = kept_bytes
        self.is_main = is_main
        self._stage = stage
        self._run = run
        self._trackers: Trackers | None = None
        out = None if run is None else run.out
        self._progress = StepProgress(total_steps, stage, is_main, out=out)
        self._file: IO[bytes] | None = None
        self._last_step: int | None = None
        self._since = time.perf_counter()
        self._recording = host_times()

    def __enter__(self) -> "MetricsLog":
        if self.is_main and self._run is not None:
            self._trackers = Trackers(self._run, self._stage)
        self._recorder = self._recording.__enter__()
        self._since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._recording.__exit__(None, None, None)
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        self._progress.close()
        if self._trackers is not None:
            self._trackers.close()

    def write(self, step: int, *, tokens: int, **values: SupportsFloat | None) -> None:
        """Record a finished step, counted from 0. `tokens` counts this step's tokens over all ranks.

        `values` are numbers or tensors of one element; None leaves the field out. A value that is not finite is
        written as null. The row also gets `seconds`, the time since the previous step, those of HOST_PHASES, e.g. `rollout_seconds`, and `tokens_per_second`.
        """
        assert self._last_step is None or step > self._last_step, (
            f"step {step} after step {self._last_step}"
        )
        seconds = time.perf_counter() - self._since
        if self.is_main and self._file is None:
            self._open_file()
        self._last_step = step
        if self.is_main:
            numbers = {name: _plain(value) for name, value in values.items() if value is not None}
            rate = tokens / seconds if seconds > 0 else 0.0
            spent = self._recorder.so_far()
            row = {
                "step": step,
                **numbers,
                "tokens": tokens,
                "tokens_per_second": rate,
                "seconds": seconds,
            } | {f"{name}_seconds": spent[name] for name in HOST_PHASES if spent[name]}
            self._append(row)
            if self._trackers is not None:
                self._trackers.log(step, {k: v for k, v in row.items() if k != "step"})
            speed = f"{rate:,.0f} tokens/s  {seconds:.2f} s"
            self._progress.update(step + 1, numbers, speed)
        # The time that writing this row took is part of the next step.
        self._since += seconds
        step_done()

    def _append(self, row: Row) -> None:
        assert self._file is not None, "the file is opened by the first write"
        line = {name: value if math.isfinite(value) else None for name, value in row.items()}
        data = dump(line, f"{self.path}: step {row['step']}").encode()
        append_line(self._file, data, self.path)

    def _open_file(self) -> None:
        """Open the file for appending, behind the rows that are kept."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(self._kept_bytes)


def _plain(value: SupportsFloat) -> float | int:
    return int(value) if isinstance(value, (bool, int)) else float(value)
