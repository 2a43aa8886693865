"""Connection of the trainer to one engine process: requests, answers, and the time of the last sign of life."""

import contextlib
import dataclasses
import multiprocessing
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from phimini.model.config import ModelConfig
from phimini.stages.rollout.server import run_server
from phimini.stages.rollout.vllm_settings import EngineSettings, require_vllm
from phimini.stages.rollout.wire import Message, encode, receive, split_address


class EngineClient:
    """A connection to one engine process; also a receiver of `WeightSync`.

    Calls never block: sends are queued, and each call returns a future, on which callers wait with a timeout. All futures
    fail with ConnectionError when the engine is lost.
    """

    def __init__(
        self, address: str, *, name: str, process: Any = None, timeout_s: float = 60.0
    ) -> None:
        self.name = f"{name} ({address})"
        self.process = process
        self.heard = time.monotonic()
        """when the engine last said anything"""
        try:
            self._socket = socket.create_connection(split_address(address), timeout_s)
        except OSError as error:
            raise ConnectionError(f"{self.name}: nothing answers there: {error}") from error
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lock = threading.Lock()
        self._number = 0
        self._futures: dict[int, Future] = {}
        self._gone: str | None = None
        self._unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for action in (self._listen, self._talk):
            threading.Thread(target=action, name=f"{self.name}: {action}", daemon=True).start()

    @property
    def alive(self) -> bool:
        """True until the engine is known to be lost."""
        return self._gone is None

    @property
    def outstanding(self) -> int:
        """Number of calls without an answer."""
        return len(self._futures)

    def silent_s(self) -> float:
        """Return the seconds since the engine last sent anything; it sends a beat every second while its model answers.

        Data that has arrived but was not read yet counts as a sign of life: this process may itself have been stopped.
        """
        arrived = select.poll()
        arrived.register(self._socket, select.POLLIN)
        return 0.0 if arrived.poll(0) else time.monotonic() - self.heard

    def ask(self, op: str, **fields: Any) -> "Future[Message]":
        """Send a request and return the future of its answer. Raises ConnectionError if the engine is lost."""
        future: Future[Message] = Future()
        with self._lock:
            if self._gone is not None:
                raise ConnectionError(f"{self.name}: {self._gone}")
            self._number += 1
            self._futures[self._number] = future
            self._unsent.put(encode({"id": self._number, "op": op, **fields}))
        return future

    def hello(self, config: ModelConfig, settings: EngineSettings, timeout_s: float) -> Message:
        """Return the engine's process ids and version. Raises RuntimeError if it has another model or settings."""
        fields = {"config": dataclasses.asdict(config), "settings": dataclasses.asdict(settings)}
        try:
            return self.ask("hello", **fields).result(timeout_s)
        except TimeoutError as error:
            raise RuntimeError(
                f"{self.name}: no answer within {timeout_s:g} s; has it another trainer?"
            ) from error

    def call(self, phase: str, info: dict[str, Any]) -> "Future[list[dict[str, Any]]]":
        """Send one phase of a weight sync; the future's result is a row per worker."""
        workers: Future[list[dict[str, Any]]] = Future()

        def done(answer: "Future[Message]") -> None:
            error = answer.exception()
            if error is not None:
                workers.set_exception(error)
            else:
                workers.set_result(answer.result()["workers"])

        self.ask("sync", phase=phase, info=info).add_done_callback(done)
        return workers

    def kill(self, why: str) -> None:
        """Give up the engine: its requests fail now, and its process ends if this run started it."""
        self._lose(why)
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """End a connection. An engine that this run started then ends; any other waits for its next trainer."""
        self._lose("closed")
        self._socket.close()
        if self.process is not None:
            self.process.join(10)
            if self.process.is_alive():
                self.process.kill()

    def _listen(self) -> None:
        try:
            while (message := receive(self._socket)) is not None:
                self.heard = time.monotonic()
                self._take(message)
        except ConnectionError as error:
            self._lose(str(error))
        self._lose("the engine process ended")

    def _take(self, message: Message) -> None:
        with self._lock:
            future = self._futures.pop(message.get("id", 0), None)
        if future is None:
            return  # a beat
        if "error" in message:
            future.set_exception(RuntimeError(message["error"]))
        else:
            future.set_result(message)

    def _talk(self) -> None:
        while (data := self._unsent.get()) is not None:
            try:
                self._socket.sendall(data)
            except OSError as error:
                self._lose(str(error))

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._gone is None:
                self._gone = why
            futures, self._futures = list(self._futures.values()), {}
        self._unsent.put(None)
        with contextlib.suppress(OSError):  # it was closed from the other side
            self._socket.shutdown(socket.SHUT_RDWR)
        for future in futures:
            future.set_exception(ConnectionError(f"{self.name}: {self._gone}"))


def launch_engine(
    config: ModelConfig,
    settings: EngineSettings,
    *,
    owned: bool = True,
    devices: str = "",
    context: Any = None,
) -> tuple[Any, Callable[[float], int]]:
    """Start an engine process and return (process, wait), where `wait(seconds)` returns the engine's port.

    The engine starts up while the caller does other things. `wait` raises RuntimeError if it ended or is not up in time.
    """
    require_vllm()
    context = context or multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(
        target=_serve_child, args=(config, settings, owned, devices, sending), daemon=False
    )
    process.start()
    sending.close()

    def wait(timeout_s: float) -> int:
        try:
            if not receiving.poll(timeout_s):
                process.kill()
                raise RuntimeError(f"the vLLM engine was not up within {timeout_s:g} s")
            return receiving.recv()
        except EOFError:
            process.join(10)
            raise RuntimeError(
                f"the vLLM engine ended before it was up, exit code {process.exitcode}; its output says why"
            ) from None
        finally:
            receiving.close()

    return process, wait


def _serve_child(
    config: ModelConfig, settings: EngineSettings, owned: bool, devices: str, sending: Connection
) -> None:
    run_server(config, settings, "127.0.0.1", 0, sending.send, owned=owned, devices=devices)
