"""Dispatch of requests to engine processes: each is answered and counted once, even if an engine dies.

A request has an id, and its seed belongs to it: what it returns does not depend on which engine or which batch it
met. An engine that ends, or says nothing for the deadline, is given up and its requests go to the others. A request
that a weight sync cut short is continued token-in, token-out: its prompt and what it had so far go out again, and
its spans say which tokens came from which weights. Groups may be oversampled: once `group_size`
completions of a group are there, its other requests are aborted.
"""

import contextlib
import dataclasses
import queue
import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from phimini.model.sampler import SamplingParams
from phimini.stages.data.packing import derive
from phimini.stages.rollout.client import EngineClient
from phimini.stages.rollout.engine import Sampled, Span
from phimini.stages.rollout.wire import Message


class RolloutError(RuntimeError):
    """Error: all engines are lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to sample, with its own id and seed."""

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    group: str = ""
    """requests of one group compete to be among its first `group_size`"""


@dataclass(slots=True)
class _Progress:
    """A request and the tokens sampled for it so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[Span] = field(default_factory=list)
    engine: EngineClient | None = None
    parts: int = 0

    def add(self, answer: Message) -> None:
        """Append an engine's answer; spans of the same version that meet become one."""
        start = len(self.tokens)
        self.tokens += answer["tokens"]
        self.logprobs += answer["logprobs"]
        for version, first, end in answer["versions"]:
            span = Span(version, start + first, start + end)
            last = self.versions[-1] if self.versions else None
            if last is not None and last.version == version:
                span = Span(version, self.versions.pop().start, span.end)
            self.versions.append(span)

    def fields(self) -> Message:
        """Return the request as it is sent: tokens that are sampled already are part of the prompt."""
        request, seed = self.request, self.request.seed
        if self.tokens:
            seed = derive(seed, "continued", len(self.tokens))
        left = dataclasses.replace(
            request.params, max_new_tokens=request.params.max_new_tokens - len(self.tokens)
        )
        return {
            "request": f"{request.id}#{self.parts}",
            "prompt": request.prompt + self.tokens,
            "params": dataclasses.asdict(left),
            "seed": seed,
        }


@dataclass(slots=True)
class ServiceReport:
    """Counts of one `run`: requests sent again, continued and aborted."""

    requeued: int = 0
    """requests sent again because their engine went away"""
    continued: int = 0
    """requests cut short by a sync and continued"""
    aborted: int = 0
    """requests whose group was filled without them"""


class RolloutService:
    """Dispatcher of requests to engines; one thread at a time may call `run`.

    deadline_s: silence after which an engine is given up. per_engine: most requests that one engine has at a time.
    """

    def __init__(
        self, engines: Sequence[EngineClient], *, deadline_s: float, per_engine: int
    ) -> None:
        self.engines, self.deadline_s, self.per_engine = list(engines), deadline_s, per_engine
        self.report = ServiceReport()

    @property
    def alive(self) -> list[EngineClient]:
        """Engines that are not lost."""
        return [engine for engine in self.engines if engine.alive]

    def run(
        self, requests: Sequence[Request], *, group_size: int | None = None
    ) -> dict[str, Sampled]:
        """Return each request's completion by id; with `group_size`, those of the first so many of each group.

        Raises RolloutError when no engine is left, RuntimeError for a request that an engine refuses.
        """
        self.report = ServiceReport()
        batch = _Batch(self, requests, group_size)
        while not batch.complete:
            batch.send()
            batch.receive()
            batch.give_up_silent()
        return batch.done


class _Batch:
    def __init__(
        self, service: RolloutService, requests: Sequence[Request], group_size: int | None
    ) -> None:
        self.service, self.group_size = service, group_size
        self.open = {r.id: _Progress(r) for r in requests}
        assert len(self.open) == len(requests), "request ids are unique"
        self.waiting = deque(self.open.values())
        self.done: dict[str, Sampled] = {}
        self.filled: dict[str, int] = defaultdict(int)
        self.load: dict[EngineClient, int] = defaultdict(int)
        self.events: queue.SimpleQueue[tuple[_Progress, EngineClient, Future[Message]]] = (
            queue.SimpleQueue()
        )

    @property
    def complete(self) -> bool:
        """True once every request is answered, or aborted, and no engine works on one."""
        return not self.open and not sum(self.load.values())

    def send(self) -> None:
        """Send waiting requests, each to the engine with the fewest."""
        while self.waiting:
            engines = self.service.alive
            if not engines:
                raise RolloutError(
                    f"no vLLM engine is left; {len(self.open)} of {len(self.open) + len(self.done)} requests "
                    "are unanswered"
                )
            engine = min(engines, key=lambda e: self.load[e])
            if self.load[engine] >= self.service.per_engine:
                return
            progress = self.waiting.popleft()
            try:
                future = engine.ask("generate", **progress.fields())
            except ConnectionError:
                self.waiting.appendleft(progress)
                continue
            progress.engine = engine
            self.load[engine] += 1
            future.add_done_callback(
                lambda future, progress=progress, engine=engine: self.events.put(
                    (progress, engine, future)
                )
            )

    def receive(self) -> None:
        """Wait a moment for an answer and record it."""
        try:
            progress, engine, future = self.events.get(
                timeout=min(0.2, self.service.deadline_s / 4)
            )
        except queue.Empty:
            return
        self.load[engine] -= 1
        progress.engine = None
        progress.parts += 1
        error = future.exception()
        if progress.request.id not in self.open:  # aborted
            if error is not None and not isinstance(error, ConnectionError):
                raise error
            return
        if isinstance(error, ConnectionError):
            print(
                f"phimini: {error}; its request {progress.request.id} goes to another",
                file=sys.stderr,
                flush=True,
            )
            self.service.report.requeued += 1
            self.waiting.append(progress)
            return
        if error is not None:
            raise error
        answer = future.result()
        progress.add(answer)
        full = len(progress.tokens) >= progress.request.params.max_new_tokens
        if answer["finish_reason"] == "abort" and not full:
            self.service.report.continued += 1
            self.waiting.append(progress)
            return
        self.finish(
            progress, "length" if answer["finish_reason"] == "abort" else answer["finish_reason"]
        )

    def give_up_silent(self) -> None:
        """Give up engines that have work and were silent for the deadline; their requests are sent again."""
        for engine in self.service.alive:
            if self.load[engine] and engine.silent_s() > self.service.deadline_s:
                engine.kill(f"silent for {engine.silent_s():.1f} s")

    def finish(self, progress: _Progress, reason) -> None:
        """Record a complete request, and abort the others of its group if the group is full."""
        request = progress.request
        assert request.id not in self.done, f"request {request.id} was answered twice"
        del self.open[request.id]
        self.done[request.id] = Sampled(
            tokens=progress.tokens,
            logprobs=progress.logprobs,
            finish_reason=reason,
            versions=tuple(progress.versions),
        )
        self.filled[request.group] += 1
        if self.group_size is not None and self.filled[request.group] == self.group_size:
            self.abort_group(request.group)

    def abort_group(self, group: str) -> None:
        """Abort the requests of a full group that are still open."""
        others = [p for p in self.open.values() if p.request.group == group]
        self.service.report.aborted += len(others)
        running: dict[EngineClient, list[str]] = defaultdict(list)
        for progress in others:
            del self.open[progress.request.id]
            if progress.engine is not None:
                running[progress.engine].append(f"{progress.request.id}#{progress.parts}")
            else:
                self.waiting.remove(progress)
        for engine, requests in running.items():
            with contextlib.suppress(ConnectionError):  # it is gone, and what it had with it
                engine.ask("cancel", requests=requests)
