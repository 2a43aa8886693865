"""Scores of answers, by the verifier or by a function of the user's, in worker processes if wanted.

That function is called as `function(question, answer, response, finish_reason)`: the row's question and reference
answer, the decoded text, and "stop" or, for an answer that was cut off, "length". It returns a number.

Answers go to the workers one by one, so that an answer which takes long delays those of its own worker only.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

from phimini.model.user_file import function_of
from phimini.stages.verify import verdict

CHUNK = 8
"""responses that a worker decodes at a time for a log, which needs all of them"""


class Answered(NamedTuple):
    """The arguments of a scoring function."""

    question: str
    answer: str
    response: Any
    """text, or whatever the scorer's `decode` turns into text"""
    finish_reason: str


class Score(NamedTuple):
    """A finite score, and the verifier's reason for it: None for a user's function."""

    value: float
    reason: str | None = None


class Scorer:
    """Scores of answers; `field` and `name` tell errors which setting named the user's function."""

    def __init__(
        self,
        field: str,
        name: str | None = None,
        workers: int = 0,
        decode: Callable[[Any], str] = str,
        rule: Callable[..., Any] | None = None,
    ) -> None:
        """Raises ValueError for a function that cannot be had.

        workers: processes; 0 for this one. rule: a function of ours, by import, whose results of any kind come back as they
        are.
        """
        self.field, self.name, self.decode = field, name, decode
        self._how = _how(field, name, decode, rule)
        self._pool = None
        if workers:
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(field, name, decode, rule, os.getpid()),
            )
            # A forked rank joins its children before the pool's own hook at exit would end idle workers.
            Finalize(self, self._pool.shutdown, kwargs={"cancel_futures": True}, exitpriority=100)

    def start(self, item: Answered) -> Callable[[], Any]:
        """Give an answer to the next free worker and return at once; the result, called, waits for the `Score`.

        Without workers that call computes it. It raises ValueError, naming function and question, for a function that raises
        or returns anything else, and RuntimeError if a worker process died.
        """
        if self._pool is None:
            return lambda: self._checked(_call(self._how, item), item)
        wait = self._begun(_call_in_worker, item)
        return lambda: self._checked(wait(), item)

    def reasons(self, items: list[Answered]) -> Callable[[], list[str]]:
        """Give answers, as text, to the next free worker; the result, called, returns the verifier's reason for each verdict.

        Errors as in `start`.
        """
        return (lambda: _reasons(items)) if self._pool is None else self._begun(_reasons, items)

    def _begun(self, function: Callable[..., Any], argument: Any) -> Callable[[], Any]:
        assert self._pool is not None, "without workers the caller computes"
        try:
            future = self._pool.submit(function, argument)
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
        return lambda: self._result(future.result)

    def texts(self, responses: Iterable[Any]) -> list[str]:
        """Return the decoded responses, in order. Raises RuntimeError if a worker process died."""
        if self._pool is None:
            return list(map(self.decode, responses))
        pool = self._pool
        return self._result(lambda: list(pool.map(_decode_in_worker, responses, chunksize=CHUNK)))

    def _result(self, wait: Callable[[], Any]) -> Any:
        try:
            return wait()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{self.field}: a process that scores answers died; `dmesg` tells whether memory ran out"
            ) from error

    def _checked(self, value: Any, item: Answered) -> Any:
        if not isinstance(value, _Raised):
            return value
        raise ValueError(
            f"{self.field} {self.name}: expected a finite number for the question {item.question!r:.60}, the function {value.text}"
        )


class _Raised(NamedTuple):
    """The failure of a user's function to return a finite number, as text: an exception may fail to pickle."""

    text: str


class _How(NamedTuple):
    """The user's function or, without one, the rule; and the decoding of responses."""

    function: Callable[..., Any] | None = None
    rule: Callable[..., Any] | None = None
    decode: Callable[[Any], str] = str


def _how(
    field: str, name: str | None, decode: Callable[[Any], str], rule: Callable[..., Any] | None
) -> _How:
    return _How(None if name is None else function_of(name, field), rule, decode)


def _call(how: _How, item: Answered) -> Any:
    item = item._replace(response=how.decode(item.response))
    if how.rule and how.function is None:
        return how.rule(*item)
    if how.function is None:
        right = verdict.is_right(*item)
        return Score(float(right), "equal" if right else verdict.reason_of(*item))
    try:
        value = how.function(*item)
    # The user's code may raise any kind of error: `Scorer` raises it again, with question and function.
    except Exception as error:
        return _Raised(f"raised {error!r:.200}")
    is_number = isinstance(value, bool | int | float)
    if not is_number or not -sys.float_info.max <= value <= sys.float_info.max:
        return _Raised(f"returned {value!r:.60}")
    return Score(float(value))


_of_worker = _How()
"""a worker's own"""


def _start_worker(
    field: str,
    name: str | None,
    decode: Callable[[Any], str],
    rule: Callable[..., Any] | None,
    parent: int,
) -> None:
    """Load the function once per process, and end the process with its parent, which may be killed."""
    global _of_worker
    _of_worker = _how(field, name, decode, rule)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call_in_worker(item: Answered) -> Any:
    return _call(_of_worker, item)


def _reasons(items: list[Answered]) -> list[str]:
    return [verdict.reason_of(*item) for item in items]


def _decode_in_worker(response: Any) -> str:
    return _of_worker.decode(response)
