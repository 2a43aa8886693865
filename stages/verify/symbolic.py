"""Symbolic answers, compared by math-verify in a process of its own that is killed when its time is up.

math-verify guards itself with SIGALRM, which works in a main thread only, and sympy can spend hours and
gigabytes on one line. A process can always be killed, whichever thread asks and whatever it computes.
This file asks, and remembers the outcomes: what explodes does it once. `verify_worker` answers.
"""

import atexit
import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from typing import Literal

CPU_LIMIT_SECONDS = 0.8
"""what one comparison may cost: processor time, so that a verdict does not depend on what else runs"""
_WALL_LIMIT_SECONDS = 20.0
_START_SECONDS = 120.0
_MAX_REMEMBERED = 20_000

Outcome = Literal["equal", "different", "unreadable", "timed out", "too large"]

log = logging.getLogger(__name__)


class SymbolicVerifier:
    """Asks one worker process, started at the first question and again after it had to be killed."""

    def __init__(self, cpu_limit_seconds: float = CPU_LIMIT_SECONDS) -> None:
        self.cpu_limit_seconds = cpu_limit_seconds
        self.num_asked = 0
        self.num_given_up = 0
        """how many comparisons ran out of time or memory; each is also logged"""
        self._remembered: dict[tuple[str, str], Outcome] = {}
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def compare(self, response: str, answer: str) -> Outcome:
        """Whether two LaTeX expressions mean the same. ImportError if math-verify is not installed."""
        with self._lock:
            outcome = self._remembered.get((response, answer))
            if outcome is None:
                outcome = self._ask(response, answer)
                if len(self._remembered) >= _MAX_REMEMBERED:
                    del self._remembered[next(iter(self._remembered))]
                self._remembered[response, answer] = outcome
            return outcome

    def _ask(self, response: str, answer: str) -> Outcome:
        self.num_asked += 1
        if self._worker is not None and self._worker.poll() is not None:
            self.close()  # it was ended from outside
        worker = self._worker or self._start()
        question = json.dumps([response, answer, self.cpu_limit_seconds]).encode() + b"\n"
        assert worker.stdin is not None, "the worker was started with pipes"
        worker.stdin.write(question)
        worker.stdin.flush()
        reply = self._read_line(worker, _WALL_LIMIT_SECONDS)
        if reply is None:
            self.close()
        outcome: Outcome = "timed out" if reply is None else json.loads(reply)
        if outcome in ("timed out", "too large"):
            self.num_given_up += 1
            log.warning(
                "verify: gave up on %r against %r: %s (%d of %d so far)",
                response[:80], answer[:80], outcome, self.num_given_up, self.num_asked,
            )  # fmt: skip
        return outcome

    def close(self) -> None:
        """Kills the worker, if there is one; the next question starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                assert pipe is not None, "the worker was started with pipes"
                try:
                    pipe.close()
                except BrokenPipeError:  # an unread question dies with its reader
                    pass

    def forget_worker(self) -> None:
        """In a forked child: the worker belongs to the parent, whose answers must not be read here."""
        self._worker = None
        self._lock = threading.Lock()

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "verify: a symbolic answer needs math-verify, which is not installed: pip install math-verify"
            )
        # -P: the current folder must not be on the path, it may hold a `intervals.py` of its own.
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "phimini.stages.verify.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            start_new_session=True,  # Ctrl-C is for the asking process, which closes this one
        )
        # The first line says that sympy is loaded: its seconds are not the first question's.
        if self._read_line(self._worker, _START_SECONDS) is None:
            self.close()
            raise RuntimeError(
                f"verify: the math-verify worker did not start within {_START_SECONDS:.0f} s; its error is above"
            )
        return self._worker

    @staticmethod
    def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """One line from the worker; None when the time is up or the worker has ended."""
        assert worker.stdout is not None, "the worker was started with pipes"
        deadline = time.monotonic() + seconds
        handle, line = worker.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            ready = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]
            piece = os.read(handle, 4096) if ready else b""
            if not piece:
                return None
            line += piece
        return line


shared = SymbolicVerifier()
"""the process's one worker"""
atexit.register(shared.close)
os.register_at_fork(after_in_child=shared.forget_worker)
