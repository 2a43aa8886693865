"""The trainer's client of one engine: HTTP requests in an event loop that a thread of rank 0 runs."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp
import msgspec

from phimini.model.config import ModelConfig
from phimini.stages.rollout.messages import (
    LEASE_HEADER,
    PREFIX,
    Answer,
    Ask,
    Lease,
    Pulse,
    State,
    encode,
)
from phimini.stages.rollout.vllm_settings import SIZES, EngineSettings, vllm_version

T = TypeVar("T")
KEEP_ALIVE_S = 2.0
"""an idle connection is closed after this long: before the server closes it, which takes 5 s"""
PULSE_S = 1.0
CONNECT_S = 5.0


class EventLoop:
    """An asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engines", daemon=True).start()

    def start(self, action: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start a coroutine and return its future."""
        return asyncio.run_coroutine_threadsafe(action, self._loop)

    def run(self, action: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine to its end, or cancel it if this thread is interrupted or the time is up."""
        future = self.start(action)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise


class ServedEngine:
    """A connection to one engine; also a receiver of `WeightSync`.

    deadline_s: silence of the model's process, or of the server, after which the engine is given up. Its requests then fail
    with ConnectionError. process: the engine's process if this run started it.
    """

    def __init__(
        self,
        url: str,
        key: str,
        loop: EventLoop,
        *,
        name: str,
        deadline_s: float,
        process: Any = None,
    ) -> None:
        self.name, self.url, self.process = f"{name} ({url})", url, process
        self.loop, self.deadline_s = loop, deadline_s
        self.lost = ""
        """why it was given up"""
        self.outstanding = 0
        """completions under way"""
        self._headers = {"Authorization": f"Bearer {key}"}
        self._watching: asyncio.Task | None = None
        self._asking: asyncio.Task[bool] | None = None
        self._kept, self._single = loop.run(self._sessions())

    @property
    def alive(self) -> bool:
        """True until the engine is known to be lost."""
        return not self.lost

    def connect(self, config: ModelConfig, settings: EngineSettings, holder: str) -> State:
        """Take the engine's lease for the run `holder` and watch the engine from now on.

        Raises RuntimeError for an engine of another model, other settings, another vLLM or another trainer, for a wrong key
        and for a server that is no engine; ConnectionError if nothing answers.
        """
        return self.loop.run(self._connect(config, settings, holder))

    def call(self, phase: str, info: dict[str, Any]) -> "Future[list[dict[str, Any]]]":
        """Start a phase of a weight sync; the future's result is a row per worker."""
        if self.lost:
            raise ConnectionError(f"{self.name}: {self.lost}")
        return self.loop.start(self._phase(phase, info))

    async def generate(self, ask: Ask) -> Answer:
        """Return a completion. Raises ConnectionError if the engine is lost, RuntimeError if it refuses."""
        self.outstanding += 1
        try:
            for _ in range(3):
                try:
                    body = await self._request("POST", "generate", ask, session=self._kept)
                    return msgspec.msgpack.decode(body, type=Answer)
                except ConnectionError as error:
                    # A kept connection may be closed under a request: only an engine that does not answer is lost.
                    if not await self.answers():
                        raise ConnectionError(f"{self.name}: {self.lost}") from error
                    failed = error
            raise RuntimeError(f"{self.name}: a request failed three times: {failed}")
        finally:
            self.outstanding -= 1

    async def answers(self) -> bool:
        """Return whether the engine is alive, and give it up if not. Calls at the same time share one question."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self.is_heard(self.deadline_s))
        return await asyncio.shield(self._asking)

    async def is_heard(self, within_s: float) -> bool:
        """Return whether the model's process answered within the last `within_s`, and give the engine up if not."""
        for last in (False, True):
            if self.lost:
                break
            try:
                body = await self._request("GET", "ping", timeout_s=self.deadline_s / 2)
                silent_s = msgspec.msgpack.decode(body, type=Pulse).silent_s
                if silent_s <= within_s:
                    return True
                await self.give_up(f"silent for {silent_s:.1f} s")
            except (ConnectionError, RuntimeError) as error:
                # Asked twice: this process may have been stopped itself, and then its clock runs out, too.
                if last:
                    await self.give_up(str(error).removeprefix(f"{self.name}: "))
        return False

    async def give_up(self, why: str) -> None:
        """Give the engine up: its requests fail, and its process ends if this run started it."""
        self.lost = self.lost or why
        if self.process is not None:
            self.process.process.kill()
        await self._kept.close()
        await self._single.close()

    def close(self) -> None:
        """End the connection. An engine that this run started ends; any other waits for its next trainer."""
        self.loop.run(self._disconnect())
        if self.process is not None:
            self.process.close()

    async def _sessions(self) -> tuple[aiohttp.ClientSession, aiohttp.ClientSession]:
        """Return a session that keeps connections, for requests that may be sent again, and one that does not."""
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        single = aiohttp.TCPConnector(limit=0, force_close=True)
        no_limit = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        kept, single = (
            aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=no_limit)
            for connector in (kept, single)
        )
        return kept, single

    async def _connect(self, config: ModelConfig, settings: EngineSettings, holder: str) -> State:
        body = await self._request("GET", "state", timeout_s=self.deadline_s)
        try:
            state = msgspec.msgpack.decode(body, type=State)
        except msgspec.DecodeError as error:
            raise RuntimeError(f"{self.name}: no engine of PhiMini: {error}") from error
        mine = {"config": dataclasses.asdict(config), "settings": dataclasses.asdict(settings)}
        differing = [("vLLM", state.vllm, vllm_version())] + [
            (f"{kind}.{field}", getattr(state, kind).get(field), as_json(value))
            for kind, fields in mine.items()
            for field, value in fields.items()
            if field not in SIZES
        ]
        for field, theirs, ours in differing:
            if theirs != ours:
                raise RuntimeError(
                    f"{self.name}: {field}: the engine has {theirs}, the trainer {ours}"
                )
        answer = await self._request("POST", "lease", Lease(holder), timeout_s=self.deadline_s)
        self._single.headers[LEASE_HEADER] = msgspec.msgpack.decode(answer, type=str)
        self._watching = asyncio.create_task(self._watch())
        return state

    async def _disconnect(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            if self.alive:
                with contextlib.suppress(ConnectionError, RuntimeError):
                    await self._request("DELETE", "lease", timeout_s=CONNECT_S)
        await self.give_up("closed")

    async def _watch(self) -> None:
        """Ask for a sign of life until the engine is lost; that also renews the lease."""
        while await self.answers():
            await asyncio.sleep(min(PULSE_S, self.deadline_s / 4))

    async def _phase(self, phase: str, info: dict[str, Any]) -> list[dict[str, Any]]:
        # `WeightSync` waits with the sync's deadline; without one here a late answer would be taken for a lost engine.
        body = await self._request("POST", f"sync/{phase}", info)
        return msgspec.msgpack.decode(body, type=list[dict[str, Any]])

    async def _request(
        self,
        method: str,
        path: str,
        message: Any = None,
        *,
        timeout_s: float | None = None,
        session: Any = None,
    ) -> bytes:
        body = None if message is None else encode(message)
        limit = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
        try:
            async with (session or self._single).request(
                method,
                f"{self.url}{PREFIX}/{path}",
                data=body,
                timeout=limit,
                allow_redirects=False,
            ) as response:
                data = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise ConnectionError(
                f"{self.name}: nothing answers there: {error.os_error}"
            ) from error
        except TimeoutError as error:
            raise ConnectionError(
                f"{self.name}: no answer within {timeout_s or CONNECT_S:g} s"
            ) from error
        except (aiohttp.ClientError, OSError, RuntimeError) as error:  # RuntimeError: it was closed
            raise ConnectionError(f"{self.name}: {type(error).__name__}: {error}") from error
        if response.status == 200:
            return data
        said = f"HTTP {response.status}: {data[:300].decode(errors='replace')}"
        if response.status == 401:
            said += "; PHIMINI_API_KEY is the key of the engines"
        if response.status == 404:
            said += "; no engine of PhiMini, or vLLM without the plugin phimini: `phimini serve` starts one"
        kind = ConnectionError if response.status >= 500 else RuntimeError
        raise kind(f"{self.name}: {path}: {said}")


def as_json(value: Any) -> Any:
    """Return a setting as it comes back from an engine."""
    return list(value) if isinstance(value, tuple) else value
