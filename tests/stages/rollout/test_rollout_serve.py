"""`phimini serve`, and an engine process whose model is split over two workers: each against the real vLLM."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_ranks import run_ranks
from rollout_cases import LONG, assert_parity
from rollout_processes import Engine, from_trainer, until
from vllm_process import context

from phimini.parallel.ranks.layout import Layout
from phimini.stages import cli
from phimini.stages.base import base_config
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rollout.client import EngineClient
from phimini.stages.rollout.separate_vllm import transport_of
from phimini.stages.rollout.vllm_settings import engine_settings
from phimini.stages.rollout.wire import encode, split_address

pytestmark = pytest.mark.vllm
WORDS = ["rollout.engine=vllm", "rollout.max_batch=16", "rollout.transport=gloo"]


def command(output: str, *arguments: str) -> None:
    """Run the command `phimini` with its output in a file."""
    sys.stdout = sys.stderr = Path(output).open("w", buffering=1)
    sys.exit(cli.main(list(arguments)))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """Start `phimini serve tiny`; return (process, address, output)."""
    output = tmp_path_factory.mktemp("serve") / "output"
    process = context().Process(
        target=command, args=(str(output), "serve", "tiny", "address=127.0.0.1:0", *WORDS)
    )
    process.start()
    try:
        until(lambda: not process.is_alive() or "weights by" in said(output), 300)
        found = re.search(r"at (127\.0\.0\.1:\d+), weights by gloo, up to 256 tokens", said(output))
        assert found, said(output)
        yield process, found[1], output
    finally:
        process.kill()
        process.join(10)


def said(output: Path) -> str:
    return output.read_text() if output.exists() else ""


def test_a_trainer_with_the_same_recipe_samples_from_what_is_served(served: tuple) -> None:
    run = override(tiny(), [*WORDS, f"rollout.addresses={served[1]}"])
    config = base_config(run)
    settings = engine_settings(run, config, transport_of(run))
    results = run_ranks(from_trainer, 1, Layout(), served[1], settings, config, timeout_s=240)[0]
    assert_parity(results[0], 0)
    assert_parity(results[1], 1)


def test_a_trainer_with_another_recipe_is_refused_by_name(served: tuple) -> None:
    run = override(tiny(), [*WORDS, "rollout.max_model_len=128"])
    config = base_config(run)
    client = EngineClient(served[1], name="engine")
    with pytest.raises(RuntimeError, match=r"settings\.max_model_len: the engine has 256, .* 128"):
        client.hello(config, engine_settings(run, config, transport_of(run)), 30)
    client.close()


def test_who_says_nothing_or_something_else_keeps_no_trainer_waiting(served: tuple) -> None:
    """A silent connection, an HTTP health check and a message other than hello do not block a trainer."""
    run = override(tiny(), WORDS)
    config = base_config(run)
    strangers = [socket.create_connection(split_address(served[1])) for _ in range(3)]
    strangers[1].sendall(b"GET /health HTTP/1.1\r\n\r\n")
    strangers[2].sendall(encode({"op": "generate"}))
    for stranger in strangers[1:]:
        stranger.settimeout(10)
        assert stranger.recv(1) == b"", "it is hung up on"
    client = EngineClient(served[1], name="engine")
    assert client.hello(config, engine_settings(run, config, "gloo"), 10)["workers"]
    client.close()
    for stranger in strangers:
        stranger.close()


def test_ctrl_c_ends_it_and_its_workers(served: tuple) -> None:
    process, address, output = served
    run = override(tiny(), WORDS)
    client = EngineClient(address, name="engine")
    config = base_config(run)
    worker = client.hello(config, engine_settings(run, config, "gloo"), 30)["workers"][0]
    client.close()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0 and "Traceback" not in said(output), said(output)
    until(lambda: not alive(worker), 30)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_serve_is_not_told_it_asks_for(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["serve", "tiny"]) == 2
    assert "expected address=HOST:PORT" in capsys.readouterr().err


def test_what_no_engine_starts_with_is_refused_before_one_does() -> None:
    run = override(tiny(), ["rollout.engine=vllm", "rollout.engine_tensor_parallel=3"])
    with pytest.raises(ValueError, match="parallel: 3 does not divide the model's 4 heads"):
        engine_settings(run, LONG, "shm")


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_an_engine_of_two_workers(transport: str) -> None:
    engine = Engine(transport, tensor_parallel=2)
    try:
        engine.up()
        client = engine.connect()
        workers = client.hello(LONG, engine.settings, 30)["workers"]
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
        engine.process.kill()
        engine.process.join(10)
    started = time.monotonic()
    while any(alive(worker) for worker in workers):
        assert time.monotonic() - started < 30, "workers outlive their engine"
        time.sleep(0.1)
