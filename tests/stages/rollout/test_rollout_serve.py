"""`phimini serve`: the command itself, started cold, its trainers, and strangers who find its port."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from forked_ranks import run_ranks
from rollout_cases import LONG, SAMPLING, assert_parity, weights
from rollout_processes import Engine, from_trainer, is_running, loop, requests, until
from vllm_process import find_metadata

from phimini.model.config import ModelConfig
from phimini.model.io.chat import TEMPLATES
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.weight_sync.cpu_transports import ShmTransport
from phimini.parallel.weight_sync.sync import WeightSync
from phimini.stages.base import base_config
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.rollout.dispatch import RolloutService
from phimini.stages.rollout.launch import KEY, free_port, transport_of
from phimini.stages.rollout.messages import TOKENS, Ask, as_bytes
from phimini.stages.rollout.served_engine import ServedEngine
from phimini.stages.rollout.vllm_settings import EngineSettings, engine_settings

pytestmark = pytest.mark.vllm
WORDS = ["rollout.engine=vllm", "rollout.max_batch=16", "rollout.transport=shm"]
PEOPLE = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
"""vLLM's endpoints that are open while the weights are whole"""
SHUT = (
    "/inference/v1/generate", "/invocations", "/pooling", "/v1/embeddings", "/v1/score", "/v1/audio/transcriptions",
    "/v1/chat/completions/render", "/v1/load_lora_adapter", "/pause", "/resume", "/collective_rpc", "/update_weights",
    "/abort_requests", "/scale_elastic_ep", "/v1/responses/x/cancel", "/docs", "/openapi.json", "/tokenize", "/v1/realtime",
)  # fmt: skip


class Served:
    """A running command, and requests to it."""

    def __init__(self, folder: Path) -> None:
        find_metadata()
        tokenizer = train_tiny_tokenizer(["What is 1 + 1?"] * 9, vocab_size=256)
        (folder / "run" / "base" / "model").mkdir(parents=True)
        tokenizer.save(folder / "run" / "base" / "model", chat_template=TEMPLATES["instruct"])
        self.out, self.output = f"out={folder / 'run'}", folder / "output"
        port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{port}"
        path = os.pathsep.join(path for path in sys.path if path)
        command = [
            sys.executable,
            "-P",
            "-W",
            "ignore",
            "-m",
            "phimini.stages.cli",
            "serve",
            "tiny",
        ]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, f"address=127.0.0.1:{port}", self.out, *WORDS],
                env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path},
                stdout=output, stderr=output,
            )  # fmt: skip

    def said(self) -> str:
        return self.output.read_text()

    def run(self, *more: str) -> tuple[RunConfig, ModelConfig, EngineSettings]:
        run = override(tiny(), [*WORDS, f"rollout.addresses={self.url}", *more])
        config = base_config(run)
        return run, config, engine_settings(run, config, transport_of(run))

    def client(self, deadline_s: float = 60.0) -> ServedEngine:
        return ServedEngine(self.url, os.environ[KEY], loop(), name="engine", deadline_s=deadline_s)

    def ask(self, path: str, body: Any = None, key: str | None = None) -> tuple[int, bytes]:
        """Return the status and body of a request: a GET without a body, which is JSON unless it is bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json"}
        )
        request.add_header("Authorization", f"Bearer {os.environ[KEY] if key is None else key}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("serve"))
    try:
        until(lambda: served.process.poll() is not None or "weights by" in served.said(), 300)
        assert served.process.poll() is None, served.said()
        yield served
    finally:
        served.process.kill()
        served.process.wait(10)


def test_it_prints_its_command_without_the_key(served: Served) -> None:
    command = re.search(r"VLLM_PLUGINS=phimini VLLM_API_KEY=\$PHIMINI_API_KEY vllm serve (.*)", served.said())  # fmt: skip
    assert command and "--load-format dummy" in command[1], served.said()
    assert os.environ[KEY] not in served.said()


# --- before a sync, and strangers --------------------------------------------------------------------
def test_nothing_is_sampled_before_the_first_sync(served: Served) -> None:
    """Not by any of vLLM's endpoints either, whose weights are random."""
    for path in PEOPLE:
        assert served.ask(path, {})[0] == 409, path
    for path in SHUT:
        assert served.ask(path, {})[0] == served.ask(path)[0] == 404, path
    config, settings = served.run()[1:]
    client = served.client()
    client.connect(config, settings, "a run")
    ask = msgspec.msgpack.encode(Ask(as_bytes([1, 2], TOKENS), SAMPLING, 0))
    assert (
        served.ask("/phimini/generate", ask)[0] == 409
    )  # in time: the paused engine would wait for ever
    with pytest.raises(RuntimeError, match="no whole set of weights; a sync comes first"):
        RolloutService([client], per_engine=9).run(requests(2, SAMPLING))
    client.close()


def test_without_the_key_every_path_is_shut(served: Served) -> None:
    paths = ("state", "ping", "generate", "lease", "sync/init", "sync/resume", "sync/abort")
    reading = ("/health", "/metrics", "/v1/models", "/version", "/load")
    for path in [f"/phimini/{name}" for name in paths] + [*reading, *PEOPLE, *SHUT]:
        for key in ("", "x", os.environ[KEY] + "x"):
            assert served.ask(path, b"", key)[0] == served.ask(path, None, key)[0] == 401, path
    for path in reading:
        assert served.ask(path)[0] == 200


def test_it_listens_at_the_given_host_only(served: Served) -> None:
    processes = psutil.Process(served.process.pid).children(recursive=True)
    sockets = [c for p in processes for c in p.net_connections(kind="inet") if c.status == "LISTEN"]
    assert len(sockets) > 1 and {c.laddr.ip for c in sockets} == {"127.0.0.1"}, sockets


def test_no_one_syncs_without_the_lease(served: Served) -> None:
    for phase in ("init", "pause", "start", "update", "finish", "abort", "resume"):
        status, said = served.ask(f"/phimini/sync/{phase}", msgspec.msgpack.encode({}))
        assert status == 409 and b"another trainer has the engine's lease" in said


def test_a_stranger_s_connections_keep_no_trainer_waiting(served: Served) -> None:
    """Silent ones, ones that promise a large body, and ones that send half a head are closed."""
    host, port = "127.0.0.1", int(served.url.rpartition(":")[2])
    strangers = [socket.create_connection((host, port)) for _ in range(300)]
    for stranger in strangers[100:200]:
        stranger.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n")
    for stranger in strangers[200:]:
        stranger.sendall(b"POST /phimini/lease HTTP/1.1\r\ncontent-length: 200000000\r\n\r\nx")
    for garbage in (b"\0" * 5000, b"GET / HTTP/9\r\n\r\n", b"\xff" * 10, b"[" * 100_000):
        with socket.create_connection((host, port)) as stranger:
            stranger.sendall(garbage)
    config, settings = served.run()[1:]
    started = time.monotonic()
    client = served.client()
    client.connect(config, settings, "a run")
    assert time.monotonic() - started < 10
    client.close()
    for stranger in strangers:
        stranger.settimeout(40)
        while stranger.recv(1000):
            pass
        stranger.close()


# --- trainers --------------------------------------------------------------------------------------
def test_a_trainer_with_the_same_recipe_samples_from_what_is_served(served: Served) -> None:
    _, config, settings = served.run()
    results = run_ranks(from_trainer, 1, Layout(), served.url, settings, config, timeout_s=240)[0]
    assert_parity(results[0], 0)
    assert_parity(results[1], 1)


def test_after_a_sync_a_person_can_chat_with_the_policy(served: Served) -> None:
    question = {"messages": [{"role": "user", "content": "What is 1 + 1?"}], "max_tokens": 4}
    status, said = served.ask("/v1/chat/completions", {"model": "policy", **question})
    answer = json.loads(said)
    assert status == 200 and answer["usage"]["completion_tokens"] >= 1, said
    prompt = {"model": "policy", "prompt": [9, 10], "max_tokens": 3, "ignore_eos": True}
    status, said = served.ask("/v1/completions", prompt)
    assert status == 200 and json.loads(said)["usage"]["completion_tokens"] == 3, said
    for path in SHUT:
        assert served.ask(path, {})[0] == 404, path


def test_of_two_trainers_the_second_is_refused_while_the_first_lives(served: Served) -> None:
    _, config, settings = served.run()
    first, second = served.client(), served.client()
    first.connect(config, settings, "runs/first")
    with pytest.raises(RuntimeError, match="has another trainer, of the run runs/first, heard"):
        second.connect(config, settings, "runs/second")
    again = served.client()
    again.connect(config, settings, "runs/first")  # the first, started again after a crash
    with pytest.raises(RuntimeError, match="another trainer has the engine's lease"):
        first.call("pause", {}).result(10)
    until(lambda: not first.alive, 20)
    again.close()
    second.connect(config, settings, "runs/second")
    second.close()


def test_a_trainer_with_another_recipe_is_refused_by_name(served: Served) -> None:
    _, config, settings = served.run("rollout.max_model_len=128")
    client = served.client()
    with pytest.raises(RuntimeError, match=r"settings\.max_model_len: the engine has 256, .* 128"):
        client.connect(config, settings, "a run")
    client.close()


def test_an_engine_on_another_gpu_may_hold_another_number_of_sequences(served: Served) -> None:
    _, config, settings = served.run("rollout.max_batch=8")
    client = served.client()
    client.connect(config, settings, "runs/first")  # which has the lease, or had it last
    client.close()


PARAMS = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "stop_ids": [1]}
PROMPT = as_bytes([5], TOKENS)
BAD: dict[str, Any] = {
    "no message": b"\xc1", "empty": b"", "a list": [1], "no prompt": {"params": PARAMS, "seed": 1},
    "text": {"prompt": "abc", "params": PARAMS, "seed": 1}, "half a token": {"prompt": b"abc", "params": PARAMS, "seed": 1},
    "no token": {"prompt": b"", "params": PARAMS, "seed": 1},
    "no such token": {"prompt": as_bytes([10**9], TOKENS), "params": PARAMS, "seed": 1},
    "negative": {"prompt": as_bytes([-5], TOKENS), "params": PARAMS, "seed": 1},
    "too long": {"prompt": as_bytes([5] * 100_000, TOKENS), "params": PARAMS, "seed": 1},
    "cold": {"prompt": PROMPT, "params": PARAMS | {"temperature": -1.0}, "seed": 1},
    "nan": {"prompt": PROMPT, "params": PARAMS | {"temperature": float("nan")}, "seed": 1},
    "endless": {"prompt": PROMPT, "params": PARAMS | {"max_new_tokens": 10**9}, "seed": 1},
    "stops": {"prompt": PROMPT, "params": PARAMS | {"stop_ids": [-1]}, "seed": 1},
    "huge stop": {"prompt": PROMPT, "params": PARAMS | {"stop_ids": [2**63]}, "seed": 1},
    "more": {"prompt": PROMPT, "params": PARAMS, "seed": 1, "lora": "/etc/passwd"},
}  # fmt: skip


def test_a_malformed_request_is_refused_and_wedges_nothing(served: Served) -> None:
    for name, message in BAD.items():
        body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        status, said = served.ask("/phimini/generate", body)
        assert status == 400 and said, (name, status, said)
    assert served.ask("/v1/completions", {"model": "policy", "prompt": [2**70]})[0] >= 400
    assert served.ask("/v1/completions", {"model": "policy", "prompt": [10**9]})[0] >= 400
    too_large = b"x" * (65 << 20)
    with contextlib.suppress(urllib.error.URLError):  # hung up on before it has sent all
        assert served.ask("/phimini/generate", too_large)[0] == 413
    good = Ask(PROMPT, SAMPLING, 1)
    assert served.ask("/phimini/generate", msgspec.msgpack.encode(good))[0] == 200


def test_a_malformed_sync_is_an_error_and_the_next_one_works(
    served: Served, tmp_path: Path
) -> None:
    """Neither a path nor another process's file is opened for the trainer that names it."""
    _, config, settings = served.run()
    client = served.client()
    client.connect(config, settings, "a run")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with victim.open("r+") as file:
        fields = {"config": msgspec.to_builtins(config), "fp8": False, "deadline_s": 5.0}
        links = [
            {"path": str(victim), "num_bytes": 8}, {"pid": os.getpid(), "descriptor": file.fileno(), "num_bytes": 8},
            {"pid": "../../etc", "descriptor": "passwd", "num_bytes": 8}, {"pid": 1, "descriptor": 0, "num_bytes": -1}, {},
        ]  # fmt: skip
        for link in links:
            answer = client.call("init", fields | {"link": link}).result(30)
            assert "error" in answer[0], (link, answer)
    assert victim.read_text() == "precious"
    client.call("pause", {}).result(30)
    for phase, info in (("init", {}), ("start", {}), ("update", {"bucket": 0}), ("finish", {}), ("finish", {"version": "x"})):  # fmt: skip
        try:
            assert "error" in client.call(phase, info).result(30)[0] or phase == "start"
        except RuntimeError as error:
            assert "HTTP 4" in str(error)
    for phase in ("sing", "pause/now"):
        with pytest.raises(RuntimeError, match="HTTP 404"):
            client.call(phase, {}).result(30)
    with pytest.raises(RuntimeError, match="HTTP 409"):
        client.call("resume", {}).result(30)
    assert served.ask("/v1/completions", {"model": "policy", "prompt": [9]})[0] == 409
    sync = WeightSync(config, ShmTransport(1 << 21), [client], bucket_bytes=1 << 21, deadline_s=30)
    sync.sync(iter(weights(3, config).items()), 3)
    assert len(RolloutService([client], per_engine=9).run(requests(2, SAMPLING))) == 2
    client.close()


# --- its end ---------------------------------------------------------------------------------------
def test_ctrl_c_ends_it_and_its_workers(served: Served) -> None:
    _, config, settings = served.run()
    client = served.client()
    state = client.connect(config, settings, "a run")
    client.close()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0 and "Traceback" not in served.said(), served.said()
    until(lambda: not any(map(is_running, [state.pid, *state.workers])), 30)


def test_what_no_engine_starts_with_is_refused_before_one_does() -> None:
    run = override(tiny(), ["rollout.engine=vllm", "rollout.engine_tensor_parallel=3"])
    with pytest.raises(ValueError, match="parallel: 3 does not divide the model's 4 heads"):
        engine_settings(run, LONG, "shm")


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_an_engine_of_two_workers_that_is_killed_leaves_none(transport: str) -> None:
    engine = Engine(transport, tensor_parallel=2)
    try:
        engine.server.wait()
        client = ServedEngine(
            engine.address, engine.server.key, loop(), name="engine", deadline_s=30
        )
        workers = client.connect(LONG, engine.settings, "a run").workers
        client.close()
        assert len(set(workers)) == 2, "two processes"
        for worker in workers:
            maps = Path(f"/proc/{worker}/maps").read_text().splitlines()
            shared = [line for line in maps if "-cpushm_" in line]
            assert shared and all(line.endswith("(deleted)") for line in shared), shared
        for rank in run_ranks(
            from_trainer, 2, Layout(tensor=2), engine.address, engine.settings, timeout_s=240
        ):
            assert_parity(rank[0], 0)
            assert_parity(rank[1], 1)
    finally:
        engine.server.process.kill()
        engine.server.close()
    until(lambda: not any(map(is_running, workers)), 30)
