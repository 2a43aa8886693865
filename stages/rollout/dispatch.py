"""Dispatch of requests to engines: each is answered and counted once, even if an engine dies.

A request has an id, and its seed belongs to it: its completion does not depend on the engine or the batch that it
meets. An engine that ends, or is silent for the deadline, is given up and its requests go to the others. A request
that a weight sync cut short is continued token-in, token-out: its prompt and its tokens so far go out again, and
its spans say which tokens came from which weights. Groups may be oversampled: once as many
completions of a group are there as are wanted, its other requests are aborted.
"""

import asyncio
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from phimini.model.sampler import SamplingParams
from phimini.stages.data.packing import derive
from phimini.stages.rollout.engine import Sampled, Span
from phimini.stages.rollout.messages import LOGPROBS, TOKENS, Answer, Ask, as_bytes
from phimini.stages.rollout.served_engine import ServedEngine


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
    """requests of one group compete to be among its first"""


@dataclass(slots=True)
class Progress:
    """A request and the tokens sampled for it so far."""

    request: Request
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, TOKENS))
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, LOGPROBS))
    versions: list[Span] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Number of tokens that may still come."""
        return self.request.params.max_new_tokens - len(self.tokens)

    def add(self, answer: Answer) -> None:
        """Append an engine's answer; spans of the same version that meet become one."""
        start = len(self.tokens)
        tokens = np.frombuffer(answer.tokens, TOKENS)
        logprobs = np.frombuffer(answer.logprobs, LOGPROBS)
        if start:  # else the message's memory serves
            tokens, logprobs = np.append(self.tokens, tokens), np.append(self.logprobs, logprobs)
        self.tokens, self.logprobs = tokens, logprobs
        for version, first, end in answer.versions:
            span = Span(version, start + first, start + end)
            last = self.versions[-1] if self.versions else None
            if last is not None and last.version == version:
                span = Span(version, self.versions.pop().start, span.end)
            self.versions.append(span)

    def completion(self, finish_reason) -> Sampled:
        """Return the request's completion, which is whole."""
        versions = tuple(self.versions)
        return Sampled(
            tokens=self.tokens,
            logprobs=self.logprobs,
            finish_reason=finish_reason,
            versions=versions,
        )

    def ask(self) -> Ask:
        """Return the request as it is sent: tokens that are sampled already are part of the prompt."""
        request, seed = self.request, self.request.seed
        if len(self.tokens):
            seed = derive(seed, "continued", len(self.tokens))
        params = dataclasses.replace(request.params, max_new_tokens=self.left)
        prompt = as_bytes(request.prompt, TOKENS) + as_bytes(self.tokens, TOKENS)
        return Ask(prompt, params, seed)


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

    per_engine: most requests that one engine has at a time.
    """

    def __init__(self, engines: Sequence[ServedEngine], *, per_engine: int) -> None:
        self.engines, self.per_engine = list(engines), per_engine
        self.report = ServiceReport()

    @property
    def alive(self) -> list[ServedEngine]:
        """Engines that are not lost."""
        return [engine for engine in self.engines if engine.alive]

    def run(
        self,
        requests: Sequence[Request],
        *,
        sizes: Mapping[str, int] = MappingProxyType({}),
        arrived: Callable[[str, Sampled], None] = lambda id, completion: None,
    ) -> dict[str, Sampled]:
        """Return each request's completion by id; of a group in `sizes`, those of the first so many.

        arrived: called with each id and completion, in the thread of the connections. Raises RolloutError when no engine is left, RuntimeError for a request that an engine refuses.
        """
        self.report = ServiceReport()
        return self.engines[0].loop.run(_Batch(self, requests, sizes, arrived).run())


class _Batch:
    def __init__(
        self,
        service: RolloutService,
        requests: Sequence[Request],
        sizes: Mapping[str, int],
        arrived: Callable[[str, Sampled], None],
    ) -> None:
        self.service, self.sizes, self.requests = service, sizes, requests
        self.arrived = arrived
        self.done: dict[str, Sampled] = {}
        self.filled: dict[str, int] = defaultdict(int)
        self.load: dict[ServedEngine, int] = defaultdict(int)
        self.room = asyncio.Semaphore(service.per_engine * max(1, len(service.alive)))

    async def run(self) -> dict[str, Sampled]:
        """Return the completions by id."""
        self.tasks = {r.id: asyncio.create_task(self.complete(r)) for r in self.requests}
        assert len(self.tasks) == len(self.requests), "request ids are unique"
        tasks = self.tasks.values()
        try:
            # The requests of full groups are cancelled, which is no error.
            ended = (
                (await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))[0] if tasks else ()
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in ended:
            if not task.cancelled():
                task.result()
        return self.done

    async def complete(self, request: Request) -> None:
        """Bring one request to its end, through as many engines and parts as it takes."""
        progress, reason = Progress(request), "abort"
        while reason == "abort" and progress.left:
            async with self.room:
                engine = self.least_loaded()
                self.load[engine] += 1
                try:
                    answer = await engine.generate(progress.ask())
                except ConnectionError as error:
                    print(f"phimini: {error}; its request {request.id} goes to another", file=sys.stderr, flush=True)  # fmt: skip
                    self.service.report.requeued += 1
                    continue
                finally:
                    self.load[engine] -= 1
            progress.add(answer)
            reason = answer.finish_reason
            self.service.report.continued += reason == "abort" and progress.left > 0
        self.finish(progress, "stop" if reason == "stop" else "length")

    def least_loaded(self) -> ServedEngine:
        """Return the engine with the fewest requests."""
        engines = self.service.alive
        if not engines:
            unanswered = len(self.tasks) - len(self.done) - self.service.report.aborted
            raise RolloutError(
                f"no vLLM engine is left; {unanswered} of {len(self.tasks)} requests are unanswered"
            )
        return min(engines, key=lambda engine: self.load[engine])

    def finish(self, progress: Progress, reason) -> None:
        """Record a complete request, and abort the others of its group if the group is full."""
        request = progress.request
        assert request.id not in self.done, f"request {request.id} was answered twice"
        self.done[request.id] = completion = progress.completion(reason)
        self.arrived(request.id, completion)
        self.filled[request.group] += 1
        if self.filled[request.group] == self.sizes.get(request.group):
            others = [
                r.id for r in self.requests if r.group == request.group and r.id not in self.done
            ]
            self.service.report.aborted += len(others)
            for id in others:
                self.tasks[id].cancel()  # a connection that ends aborts its request
