"""Processes of `vllm serve`: their command, environment and settings, and their end."""

import asyncio
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollout_cases import LONG, SETTINGS
from vllm_process import find_metadata, in_vllm

from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rollout import launch
from phimini.stages.rollout.separate_vllm import SeparateVllm
from phimini.stages.rollout.vllm_settings import OWNER, engine_settings


def test_an_engine_that_does_not_start_leaves_no_other_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen] = []

    def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen:
        wait = "300" if not started else "0.2"
        started.append(subprocess.Popen(["sleep", wait]))
        return started[-1]

    find_metadata()
    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(launch.EngineProcess.wait, "__defaults__", (2.0,))
    run = override(tiny(), ["rollout.num_engines=2"])
    engine = SeparateVllm.__new__(SeparateVllm)
    engine.config, engine.settings = LONG, SETTINGS
    with pytest.raises(RuntimeError, match="was not up within 2 s"):
        engine._started(run)
    assert len(started) == 2 and all(p.poll() is not None for p in started)


def orphan() -> str:
    from phimini.stages.rollout.endpoints import Endpoints

    os.environ[OWNER] = "1"
    try:
        asyncio.run(Endpoints().init_state(None, None, None))  # pyright: ignore[reportArgumentType]
    except SystemExit as end:
        return str(end)
    return "went on"


@pytest.mark.vllm
def test_an_engine_whose_trainer_died_while_it_started_ends() -> None:
    assert in_vllm(orphan)[0] == "phimini: the trainer of this engine is gone"


def test_the_key_is_not_in_the_command_and_the_job_s_variables_are_not_in_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user of the same machine reads every command line, and vLLM logs its own."""
    code = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ)]))"
    seen: list[Any] = []

    def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *words]
        seen.extend(json.loads(subprocess.check_output(command, env=environment, text=True)))
        return subprocess.Popen(["true"])

    find_metadata()
    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    launch.EngineProcess(LONG, SETTINGS, "secret", devices="4,5").close()
    words, environment = seen
    assert not any("secret" in word for word in words)
    assert environment["VLLM_API_KEY"] == "secret" and environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert words[words.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("has_cuda", [False, True], ids=["no-cuda", "cuda"])
def test_an_engine_is_served_with_its_trainer_s_settings(
    has_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a GPU, where a colocated engine sleeps and a served one does not."""
    served: list[Any] = []

    class Served(Exception):
        pass

    def process(*arguments: Any, **options: Any) -> None:
        served.append((*arguments, options))
        raise Served

    monkeypatch.setenv(launch.KEY, "sesame")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(launch, "EngineProcess", process)
    with pytest.raises(Served):
        launch.serve(tiny(), LONG, "node7:8765")
    words = ["rollout.engine=vllm", "rollout.placement=separate", "rollout.addresses=http://node7:8765"]  # fmt: skip
    run = override(tiny(), words)
    asked = engine_settings(run, LONG, launch.transport_of(run))
    config, settings, _, options = served[0]
    assert (config, settings, options["host"], options["port"]) == (LONG, asked, "node7", 8765)
