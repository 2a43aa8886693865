"""Scores of answers, by the verifier or by a function of the user's, in worker processes if wanted.

The user's function is called as `function(question, answer, response, finish_reason)`: the row's question and reference
answer, the decoded text, and "stop" or, for an answer that was cut off, "length". It returns a number.
"""

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from phimini.model.user_file import function_of
from phimini.stages.verify.verdict import verify

CHUNKS_PER_WORKER = 8
"""so that a slow answer delays few others"""


class Answered(NamedTuple):
    """The arguments of a scoring function."""

    question: str
    answer: str
    response: str
    finish_reason: str


def is_right(question: str, answer: str, response: str, finish_reason: str) -> bool:
    """Return True for a response that ended by itself, with the reference answer in its last box."""
    return finish_reason == "stop" and verify(response, answer)


class Scorer:
    """Scores of answers in order; `field` and `name` tell errors which setting named the user's function."""

    def __init__(self, field: str, name: str | None = None, workers: int = 0) -> None:
        """Raises ValueError for a function that cannot be had. `workers`: processes; 0 for this one."""
        self.field, self.name = field, name
        self._function = None if name is None else function_of(name, field)
        self._pool, self._workers = None, workers
        if workers:
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(field, name, os.getpid()),
            )

    def scores(self, answered: Sequence[Answered]) -> list[float]:
        """Return a finite number for each answer.

        Raises ValueError, naming function and question, for a function that raises or returns anything else, and
        RuntimeError if a worker process dies.
        """
        if self._pool is None:
            values = [_call(self._function, item) for item in answered]
        else:
            chunk = max(1, len(answered) // (self._workers * CHUNKS_PER_WORKER))
            try:
                values = list(self._pool.map(_call_in_worker, answered, chunksize=chunk))
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"{self.field}: a process that scores answers died; `dmesg` tells whether memory ran out"
                ) from error
        return [self._checked(*pair) for pair in zip(values, answered, strict=True)]

    def _checked(self, value: Any, item: Answered) -> float:
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
        got = value.text if isinstance(value, _Raised) else f"returned {value!r:.60}"
        raise ValueError(
            f"{self.field} {self.name}: expected a finite number for the question {item.question!r:.60}, the function {got}"
        )


class _Raised(NamedTuple):
    """The exception of a user's function: others may not be importable, or fail to pickle."""

    text: str


def _call(function: Callable[..., Any] | None, item: Answered) -> Any:
    if function is None:
        return is_right(*item)
    try:
        value = function(*item)
    except Exception as error:  # the user's own code, which may raise anything
        return _Raised(f"raised {error!r:.200}")
    return value if isinstance(value, bool | int | float) else _Raised(f"returned {value!r:.60}")


_function_of_worker: Callable[..., Any] | None = None


def _start_worker(field: str, name: str | None, parent: int) -> None:
    """Load the function once per process, and end the process with its parent, which may be killed."""
    global _function_of_worker
    if name is not None:
        _function_of_worker = function_of(name, field)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call_in_worker(item: Answered) -> Any:
    return _call(_function_of_worker, item)
