"""Scores of answers, by the verifier or by a function of the user's, in worker processes if wanted.

That function is called as `function(question, answer, response, finish_reason)`: the row's question and reference
answer, the decoded text, and "stop" or, for an answer that was cut off, "length". It returns a number.

A worker that is free takes a share of the answers that wait: one message for each would cost more than its verdict. The last
shares are single answers, so that an answer which takes long delays few others.
"""

import multiprocessing
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.util import Finalize
from typing import Any, Literal, NamedTuple

from phimini.model.user_file import function_of
from phimini.parallel.ranks.process import LostWorkerError
from phimini.stages.verify import symbolic, verdict

CHUNK = 8
"""responses that a worker decodes at a time for a log, which needs all of them"""
MOST = 64
"""answers that a worker takes at a time"""


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


Second = Literal["right", "wrong", "undecided"]
"""a second check's verdict on a response"""


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
        self._pool = _Pool(workers, (field, name, decode, rule, os.getpid())) if workers else None
        if self._pool is not None:
            end = self._pool.processes.shutdown
            # A forked rank joins its children before the pool's own hook at exit would end idle workers.
            Finalize(None, end, kwargs={"cancel_futures": True}, exitpriority=100)
            weakref.finalize(self, _end_in_thread, end).atexit = False
        self._thread: Executor | None = None

    def start(self, item: Answered) -> Callable[[], Any]:
        """Give an answer to the workers and return at once; the result, called, waits for the `Score`.

        Without workers that call computes it. It raises ValueError, naming function and question, for a function that raises
        or returns anything else, and LostWorkerError if a worker process died.
        """
        if self._pool is None:
            return lambda: self._checked(_call(self._how, item), item)
        wait = self._pool.ask(item)
        return lambda: self._checked(self._result(wait), item)

    def second(self, item: Answered) -> Callable[[], Second]:
        """Give an answer to the second check (`audit.py`), which has a process of its own; the result waits for its verdict.

        The next free worker asks it; without workers a thread does.
        """
        if self._pool is not None:
            future = self._pool.submit(_second_in_worker, item)
            return lambda: self._result(future.result)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1)
        return self._thread.submit(_second, self._how, item).result

    def reasons(self, items: list[Answered]) -> Callable[[], list[str]]:
        """Give answers, as text, to the next free worker; the result, called, returns the verifier's reason for each verdict.

        Errors as in `start`.
        """
        if self._pool is None:
            return lambda: _reasons(items)
        future = self._pool.submit(_reasons, items)
        return lambda: self._result(future.result)

    def texts(self, responses: Iterable[Any]) -> list[str]:
        """Return the decoded responses, in order. Raises LostWorkerError if a worker process died."""
        if self._pool is None:
            return list(map(self.decode, responses))
        processes = self._pool.processes
        return self._result(
            lambda: list(processes.map(_decode_in_worker, responses, chunksize=CHUNK))
        )

    def _result(self, wait: Callable[[], Any]) -> Any:
        try:
            return wait()
        except BrokenProcessPool as error:
            raise LostWorkerError(self.field, "scores answers") from error

    def _checked(self, value: Any, item: Answered) -> Any:
        if not isinstance(value, _Raised):
            return value
        raise ValueError(
            f"{self.field} {self.name}: expected a finite number for the question {item.question!r:.60}, the function {value.text}"
        )


class _Asked:
    """An answer that waits for a worker or was given to one."""

    __slots__ = ("batch", "item", "place")

    def __init__(self, item: Answered) -> None:
        self.item = item
        self.batch: Future[list[Any]] | None = None
        self.place = 0
        """in its batch"""


class _Pool:
    """Worker processes, and the answers that wait for them. Several threads may ask."""

    def __init__(self, workers: int, started_with: tuple[Any, ...]) -> None:
        self.processes = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=started_with,
        )
        self._workers = workers
        self._free = 2 * workers
        """batches that may be given: a worker that ends one finds the next at hand"""
        self._waiting: deque[_Asked] = deque()
        self._given = threading.Condition()

    def ask(self, item: Answered) -> Callable[[], Any]:
        """Return a function that waits for the result. It raises BrokenProcessPool if a worker died."""
        asked = _Asked(item)
        with self._given:
            self._waiting.append(asked)
            self._give()

        def result() -> Any:
            if asked.batch is None:
                with self._given:
                    self._given.wait_for(lambda: asked.batch is not None)
            assert asked.batch is not None, "waited for"
            return asked.batch.result()[asked.place]

        return result

    def submit(self, function: Callable[..., Any], argument: Any) -> Future[Any]:
        """Return the future of a call in a worker; it fails if one died."""
        try:
            return self.processes.submit(function, argument)
        except RuntimeError as error:  # broken, or the interpreter ends
            future: Future[Any] = Future()
            future.set_exception(error)
            return future

    def _give(self) -> None:
        """Give the workers that are free shares of what waits. The caller has the lock."""
        while self._free and self._waiting:
            size = max(1, min(MOST, len(self._waiting) // (4 * self._workers)))
            batch = [self._waiting.popleft() for _ in range(size)]
            future = self.submit(_call_in_worker, [asked.item for asked in batch])
            for place, asked in enumerate(batch):
                asked.batch, asked.place = future, place
            self._given.notify_all()
            if not future.done():  # a broken pool's are, and a call of `_ended` here would recurse
                self._free -= 1
                future.add_done_callback(self._ended)

    def _ended(self, _: Future[Any]) -> None:
        with self._given:
            self._free += 1
            self._give()


def _end_in_thread(end: Callable[..., None]) -> None:
    """End the pool of a scorer that was collected. The collector may run inside `submit`, which has the pool's lock."""
    threading.Thread(target=end, kwargs={"cancel_futures": True}, daemon=True).start()


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


def _second(how: _How, item: Answered) -> Second:
    if item.finish_reason != "stop":
        return "wrong"
    outcome = symbolic.second.compare(how.decode(item.response), item.answer)
    verdicts: dict[str, Second] = {"equal": "right", "different": "wrong"}
    return verdicts.get(outcome, "undecided")


def _second_in_worker(item: Answered) -> Second:
    return _second(_of_worker, item)


def _call_in_worker(batch: list[Answered]) -> list[Any]:
    return [_call(_of_worker, item) for item in batch]


def _reasons(items: list[Answered]) -> list[str]:
    return [verdict.reason_of(*item) for item in items]


def _decode_in_worker(response: Any) -> str:
    return _of_worker.decode(response)
