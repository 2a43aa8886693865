"""Waits for engines with a deadline, and the error that names phase, place and tensor of a failed weight sync."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol

Phase = Literal["init", "pause", "start", "gather", "pack", "transfer", "load", "verify", "finish"]


class WeightSyncError(RuntimeError):
    """A weight sync that failed. `where` is a trainer rank or an engine and its worker; `tensor` is the current one.

    `whole` is True if the engines keep their old weights, False if they must not sample, and None if an engine is gone
    and its state unknown.
    """

    def __init__(
        self, phase: str, where: str, tensor: str | None, detail: str, whole: bool | None = None
    ) -> None:
        at = f"tensor {tensor}" if tensor else "no tensor"
        super().__init__(
            f"weight sync failed in phase {phase}, at {where}, {at}: {detail}{_AFTER[whole]}"
        )
        self.phase, self.where, self.tensor, self.detail, self.whole = (
            phase, where, tensor, detail, whole,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.phase, self.where, self.tensor, self.detail, self.whole)

    def fields(self) -> dict[str, Any]:
        """Return the arguments of `WeightSyncError(**fields)`, in JSON's types."""
        return {key: getattr(self, key) for key in ("phase", "where", "tensor", "detail", "whole")}


_AFTER = {
    True: "; the engine keeps its old weights",
    False: "; the engine samples nothing until a sync succeeds",
    None: "",
}


class Receiver(Protocol):
    """The trainer's connection to one engine."""

    @property
    def name(self) -> str:
        """The engine's name in errors."""
        ...

    def call(self, phase: str, info: dict[str, Any]) -> "Future[list[dict[str, Any]]]":
        """Start init, pause, start, update, finish, abort or resume. The future holds each worker's answer, in JSON's types.

        An answer with the key "error" holds the fields of a WeightSyncError. The answer to `finish` has checksums by
        tensor, load_s, verify_s and its part checksum_s. `finish` also resets the prefix cache.
        """
        ...


class Wait:
    """Waits for receivers until the sync's deadline, and tracks the current phase and tensor for errors."""

    def __init__(self, deadline_s: float, where: str) -> None:
        self.where, self.deadline_s = where, deadline_s
        self.end = time.monotonic() + deadline_s
        self.phase: Phase = "init"
        self.tensor: str | None = None

    def at(self, phase: Phase, tensor: str | None = None) -> None:
        """Set the current phase and tensor."""
        self.phase, self.tensor = phase, tensor

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, at least 0.01, so that an answer that has arrived is still read."""
        return max(0.01, self.end - time.monotonic())

    def error(self, detail: str, where: str | None = None) -> WeightSyncError:
        """Return an error at the current phase and tensor."""
        return WeightSyncError(self.phase, where or self.where, self.tensor, detail)

    def call(
        self, receivers: Sequence[Receiver], phase: str, info: dict[str, Any] | None = None
    ) -> list[list[dict[str, Any]]]:
        """Start a phase at every receiver and return the answers. Raises as `answers`."""
        return self.answers(receivers, self.start(receivers, phase, info or {}))

    def start(
        self, receivers: Sequence[Receiver], phase: str, info: dict[str, Any]
    ) -> list[Future]:
        """Start a phase at every receiver. Raises WeightSyncError if an engine is gone."""
        futures = []
        for receiver in receivers:
            try:
                futures.append(receiver.call(phase, info))
            except OSError as error:
                raise self.error(f"the engine is gone: {error}", receiver.name) from error
        return futures

    def answers(
        self, receivers: Sequence[Receiver], futures: Sequence[Future]
    ) -> list[list[dict[str, Any]]]:
        """Return the answers of each receiver's workers. Raises WeightSyncError for an error, a dead engine or the deadline."""
        results = []
        for receiver, future in zip(receivers, futures, strict=True):
            try:
                workers = future.result(self.remaining_s)
            except TimeoutError as error:
                late = f"no answer within {self.deadline_s:g} s"
                raise self.error(late, receiver.name) from error
            except OSError as error:
                raise self.error(f"the engine is gone: {error}", receiver.name) from error
            except RuntimeError as error:
                raise self.error(str(error), receiver.name) from error
            for answer in workers:
                if "error" in answer:
                    fields = answer["error"]
                    raise WeightSyncError(
                        **{**fields, "where": f"{receiver.name}, {fields['where']}"}
                    )
            results.append(workers)
        return results


class Watchdog:
    """Ends this process, and prints the place, when a collective of the gather hangs past the deadline.

    Waits for engines raise at the deadline. A rank that is stuck in a collective because another rank is gone cannot be
    interrupted from Python, so its process has to end.
    """

    grace_s = 5.0

    def __init__(self, wait: Wait) -> None:
        self.wait = wait
        self.timer = threading.Timer(wait.deadline_s + self.grace_s, self._expired)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()

    def _expired(self) -> None:
        hung = self.wait.error(f"hung for {self.wait.deadline_s:g} s")
        print(f"phimini: {hung}", file=sys.stderr, flush=True)
        os._exit(1)


def completed(action: Callable[[], Any]) -> Future:
    """Run `action` now and return its outcome as a future, as the answer of a receiver in this process."""
    future: Future = Future()
    try:
        future.set_result(action())
    except (RuntimeError, OSError, ValueError) as error:
        future.set_exception(error)
    return future
