"""Engine processes for tests, and requests to them."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rollout_cases import (
    LONG,
    SETTINGS,
    logprobs,
    move,
    parity,
    prompts,
    reference,
    trainer,
    weights,
)
from torch import Tensor
from vllm_process import ForkedServer, find_metadata

from phimini.model.config import ModelConfig
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.weight_sync.cpu_transports import GlooTransport, ShmTransport
from phimini.parallel.weight_sync.sync import SyncReport, WeightSync
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rollout import launch
from phimini.stages.rollout.dispatch import Request
from phimini.stages.rollout.engine import Sampled
from phimini.stages.rollout.separate_vllm import SeparateVllm
from phimini.stages.rollout.served_engine import EventLoop, ServedEngine
from phimini.stages.rollout.vllm_settings import EngineSettings

BUCKET = 1 << 19
LONG_ANSWERS = SamplingParams(temperature=0.9, max_new_tokens=200, stop_ids=())


os.environ.setdefault(launch.KEY, "sesame")


def loop() -> EventLoop:
    """Return this process's event loop: its thread does not survive a fork."""
    return _loop_of(os.getpid())


@cache
def _loop_of(process: int) -> EventLoop:
    return EventLoop()


class Engine:
    """A running engine: its address and its processes."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        self.settings = dataclasses.replace(SETTINGS, transport=name, **settings)
        find_metadata()
        with patch.object(launch, "start", ForkedServer):
            self.server = launch.EngineProcess(LONG, self.settings, os.environ[launch.KEY])
        self.address = self.server.url
        self.core = 0

    def connect(self, deadline_s: float = 30.0, holder: str = "tests") -> ServedEngine:
        client = ServedEngine(
            self.address, self.server.key, loop(), name=f"engine {self.name}", deadline_s=deadline_s
        )
        self.core = client.connect(LONG, self.settings, holder).workers[0]
        return client

    def sync(
        self, client: ServedEngine, deadline_s: float = 30.0, pause: str = "keep"
    ) -> WeightSync:
        make = ShmTransport if self.name == "shm" else GlooTransport
        return WeightSync(
            LONG, make(BUCKET), [client], bucket_bytes=BUCKET, deadline_s=deadline_s, pause=pause
        )

    def give(self, client: ServedEngine, seed: int, **options: Any) -> SyncReport:
        """Sync weights `seed` as version `seed`."""
        return self.sync(client, **options).sync(iter(weights(seed).items()), seed)


def from_trainer(
    layout: Layout, address: str, settings: EngineSettings, config: ModelConfig = LONG
) -> list[dict[str, Any]]:
    """Return, in a rank of a trainer, the parity with the engine at `address` after each of two syncs."""
    model = trainer(config, layout, 1)
    words = [
        "rollout.engine=vllm",
        f"rollout.addresses={address}",
        "rollout.deadline_s=60",
        "out=tests",
    ]
    engine = SeparateVllm(override(tiny(), words), config, settings, model.world)
    engine.sync(model)
    results = [parity(engine, model, 1)]
    move(model, 2)
    engine.sync(model)
    results.append(parity(engine, model, 2))
    engine.close()
    return results


def fork_engines() -> None:
    """Let this process, which has imported vLLM, start engines by a fork of itself."""
    launch.start = partial(ForkedServer, here=True)


def done_at_once(path: str) -> None:
    """Run a trainer that starts an engine, writes its process id and ends."""
    run = override(tiny(), ["rollout.engine=vllm", "rollout.deadline_s=60"])
    world = initialize(Layout(), LONG, seed=0)
    fork_engines()
    engine = SeparateVllm(run, LONG, dataclasses.replace(SETTINGS, transport="shm"), world)
    Path(path).write_text(str(engine.service.engines[0].process.process.pid))
    world.close()


def requests(number: int, params: SamplingParams, groups: int = 1) -> list[Request]:
    asked = prompts([3 + i % 40 for i in range(number)], seed=7)
    return [
        Request(id=f"r{i}", prompt=p, params=params, seed=1000 + i, group=str(i % groups))
        for i, p in enumerate(asked)
    ]


def in_thread(action) -> tuple[threading.Thread, list[Any]]:
    box: list[Any] = []
    thread = threading.Thread(target=lambda: box.append(action()), daemon=True)
    thread.start()
    return thread, box


def span_differences(asked: list[Request], done: dict[str, Sampled]) -> float:
    """Return max |log-prob - log-prob of the weights that the span names|."""
    models = {v: reference(LONG, v) for c in done.values() for v in {s.version for s in c.versions}}
    worst = 0.0
    for request in asked:
        c = done[request.id]
        assert c.versions[0].start == 0 and c.versions[-1].end == len(c.tokens)
        for span in c.versions:
            expected = logprobs(
                models[span.version], request.prompt, c.tokens, request.params.temperature
            )
            got = torch.tensor(c.logprobs)
            part = slice(span.start, span.end)
            worst = max(worst, (expected[part] - got[part]).abs().max().item())
    return worst


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(1e-3)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def slowly(seed: int, seconds: float, after: int) -> Iterator[tuple[str, Tensor]]:
    for i, pair in enumerate(weights(seed).items()):
        if i == after:
            time.sleep(seconds)
        yield pair
