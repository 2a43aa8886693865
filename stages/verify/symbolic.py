"""Comparison of symbolic answers by math-verify, or by the second check, in a worker process with a hard time limit.

math-verify limits its time with SIGALRM, which works only in a main thread, and sympy can spend hours and gigabytes
on one line. A process can always be killed, from any thread and during any computation. This module sends questions
to the worker (`worker.py`) and caches the outcomes, so that an answer that exceeds the limit costs it once.
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
"""limit of one comparison, in processor time, so that a verdict does not depend on other load"""
LENIENT_CPU_LIMIT_SECONDS = 5.0
"""lighteval's limit"""
_WALL_LIMIT_SECONDS = 20.0
_START_SECONDS = 120.0
_MAX_REMEMBERED = 20_000
_MAX_REMEMBERED_CHARACTERS = 1000

Outcome = Literal["equal", "different", "unreadable", "timed out", "too large"]

log = logging.getLogger(__name__)


class SymbolicVerifier:
    """Client of one worker process, which is started at the first question and again after a kill.

    rules: the module of this room whose `are_equal` compares: `expressions`, `lenient` or `audit`.
    """

    def __init__(
        self, cpu_limit_seconds: float = CPU_LIMIT_SECONDS, rules: str = "expressions"
    ) -> None:
        self.cpu_limit_seconds, self.rules = cpu_limit_seconds, rules
        self.num_asked = 0
        self.num_given_up = 0
        """number of comparisons that ran out of time or memory; each is also logged"""
        self._remembered: dict[tuple[str, str], Outcome] = {}
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def compare(self, response: str, answer: str) -> Outcome:
        """Compare an expression, or a whole response for lenient rules, with an answer. Raises as `require_math_verify`."""
        with self._lock:
            outcome = self._remembered.get((response, answer))
            if outcome is None:
                outcome = self._ask(response, answer)
                if len(response) > _MAX_REMEMBERED_CHARACTERS:
                    return outcome
                if len(self._remembered) >= _MAX_REMEMBERED:
                    del self._remembered[next(iter(self._remembered))]
                self._remembered[response, answer] = outcome
            return outcome

    def _ask(self, response: str, answer: str) -> Outcome:
        self.num_asked += 1
        if self._worker is not None and self._worker.poll() is not None:
            self.close()  # something else killed it
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
        """Kill the worker, if one runs; the next question starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                assert pipe is not None, "the worker was started with pipes"
                try:
                    pipe.close()
                except BrokenPipeError:  # the question was not read and is lost with the worker
                    pass

    def forget_worker(self) -> None:
        """Drop the worker in a forked child: it belongs to the parent, and a child must not read its answers."""
        self._worker = None
        self._lock = threading.Lock()

    def _start(self) -> subprocess.Popen[bytes]:
        if self.rules != "audit":
            require_math_verify("a symbolic answer")
        # -P keeps the current folder off the path, because it may contain another `intervals.py`.
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "phimini.stages.verify.worker", self.rules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            start_new_session=True,  # Ctrl-C goes to the parent, which closes this worker
        )
        # The worker's first line reports that sympy is loaded, so that loading does not count for the first question.
        if self._read_line(self._worker, _START_SECONDS) is None:
            self.close()
            raise RuntimeError(
                f"verify: the math-verify worker did not start within {_START_SECONDS:.0f} s; its error is above"
            )
        return self._worker

    @staticmethod
    def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """Return one line from the worker; None after the time limit or if the worker has ended."""
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


def require_math_verify(need: str) -> None:
    """Raise ImportError, with `need` as its reason, if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(
            f"verify: {need} needs math-verify, which is not installed: pip install math-verify"
        )


shared = SymbolicVerifier()
"""the worker of this process"""
lenient = SymbolicVerifier(LENIENT_CPU_LIMIT_SECONDS, "lenient")
"""the worker of this process that reads whole responses as lighteval does"""
second = SymbolicVerifier(rules="audit")
"""the worker of this process that checks verdicts a second time"""
for verifier in (shared, lenient, second):
    atexit.register(verifier.close)
    os.register_at_fork(after_in_child=verifier.forget_worker)
