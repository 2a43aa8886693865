"""Chains of kills: a run that is killed with SIGKILL at random moments, started again each time, until it is complete."""

import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_runs import command, differences, snapshot, words_of

from phimini.stages import evaluate, midtrain, rlvr, rollout_dpo, sft
from phimini.stages.report import page
from phimini.stages.rl import prompt_pool
from phimini.stages.run import metrics, training

FILE_OPERATIONS = ("replace", "fsync", "rename", "unlink", "mkdir", "rmdir", "open")
MOMENTS: list[tuple[Any, str]] = [
    (training, "load_hf"), (training, "load_checkpoint"), (training, "export_hf"), (training.Progress, "after_step"),
    (midtrain, "start_step"), (sft, "start_step"), (rollout_dpo, "start_step"),
    (rlvr, "forward_backward"), (rollout_dpo, "reference_logps"), (rollout_dpo, "pair_up"), (rlvr, "choose"),
    (prompt_pool, "pool_of"), (evaluate, "evaluate_problems"), (evaluate, "summarize"), (page, "render"),
]  # fmt: skip
"""functions of the stages, besides the file operations, before and after which a process is killed"""


@dataclass
class Chain:
    """The outcome of a chain of kills."""

    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)


class Countdown:
    """A SIGKILL at this process's n-th file operation or moment from now, or at the n-th of a child that it forks.

    after: once the operation is done, not before it. whole_job: the process that called `install` dies too.
    note: gets a line about the kill.
    """

    def __init__(self, n: int, after: bool, whole_job: bool, note: Path) -> None:
        self.left, self.after, self.whole_job, self.note = n, after, whole_job, note
        self.job = 0

    def install(self) -> None:
        self.job = os.getpid()
        for name in FILE_OPERATIONS:
            self._wrap(os, name, lambda *args: name_of(args))
        for owner, name in MOMENTS:
            self._wrap(owner, name, lambda *_: "")
        log: Any = metrics.MetricsLog
        append = log._append

        def torn(own: Any, row: Any) -> None:
            if self._is_due() and not self.after:
                own._file.write(b'{"step": 3, "lo')
                self._die("in a row of metrics")
            append(own, row)
            if self.left <= 0:
                self._die("after a row of metrics")

        log._append = torn

    def _is_due(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def _die(self, where: str) -> None:
        self.left = 10**9  # the note's own operations
        with self.note.open("a") as file:
            file.write(where + "\n")
        if self.whole_job and os.getpid() != self.job:
            os.kill(self.job, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _wrap(self, owner: Any, name: str, describe: Callable[..., str]) -> None:
        action = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            if self._is_due() and not self.after:
                self._die(f"before {name} {describe(*args)}")
            result = action(*args, **options)
            if self.left <= 0:
                self._die(f"after {name} {describe(*args)}")
            return result

        setattr(owner, name, counted)


def name_of(args: tuple[Any, ...]) -> str:
    """Return the last name of an operation's file, without numbers that differ from run to run."""
    path = next((a for a in reversed(args) if isinstance(a, str | os.PathLike)), "")
    return re.sub(r"\.\d+\.[0-9a-f]{8}|\d+", "#", os.path.basename(os.fspath(path)))


def killed_run(
    out: Path, seed: int, most: int, reference: dict[str, Any], *more: str, limit: int = 60
) -> Chain:
    """Run the recipe in `out`, killed at most `most` operations after each start, until it is complete.

    Raises AssertionError if a start ends otherwise than by a kill, or the run is not complete after `limit` kills.
    """
    rng, chain = random.Random(seed), Chain()
    log, note = out.with_suffix(".log"), out.with_suffix(".note")
    note.touch()
    status = 1
    while status:
        assert chain.kills < limit, f"{out}: {limit} kills and not complete: {chain.moments}"
        countdown = Countdown(rng.randint(1, most), rng.random() < 0.5, rng.random() < 0.5, note)
        status = command(words_of(out, *more), log, countdown.install)
        lines = note.read_text().splitlines()
        killed = len(lines) - chain.kills
        if status and not (killed and status in (1, -signal.SIGKILL)):
            raise AssertionError(
                f"{out}: status {status} after {killed} kills: {log.read_text()[-3000:]}"
            )
        chain.kills += killed
    chain.moments.update(note.read_text().splitlines())
    chain.differing = differences(reference, snapshot(out))
    return chain
