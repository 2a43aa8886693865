"""Symbolic answers, compared by math-verify in a process of its own that is killed when its time is up.

math-verify guards itself with SIGALRM, which works in a main thread only, and sympy can spend hours and
gigabytes on one line. A process can always be killed, whichever thread asks and whatever it computes.
This file is both sides: imported, it asks; run as a script, it answers one JSON line per JSON line.
"""

import atexit
import importlib.util
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Literal

CPU_LIMIT_SECONDS = 1.0
"""what one comparison may cost: processor time, so that a verdict does not depend on what else runs"""
_WALL_LIMIT_SECONDS = 20.0
_START_SECONDS = 120.0
_MEMORY_BYTES = 2 << 30

Outcome = Literal["equal", "different", "unreadable", "timed out"]

log = logging.getLogger(__name__)


class SymbolicVerifier:
    """Asks one worker process, started at the first question and again after it had to be killed."""

    def __init__(self, cpu_limit_seconds: float = CPU_LIMIT_SECONDS) -> None:
        self.cpu_limit_seconds = cpu_limit_seconds
        self.num_asked = 0
        self.num_given_up = 0
        """how many comparisons ran out of time or memory; each is also logged"""
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def compare(self, response: str, answer: str) -> Outcome:
        """Whether two LaTeX expressions mean the same. ImportError if math-verify is not installed."""
        with self._lock:
            self.num_asked += 1
            if self._worker is not None and self._worker.poll() is not None:
                self.close()  # it was ended from outside
            worker = self._worker or self._start()
            question = json.dumps([response, answer, self.cpu_limit_seconds]).encode() + b"\n"
            assert worker.stdin is not None, "the worker was started with pipes"
            worker.stdin.write(question)
            worker.stdin.flush()
            reply = self._read_line(worker, _WALL_LIMIT_SECONDS)
            if reply is not None:
                return json.loads(reply)
            self.close()
            self.num_given_up += 1
            log.warning(
                "verify: gave up on %r against %r, the worker ended with %d (%d of %d so far)",
                response[:80], answer[:80], worker.returncode, self.num_given_up, self.num_asked,
            )  # fmt: skip
            return "timed out"

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
        # -P: this file's folder must not be on the path, or `statistics` would mean the one beside it.
        self._worker = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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


def _serve() -> None:
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    logging.disable()  # math-verify warns that its own time limit is off: ours replaces it
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not look like a reply
    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def outcome(response: str, answer: str) -> Outcome:
        expected, got = (
            parse(f"${text}$", extraction_config=latex, parsing_timeout=0)
            for text in (answer, response)
        )
        if not expected or not got:
            return "unreadable"
        if not verify(expected, got, timeout_seconds=0):
            return "different"
        # math-verify takes for zero what is below 1e-15 and rounds to 6 places: all tiny numbers are one.
        x, y = expected[0], got[0]
        if isinstance(x, Expr) and isinstance(y, Expr) and x.is_number and y.is_number:
            size = max(abs(x.evalf()), abs(y.evalf()))
            if size < 1e-3 and abs((x - y).evalf()) > 1e-5 * size:
                return "different"
        return "equal"

    outcome(r"\sqrt{12}", r"2\sqrt{3}")  # parser and sympy load their parts at first use
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        response, answer, limit_seconds = json.loads(line)
        # The kernel ends this process when its time is up, in the middle of whatever sympy computes,
        # and whether or not the asking process still lives.
        signal.setitimer(signal.ITIMER_PROF, limit_seconds)
        try:
            reply: Outcome = outcome(response, answer)
        except (
            MemoryError,
            RecursionError,
            ArithmeticError,
            ValueError,
            TypeError,
            AttributeError,
        ):
            reply = "unreadable"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
