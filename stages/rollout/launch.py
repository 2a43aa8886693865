"""Processes of `vllm serve`, with our endpoints (`endpoints.py`) and the run's settings.

    phimini serve tiny address=0.0.0.0:8765       on any node; the trainer names it in rollout.addresses

or started by the trainer on its own machine. All need one key, from the environment variable PHIMINI_API_KEY; engines
of the trainer's own get a new one without it. The engine has the recipe's model, random until the first sync.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from phimini.model.config import ModelConfig
from phimini.model.io.chat import template_of
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.config.schema import RunConfig
from phimini.stages.rollout.engine_folder import engine_folder
from phimini.stages.rollout.vllm_settings import (
    DESCRIPTION,
    OWNER,
    EngineSettings,
    engine_arguments,
    engine_settings,
    require_vllm,
    write_engine_config,
)

KEY = "PHIMINI_API_KEY"
"""environment variable with the key of the engines"""
PLUGINS = "vllm.endpoint_plugins"
START_S = 600.0
"""an engine that is not up after this long is an error"""
# An engine is no rank of the trainer's job, though it inherits its environment.
JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


class EngineProcess:
    """A running `vllm serve` that ends with this process. `url` is its address, `key` what its endpoints want."""

    def __init__(
        self,
        config: ModelConfig,
        settings: EngineSettings,
        key: str,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        devices: str = "",
        tokenizer: Path | None = None,
        chat_template: str = "",
    ) -> None:
        require_vllm()
        require_plugin()
        self._cleanup = contextlib.ExitStack()
        # To the end: vLLM's processes talk through sockets in it.
        folder = str(self._cleanup.enter_context(engine_folder()))
        write_engine_config(config, settings, folder)
        fields = {"config": dataclasses.asdict(config), "settings": dataclasses.asdict(settings)}
        Path(folder, DESCRIPTION).write_text(json.dumps(fields))
        if tokenizer is not None:
            Tokenizer.load(tokenizer).save(folder, chat_template=chat_template)
        self.key, self.host, self.port = key, host, port or free_port(host)
        self.url = f"http://{host}:{self.port}"
        self.words = serve_words(settings, folder, host, self.port)
        self.process = start(self.words, engine_environment(key, folder, devices))

    def wait(self, timeout_s: float = START_S) -> None:
        """Wait until it listens. Raises RuntimeError if it ended, is not up in time, or has not loaded the plugin."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection((self.host, self.port), 1.0).close()
                return self._check_endpoints()
            if time.monotonic() > end:
                self.close()
                raise RuntimeError(f"the vLLM engine was not up within {timeout_s:g} s")
            time.sleep(0.1)
        self.close()
        raise RuntimeError(
            f"the vLLM engine ended before it was up, exit code {self.process.returncode}; its output says why"
        )

    def _check_endpoints(self) -> None:
        """End an engine whose plugin vLLM could not load: it would let anyone with the key sample random weights."""
        from phimini.stages.rollout.messages import PREFIX  # late: only served engines need msgspec

        headers = {"Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{self.url}{PREFIX}/state", headers=headers)
        try:
            urllib.request.urlopen(request, timeout=60).close()
        except urllib.error.HTTPError as error:
            self.close()
            raise RuntimeError(
                f"the vLLM engine did not load the plugin phimini ({error}); its output says why"
            ) from error

    def close(self) -> None:
        """End it; its model's process ends with it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._cleanup.close()


def require_plugin() -> None:
    """Raise ValueError, with the way to install it, if vLLM would not find our endpoints."""
    if "phimini" not in entry_points(group=PLUGINS).names:
        raise ValueError(
            f"rollout.engine=vllm: phimini is not installed as a plugin of `vllm serve` (entry point {PLUGINS}); "
            "`pip install -e .` registers it"
        )


def serve_words(settings: EngineSettings, folder: str, host: str, port: int) -> list[str]:
    """Return the words of the command `vllm serve` for the engine whose config.json is in `folder`."""
    arguments: dict[str, Any] = engine_arguments(settings, folder)
    words = ["vllm", "serve", arguments.pop("model"), "--host", host, "--port", str(port)]
    words += ["--served-model-name", "policy", "--uvicorn-log-level", "warning"]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def engine_environment(key: str, folder: str, devices: str) -> dict[str, str]:
    """Return the environment of an engine that ends with this process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in JOB_VARIABLES and not name.startswith("TORCHELASTIC")
    }
    own = {
        "VLLM_PLUGINS": "phimini",
        "VLLM_API_KEY": key,
        "VLLM_RPC_BASE_PATH": folder,
        # Its processes are on one machine and talk through its loopback.
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        OWNER: str(os.getpid()),
    }
    return kept | own | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})


def free_port(host: str) -> int:
    """Return a port of `host` that is free now."""
    with socket.create_server((host, 0)) as listening:
        return listening.getsockname()[1]


def start(words: list[str], environment: dict[str, str]) -> Any:
    """Start an engine, out of reach of a terminal's Ctrl-C, which is for its trainer. Raises ValueError without vLLM's script."""
    script = Path(sys.executable).with_name(words[0])
    if not script.exists():
        raise ValueError(f"rollout.engine=vllm: expected vLLM's command {script}, found none")
    return subprocess.Popen(
        [sys.executable, str(script), *words[1:]], env=environment, start_new_session=True
    )


def shared_key(field: str) -> str:
    """Return the key of engines that this process does not start itself. Raises ValueError without one."""
    key = os.environ.get(KEY, "")
    if not key:
        raise ValueError(
            f"{field}: the environment variable {KEY} is not set; the engines and their trainer share this key, "
            f"e.g. {KEY}=$(openssl rand -hex 32)"
        )
    return key


def check_addresses(run: RunConfig) -> None:
    """Check what can be known of `rollout.addresses` before an engine answers. Raises ValueError."""
    for address in run.rollout.addresses:
        split_url("rollout.addresses", address)
    if run.rollout.addresses and run.rollout.engine == "vllm":
        shared_key("rollout.addresses")


def own_key() -> str:
    """Return the key of engines that this process starts."""
    return os.environ.get(KEY) or secrets.token_urlsafe(32)


def tokenizer_of(run: RunConfig) -> Path | None:
    """Return the folder of the run's tokenizer, or None before the stage that trains it."""
    folder = Path(run.out, "base", "model") if run.base == "random" else Path(run.base)
    return folder if (folder / "tokenizer.json").exists() else None


def split_url(field: str, address: str) -> tuple[str, int]:
    """`http://HOST:PORT` -> (host, port). Raises ValueError for anything else."""
    with contextlib.suppress(ValueError):  # a port that is no number
        parts = urlsplit(address)
        if parts.hostname and parts.port and address == f"{parts.scheme}://{parts.netloc}":
            if parts.scheme in ("http", "https"):
                return parts.hostname, parts.port
    raise ValueError(f"{field}: expected http://HOST:PORT, got {address!r}")


def transport_of(run: RunConfig) -> str:
    """Return `rollout.transport`, or for auto the transport that fits.

    On a CPU shm on one machine and gloo between several; on GPUs nccl, but ipc where an engine has rank 0's GPU,
    which NCCL refuses: an engine that rank 0 starts without `rollout.devices`. Raises ValueError for a GPU transport on a CPU.
    """
    rollout, on_gpu = run.rollout, torch.cuda.is_available()
    if rollout.transport == "auto":
        if on_gpu:
            return "nccl" if rollout.addresses or rollout.devices else "ipc"
        hosts = {split_url("rollout.addresses", address)[0] for address in rollout.addresses}
        return "shm" if hosts <= {"127.0.0.1", "localhost"} else "gloo"
    if rollout.transport in ("ipc", "nccl") and not on_gpu:
        raise ValueError(f"rollout.transport={rollout.transport}: needs a GPU; shm or gloo do not")
    return rollout.transport


def serve(run: RunConfig, config: ModelConfig, address: str) -> None:
    """`phimini serve NAME address=HOST:PORT key=value ...`: one engine for a trainer with the same settings.

    Until it is stopped (Ctrl-C or SIGTERM). A trainer whose settings differ is refused, naming the first that does.
    """
    url = f"http://{address}"
    host, port = split_url("serve: address", url)
    rollout = dataclasses.replace(run.rollout, placement="separate", addresses=(url,))
    there = dataclasses.replace(run, rollout=rollout)
    settings = engine_settings(there, config, transport_of(there))
    engine = EngineProcess(
        config, settings, shared_key("serve"), host=host, port=port, tokenizer=tokenizer_of(run),
        chat_template=template_of(run.chat_template),
    )  # fmt: skip
    variables = f"VLLM_PLUGINS=phimini VLLM_API_KEY=${KEY}"
    print(f"phimini serve: {variables} {shlex.join(engine.words)}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: engine.process.terminate())
    try:
        engine.wait()
        print(
            f"phimini serve: {run.name} at {engine.url}, weights by {settings.transport}, up to "
            f"{settings.max_model_len} tokens",
            flush=True,
        )
        engine.process.wait()
    finally:
        engine.close()
