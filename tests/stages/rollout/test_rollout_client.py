"""The client of an engine process, against fake engines on a socket: unknown peers, silent ones, dead ones."""

import dataclasses
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from forked_ranks import RankFailure, run_ranks
from rollout_cases import LONG, SAMPLING, SETTINGS, weights
from rollout_processes import BUCKET, requests, until

from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.weight_sync.cpu_transports import ShmTransport
from phimini.parallel.weight_sync.sync import WeightSync
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rollout import separate_vllm as rollout_separate
from phimini.stages.rollout import server as rollout_server
from phimini.stages.rollout.client import EngineClient
from phimini.stages.rollout.dispatch import RolloutError, RolloutService
from phimini.stages.rollout.separate_vllm import SeparateVllm
from phimini.stages.rollout.vllm_settings import engine_settings
from phimini.stages.rollout.wire import encode, receive, split_address


def served(handler: Callable[[socket.socket], None]) -> str:
    """Serve every connection with `handler`; yield the address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=handler, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def mute(connection: socket.socket) -> None:
    time.sleep(300)


def answering(connection: socket.socket) -> None:
    while (message := receive(connection)) is not None:
        time.sleep(0.05)
        done = {"tokens": [9], "logprobs": [-1.0], "finish_reason": "stop", "versions": [[0, 0, 1]]}
        connection.sendall(encode({"id": message["id"], **done}))


def saying(data: bytes) -> Callable[[socket.socket], None]:
    def say(connection: socket.socket) -> None:
        connection.sendall(data)
        time.sleep(300)

    return say


def test_an_engine_that_stopped_reading_is_given_up_at_the_deadline() -> None:
    """Requests fill every buffer between the two, and the caller still waits no longer than its deadline."""
    client = EngineClient(served(mute), name="engine")
    asked = [dataclasses.replace(r, prompt=[200_000] * 20_000) for r in requests(150, SAMPLING)]
    started = time.monotonic()
    service = RolloutService([client], deadline_s=1.0, per_engine=999)
    with pytest.raises(RolloutError, match="150 of 150 requests are unanswered"):
        service.run(asked)
    assert time.monotonic() - started < 20


def test_a_mute_engine_is_given_up_while_another_answers(capfd: pytest.CaptureFixture) -> None:
    """The other engine answers alone, in 4 s for all requests."""
    clients = [EngineClient(served(handler), name="engine") for handler in (answering, mute)]
    service = RolloutService(clients, deadline_s=1.0, per_engine=4)
    assert len(service.run(requests(80, SAMPLING))) == 80
    silent = re.findall(r"silent for ([\d.]+) s; its request", capfd.readouterr().err)
    assert len(silent) == service.report.requeued == 4 and float(silent[0]) < 2.5
    clients[0].close()


def test_what_arrived_unheard_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that was stopped and resumed first reads the heartbeats of that time."""
    monkeypatch.setattr(EngineClient, "_listen", lambda self: None)
    client = EngineClient(served(saying(encode({"beat": 1}))), name="engine")
    client.heard -= 1000
    until(lambda: client.silent_s() < 1, 10)
    mutes = EngineClient(served(mute), name="engine")
    mutes.heard -= 1000
    assert mutes.silent_s() > 999


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\4SSH-", b"\0\0\0\2[]"]
)
def test_a_stranger_at_the_address_is_refused_at_once(data: bytes) -> None:
    client = EngineClient(served(saying(data)), name="engine")
    with pytest.raises(ConnectionError, match="does not speak this protocol"):
        client.hello(LONG, SETTINGS, 60)


@pytest.mark.parametrize("address", ["localhost", ":80", "host:", "host:x", "host:65536", "host:²"])
def test_a_bad_address_is_quoted(address: str) -> None:
    with pytest.raises(ValueError, match="expected host:port, got "):
        split_address(address)


def opened(address: str) -> None:
    run = override(tiny(), ["rollout.engine=vllm", f"rollout.addresses={address}"])
    SeparateVllm(run, LONG, SETTINGS, initialize(Layout(), LONG))


def test_an_address_where_nothing_answers_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    named = rf"ValueError: rollout\.addresses: engine 0 \(127\.0\.0\.1:{port}\): nothing answers"
    with pytest.raises(RankFailure, match=named):
        run_ranks(opened, 1, f"127.0.0.1:{port}")


# --- an engine lost in a sync -----------------------------------------------------------------------
class Losable(FakeEngine):
    """An engine that can be frozen, dead or healthy."""

    alive, silent = True, 0.0

    def silent_s(self) -> float:
        return self.silent

    def kill(self, why: str) -> None:
        self.alive, self.gone = False, True


def synced(lost: tuple[str, ...]) -> tuple[list[str | None], list[bool]]:
    engines: Any = [Losable(f"engine {i}") for i in range(2)]
    for engine, what in zip(engines, lost, strict=True):
        if what == "frozen":
            engine.delay_s["pause"], engine.silent = 300.0, 2.0
        elif what == "dead":
            engine.delay_s["start"] = 0.2
            threading.Timer(0.1, engine.kill, ("dead",)).start()
    rollout_separate.outgoing = lambda *_, **__: iter(weights(1).items())  # pyright: ignore[reportAttributeAccessIssue]
    separate = SeparateVllm.__new__(SeparateVllm)
    separate.settings, separate._world = SETTINGS, initialize(Layout(), LONG)
    separate._service = RolloutService(engines, deadline_s=1.0, per_engine=9)
    separate._sync = WeightSync(
        LONG, ShmTransport(BUCKET), engines, bucket_bytes=BUCKET, deadline_s=1.0
    )
    separate.sync(SimpleNamespace(num_updates=7))  # pyright: ignore[reportArgumentType]
    return [engine.version for engine in engines], [engine.alive for engine in engines]


@pytest.mark.parametrize("what", ["frozen", "dead"])
def test_a_sync_goes_on_without_an_engine_that_is_lost_in_it(what: str) -> None:
    versions, alive = run_ranks(synced, 1, (what, "well"))[0]
    assert versions == [None, "7"] and alive == [False, True]


def test_a_sync_that_loses_every_engine_is_an_error() -> None:
    with pytest.raises(RankFailure, match="WeightSyncError.*phase pause, at engine 0"):
        run_ranks(synced, 1, ("frozen", "frozen"))


# --- processes -------------------------------------------------------------------------------------
def test_an_engine_that_does_not_start_leaves_no_other_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []

    def launch(*_, **__):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
        process.start()
        started.append(process)

        def wait(timeout_s: float) -> int:
            raise RuntimeError("the vLLM engine was not up")

        return process, wait

    monkeypatch.setattr(rollout_separate, "launch_engine", launch)
    run = override(tiny(), ["rollout.num_engines=2"])
    engine = SeparateVllm.__new__(SeparateVllm)
    engine.config, engine.settings = LONG, SETTINGS
    try:
        with pytest.raises(RuntimeError, match="was not up"):
            engine._started(run, None)
        until(lambda: len(started) == 2 and not any(p.is_alive() for p in started), 10)
    finally:
        for process in started:
            process.kill()


def test_an_engine_whose_trainer_died_while_it_imported_ends(tmp_path: Path) -> None:
    said = tmp_path / "said"

    def engine(trainer: int) -> None:
        until(lambda: os.getppid() != trainer)
        rollout_server._Server = lambda *_: said.write_text("served")  # pyright: ignore[reportAttributeAccessIssue]
        rollout_server.run_server(LONG, SETTINGS, "127.0.0.1", 0, lambda port: None, owned=True)
        said.write_text("ended")

    def trainer() -> None:
        context.Process(target=engine, args=(os.getpid(),)).start()
        os.kill(os.getpid(), signal.SIGKILL)

    context = multiprocessing.get_context("fork")
    context.Process(target=trainer).start()
    until(said.exists, 30)
    assert said.read_text() == "ended"


def test_with_cuda_the_core_is_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.is_available, asked before, makes CUDA unusable in a fork; vLLM forks by default."""
    arguments, engine = ModuleType("vllm.engine.arg_utils"), ModuleType("vllm.v1.engine.async_llm")
    made = SimpleNamespace(create_engine_config=lambda: None)
    arguments.AsyncEngineArgs = lambda **_: made  # pyright: ignore[reportAttributeAccessIssue]
    engine.AsyncLLM = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        from_vllm_config=lambda *_, **__: os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
    )
    monkeypatch.setitem(sys.modules, arguments.__name__, arguments)
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    for has_cuda, method in ((True, "spawn"), (False, "fork")):
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has_cuda: has)
        assert rollout_server._start_engine({}) == method


@pytest.mark.parametrize("has_cuda", [False, True], ids=["no-cuda", "cuda"])
def test_an_engine_is_served_with_its_trainer_s_settings(
    has_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a GPU, where a colocated engine sleeps and a served one does not."""
    served: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(rollout_separate, "run_server", lambda *arguments: served.append(arguments))
    rollout_separate.serve(tiny(), LONG, "node7:8765")
    words = ["rollout.engine=vllm", "rollout.placement=separate", "rollout.addresses=node7:8765"]
    run = override(tiny(), words)
    asked = engine_settings(run, LONG, rollout_separate.transport_of(run))
    assert served[0][:4] == (LONG, asked, "node7", 8765)
