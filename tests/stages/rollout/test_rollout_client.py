"""The client of an engine against fake engines over HTTP: unknown servers, silent ones, dead ones."""

import dataclasses
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoints
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fake_engine import FakeEngine
from forked_ranks import RankFailure, run_ranks
from rollout_cases import LONG, SAMPLING, SETTINGS, weights
from rollout_processes import BUCKET, loop, requests
from vllm_process import find_metadata

from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.weight_sync.cpu_transports import ShmTransport
from phimini.parallel.weight_sync.sync import WeightSync
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rollout import launch, separate_vllm
from phimini.stages.rollout.dispatch import RolloutError, RolloutService
from phimini.stages.rollout.launch import split_url
from phimini.stages.rollout.messages import LOGPROBS, TOKENS, Answer, Pulse, State, as_bytes
from phimini.stages.rollout.separate_vllm import SeparateVllm
from phimini.stages.rollout.served_engine import EventLoop, ServedEngine
from phimini.stages.rollout.vllm_settings import vllm_version

DONE = Answer(as_bytes([9], TOKENS), as_bytes([-1.0], LOGPROBS), "stop", [(0, 0, 1)])
STATE = State(
    vllm_version(), dataclasses.asdict(LONG), dataclasses.asdict(SETTINGS), 1, [2], None, None
)


class FakeServer(ThreadingHTTPServer):
    """An engine's endpoints; `faults` maps an endpoint to what its handler does instead of answering."""

    request_queue_size = 300

    def __init__(self, state: State = STATE) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Any] = {
            "state": state, "lease": "token", "ping": Pulse(0.0, None), "generate": DONE,
        }  # fmt: skip
        self.faults: dict[str, Callable[[Handler], None]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def connect(self, deadline_s: float) -> ServedEngine:
        client = ServedEngine(self.url, "key", loop(), name="engine", deadline_s=60)
        client.connect(LONG, SETTINGS, "tests")
        client.deadline_s = (
            deadline_s  # of what comes next: a busy machine may take longer to connect
        )
        return client


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Any = self.server
        endpoint = self.path.rpartition("/")[2]
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if endpoint in server.faults:
            return server.faults[endpoint](self)
        self.say(200, msgspec.msgpack.encode(server.answers[endpoint]))

    do_POST = do_DELETE = do_GET

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def mute(handler: Handler) -> None:
    time.sleep(300)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def saying(data: bytes) -> str:
    """Serve every connection with the same bytes; return the address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_engine_that_falls_mute_is_given_up_at_the_deadline() -> None:
    server = FakeServer()
    client = server.connect(1.0)
    server.faults = {"generate": mute, "ping": mute}
    started = time.monotonic()
    service = RolloutService([client], per_engine=99)
    with pytest.raises(RolloutError, match="150 of 150 requests are unanswered"):
        service.run(requests(150, SAMPLING))
    assert time.monotonic() - started < 100  # it would be mute for 300 s


def test_a_hung_engine_is_given_up_while_another_answers(capfd: pytest.CaptureFixture) -> None:
    """Its server still answers, as vLLM's /health does, but says that its model is silent."""
    servers = [FakeServer(), FakeServer()]
    clients = [server.connect(1.0) for server in servers]
    asked: list[Handler] = []

    def hang(handler: Handler) -> None:
        asked.append(handler)
        if len(asked) == 4:  # not before: the client's own pings would give the engine up
            servers[1].answers["ping"] = Pulse(1.5, None)
        mute(handler)

    servers[1].faults["generate"] = hang
    service = RolloutService(clients, per_engine=4)
    assert len(service.run(requests(80, SAMPLING))) == 80
    silent = re.findall(r"silent for ([\d.]+) s; its request", capfd.readouterr().err)
    assert len(silent) == service.report.requeued == 4 and float(silent[0]) == 1.5
    clients[0].close()


def test_a_dead_engine_s_requests_go_to_another() -> None:
    servers = [FakeServer(), FakeServer()]
    clients = [server.connect(5.0) for server in servers]

    def die(handler: Handler) -> None:
        servers[1].faults["ping"] = hang_up  # not before: the client's own pings would give it up
        hang_up(handler)

    servers[1].faults["generate"] = die
    service = RolloutService(clients, per_engine=4)
    assert len(service.run(requests(80, SAMPLING))) == 80
    assert service.alive == clients[:1] and 1 <= service.report.requeued <= 4
    clients[0].close()


def test_a_kept_connection_that_the_server_closes_is_no_dead_engine() -> None:
    server = FakeServer()
    client = server.connect(5.0)
    closed: list[Handler] = []

    def first_one_hangs_up(handler: Handler) -> None:
        closed.append(handler)
        hang_up(handler) if len(closed) == 1 else handler.say(200, msgspec.msgpack.encode(DONE))

    server.faults["generate"] = first_one_hangs_up
    service = RolloutService([client], per_engine=1)
    assert len(service.run(requests(3, SAMPLING))) == 3 and len(closed) == 4
    assert client.alive and service.report.requeued == 0
    client.close()


def test_a_trainer_that_was_stopped_itself_gives_no_engine_up() -> None:
    """All its clocks run out at once when it is resumed, and every answer is still unread."""
    server = FakeServer()
    client = ServedEngine(server.url, "key", EventLoop(), name="engine", deadline_s=60)
    asked = threading.Event()

    def slowly(handler: Handler) -> None:
        asked.set()
        time.sleep(0.2)
        handler.say(200, msgspec.msgpack.encode(Pulse(0.0, None)))

    async def stopped() -> None:
        time.sleep(1.5)

    client.connect(LONG, SETTINGS, "tests")
    client.deadline_s, server.faults["ping"] = 1.0, slowly
    assert asked.wait(10), "a question is under way"
    client.loop.run(stopped())
    time.sleep(1.0)
    assert client.alive
    client.close()


@pytest.mark.parametrize(
    "data, said",
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "Bad status line|Expected HTTP"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "no engine of PhiMini, or vLLM without the plugin"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>", "no engine of PhiMini"),
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", "PHIMINI_API_KEY is the key of the engines"),
        (b"HTTP/1.1 302 Found\r\nlocation: /a\r\ncontent-length: 0\r\n\r\n", "HTTP 302"),
    ],
    ids=["ssh", "404", "html", "401", "302"],
)  # fmt: skip
def test_a_stranger_at_the_address_is_refused_at_once(data: bytes, said: str) -> None:
    client = ServedEngine(saying(data), "key", loop(), name="engine", deadline_s=60)
    with pytest.raises((ConnectionError, RuntimeError), match=rf"engine \(http://.*({said})"):
        client.connect(LONG, SETTINGS, "tests")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"vllm": "0.99.0"}, "vLLM: the engine has 0.99.0, the trainer 0"),
        ({"config": STATE.config | {"num_layers": 9}}, "config.num_layers: the engine has 9, the trainer 2"),
        ({"settings": STATE.settings | {"dtype": "x"}}, "settings.dtype: the engine has x, the trainer float32"),
    ],
    ids=["vllm", "model", "settings"],
)  # fmt: skip
def test_an_engine_of_another_kind_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    server = FakeServer(msgspec.structs.replace(STATE, **change))
    with pytest.raises(RuntimeError, match=said):
        server.connect(5.0)


@pytest.mark.parametrize(
    "address", ["localhost:80", "http://:80", "http://host", "http://host:x", "ftp://host:1", "http://host:65536", "http://host:1/a", "http://host:²"],
)  # fmt: skip
def test_a_bad_address_is_quoted(address: str) -> None:
    with pytest.raises(ValueError, match="rollout.addresses: expected http://HOST:PORT, got "):
        split_url("rollout.addresses", address)


def opened(address: str) -> None:
    run = override(tiny(), ["rollout.engine=vllm", f"rollout.addresses={address}"])
    SeparateVllm(run, LONG, SETTINGS, initialize(Layout(), LONG))


def test_an_address_where_nothing_answers_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    named = rf"ValueError: rollout\.addresses: engine 0 \({url}\): nothing answers"
    with pytest.raises(RankFailure, match=named):
        run_ranks(opened, 1, url)


def test_engines_elsewhere_need_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.KEY)
    with pytest.raises(RankFailure, match="rollout.addresses: the environment variable PHIMINI_API_KEY is not set"):  # fmt: skip
        run_ranks(opened, 1, "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="serve: the environment variable PHIMINI_API_KEY is not"):
        launch.serve(tiny(), LONG, "127.0.0.1:1")


def test_a_plugin_that_is_not_installed_is_named_before_an_engine_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM itself would start without it, and sample random weights."""
    monkeypatch.setattr(launch, "entry_points", lambda group: EntryPoints())
    monkeypatch.setattr(launch, "start", None)
    with pytest.raises(ValueError, match="phimini is not installed as a plugin of `vllm serve`"):
        launch.EngineProcess(LONG, SETTINGS, "key")


def test_an_engine_that_could_not_load_the_plugin_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    server.faults["state"] = lambda handler: handler.say(404, b"")
    process = subprocess.Popen(["sleep", "300"])
    find_metadata()
    monkeypatch.setattr(launch, "start", lambda *_: process)
    engine = launch.EngineProcess(LONG, SETTINGS, "key", port=server.server_port)
    with pytest.raises(RuntimeError, match="did not load the plugin phimini"):
        engine.wait(5)
    assert process.poll() is not None


# --- an engine lost in a sync -----------------------------------------------------------------------
class Losable(FakeEngine):
    """An engine that can be frozen, dead or healthy."""

    alive, frozen, deadline_s = True, False, 1.0

    async def is_heard(self, within_s: float) -> bool:
        self.alive = self.alive and not self.frozen
        return self.alive

    def die(self) -> None:
        self.alive, self.gone = False, True


def synced(lost: tuple[str, ...]) -> tuple[list[str | None], list[bool]]:
    engines: Any = [Losable(f"engine {i}") for i in range(2)]
    for engine, what in zip(engines, lost, strict=True):
        engine.loop = loop()
        if what == "frozen":
            engine.delay_s["pause"], engine.frozen = 300.0, True
        elif what == "dead":
            engine.delay_s["start"] = 0.2
            threading.Timer(0.1, engine.die).start()
    separate_vllm.outgoing = lambda *_, **__: iter(weights(1).items())  # pyright: ignore[reportAttributeAccessIssue]
    separate = SeparateVllm.__new__(SeparateVllm)
    separate.settings, separate._world = SETTINGS, initialize(Layout(), LONG)
    separate._service = RolloutService(engines, per_engine=9)
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
