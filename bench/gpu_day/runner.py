"""Run parts one after the other within a deadline, each in a session of its own, and write rows while they go.

A part's limit is its share of the time that is left, so a part that ends early leaves its time to the later ones. A part
that reaches its limit gets SIGABRT, at which Python prints where every thread is, and then SIGKILL, with all of
its descendants. The kernel gives orphaned descendants to this process, so those in sessions of their own are found too.
If this process is killed, the kernel kills the part.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from phimini.bench.gpu_day.parts import Part
from phimini.parallel.ranks.process import end_with_parent

_PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.1
GRACE_S = 2.0
"""between SIGABRT and SIGKILL"""
SHORTEST_S = 1.0
"""a part with less time than this is not started"""
SAID = 3000
"""characters of a part's last output in its row, where it failed"""
Row = dict[str, Any]


class RowFile:
    """A file of JSON lines. Each row is one write, so that the file is valid whenever this process is killed."""

    def __init__(self, path: Path, common: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        self.common = dict(common)

    def add(self, kind: str, **row: Any) -> None:
        """Append a row, with the facts that all rows have."""
        os.write(self._file, (json.dumps({"kind": kind} | row | self.common) + "\n").encode())


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a part."""

    part: str
    status: str
    """ok, failed, timed out, or the reason why it was not run"""
    rc: int | None
    seconds: float
    limit_s: float | None
    num_rows: int = 0


def run_parts(
    parts: Sequence[Part], rows: RowFile, log: Path, deadline: float, *, rehearse: bool, values: Mapping[str, Any]
) -> Iterator[Outcome]:  # fmt: skip
    """Run every part that can run here and yield how it ended.

    deadline: of `time.monotonic`. values: of the words in braces in the parts' commands; `gpus` is their number.
    """
    adopt_orphans()
    # An aborted part writes no core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    reasons = {part.name: part.missing(rehearse, values["gpus"]) for part in parts}
    shares = [0.0 if reasons[part.name] else part.share for part in parts]
    for index, part in enumerate(parts):
        started = time.monotonic()
        limit_s = (deadline - started) * part.share / max(sum(shares[index:]), part.share) - GRACE_S
        reason = reasons[part.name]
        if reason is None and limit_s < SHORTEST_S:
            reason = "no time left"
        if reason is not None:
            outcome = Outcome(part.name, reason, None, 0.0, None)
            rows.add("end", **_fields(outcome))
            yield outcome
            continue
        with tempfile.TemporaryDirectory(prefix="phimini-gpu-day-", ignore_cleanup_errors=True) as folder:  # fmt: skip
            yield run_part(part, rows, log, limit_s, Path(folder), rehearse=rehearse, values=values)


def run_part(
    part: Part, rows: RowFile, log: Path, limit_s: float, folder: Path, *, rehearse: bool, values: Mapping[str, Any]
) -> Outcome:  # fmt: skip
    """Run one part with its limit, forward its rows while it runs, and leave no process of it behind."""
    path = folder / "rows.jsonl"
    words = (part.rehearsal if rehearse else part.command) or ()
    named = {"rows": path, "folder": folder, **values}
    command = [sys.executable, *(word.format_map(named) if "{" in word else word for word in words)]
    rows.add("start", part=part.name, what=part.what, limit_s=round(limit_s, 1), command=" ".join(command))  # fmt: skip
    forwarded, started, rc, status = Forwarded(path, part.name, rows), time.monotonic(), None, "stopped"  # fmt: skip
    begin = log.stat().st_size if log.exists() else 0
    before = set(psutil.Process().children(recursive=True))
    try:
        rc = watch(command, log, limit_s, environment(rehearse), forwarded.update)
        status = "timed out" if rc is None else "ok" if rc == 0 else "failed"
    finally:  # also on Ctrl-C and SIGTERM
        end_all(before)
        forwarded.update()
        if status != "stopped":
            forwarded.results(folder, part.results)
        outcome = Outcome(part.name, status, rc, time.monotonic() - started, limit_s, forwarded.count)  # fmt: skip
        said = {} if status == "ok" else {"said": last_words(log, begin)}
        rows.add("end", **_fields(outcome), **said)
    return outcome


def _fields(outcome: Outcome) -> Row:
    limit_s = None if outcome.limit_s is None else round(outcome.limit_s, 1)
    return {"part": outcome.part, "status": outcome.status, "rc": outcome.rc, "seconds": round(outcome.seconds, 2),
            "limit_s": limit_s, "rows": outcome.num_rows}  # fmt: skip


def watch(
    command: list[str], log: Path, limit_s: float, env: Mapping[str, str], tick: Callable[[], None]
) -> int | None:
    """Run a command to its end, or to its limit, and return its exit status, or None. Its output goes to `log`."""
    end = time.monotonic() + limit_s
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    while (rc := process.poll()) is None and time.monotonic() < end:
        tick()
        time.sleep(POLL_S)
    if rc is None:
        process.send_signal(signal.SIGABRT)  # with PYTHONFAULTHANDLER: the stack of every thread
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return rc


def environment(rehearse: bool) -> dict[str, str]:
    """Return a part's environment. A rehearsal sees no GPU; no part inherits the interpreter of Triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    return env | ({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {})


class Forwarded:
    """The rows of a part, copied as they come; a file that is written again has the earlier rows at its start."""

    def __init__(self, path: Path, part: str, rows: RowFile) -> None:
        self.path, self.part, self.rows, self.count, self._lines = path, part, rows, 0, 0

    def update(self) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(errors="replace").split("\n")[
            :-1
        ]  # the last one may be half a line
        for line in lines[self._lines :]:
            self._add(line)
        self._lines = max(self._lines, len(lines))

    def results(self, folder: Path, patterns: Sequence[str]) -> None:
        """Add the JSON objects of the result files; they are there once the part has come that far."""
        for file in (file for pattern in patterns for file in sorted(folder.glob(pattern))):
            text = file.read_text(errors="replace")
            for line in text.splitlines() if file.suffix == ".jsonl" else [text]:
                self._add(line, {"file": str(file.relative_to(folder))})

    def _add(self, text: str, facts: Row | None = None) -> None:
        try:
            row = json.loads(text)
        except ValueError:
            row = {"not JSON": text[:SAID]}
        self.rows.add("row", part=self.part, **(facts or {}), row=row)
        self.count += 1


def last_words(log: Path, begin: int) -> str:
    """Return the end of the output that was written after `begin`."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 10 * SAID))
        text = file.read().decode(errors="replace")
    return "".join(line for line in text.splitlines(True) if not line.startswith("Extension modules:"))[-SAID:]  # fmt: skip


# --- processes -----------------------------------------------------------------------------------
def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose parents end; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_all(before: set[psutil.Process]) -> None:
    """Kill this process's descendants that are not in `before`, and wait until they are gone."""
    for _ in range(100):
        left = [p for p in psutil.Process().children(recursive=True) if p not in before]
        if not left:
            return
        for process in left:
            try:
                process.kill()
                process.wait(0.2)
            except (psutil.NoSuchProcess, psutil.TimeoutExpired):
                continue
    raise RuntimeError(f"processes {[p.pid for p in left]} cannot be killed")
