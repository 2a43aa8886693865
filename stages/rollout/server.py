"""One vLLM engine in a process of its own: vLLM's AsyncLLM behind the messages of `wire.py`.

    phimini serve tiny address=0.0.0.0:8765       on any node; the trainer names it in rollout.addresses

or started by the trainer on its own machine. The engine has the recipe's model, random until the first sync, and
samples nothing before. One trainer is connected at a time, from its hello on. Requests of a trainer that goes away are aborted; a sync
that it was in the middle of leaves the engine refusing to sample until a whole one has succeeded.
"""

import asyncio
import dataclasses
import multiprocessing
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from phimini.model.config import ModelConfig
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.process import end_with_parent
from phimini.stages.rollout.engine_folder import engine_folder
from phimini.stages.rollout.vllm_settings import (
    EngineSettings,
    engine_arguments,
    sampled,
    vllm_params,
    write_engine_config,
)
from phimini.stages.rollout.wire import Message, encode, read

BEAT_S = 1.0
# An engine is no rank of the trainer's job, though it inherits its environment.
JOB_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def run_server(
    config: ModelConfig,
    settings: EngineSettings,
    host: str,
    port: int,
    announce: Callable[[int], None],
    *,
    owned: bool = False,
    devices: str = "",
) -> None:
    """Serves until told to stop. `announce(port)` is called once the engine is up and listens.

    Ctrl-C and SIGTERM stop it. owned: it ends when its trainer's connection does, and Ctrl-C is not for it but for
    the trainer, which finishes its step first. devices: CUDA_VISIBLE_DEVICES of this engine.
    """
    for name in [v for v in os.environ if v in JOB_VARIABLES or v.startswith("TORCHELASTIC")]:
        del os.environ[name]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    if owned:
        os.setsid()  # a terminal's Ctrl-C reaches every process of its session, vLLM's core too
        end_with_parent()
    trainer = multiprocessing.parent_process()
    if owned and trainer is not None and not trainer.is_alive():
        return  # it was killed while this process imported: nobody would ever end it
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    asyncio.run(_Server(config, settings, owned).run(host, port, announce))


class _Server:
    def __init__(self, config: ModelConfig, settings: EngineSettings, owned: bool) -> None:
        self.config, self.settings, self.owned = config, settings, owned
        self.version: int | None = None
        """of the weights that may be sampled from; None: none, or mixed"""
        self.old_version: int | None = None
        """of before the sync under way"""
        self.engine: Any = None
        self.stop = asyncio.Event()
        self.seat = asyncio.Lock()
        self.tasks: set[asyncio.Task] = set()
        self.connections: set[asyncio.Task] = set()
        self.requests: set[str] = set()
        self.writer: asyncio.StreamWriter | None = None
        self.ops: dict[str, Callable[[Message], Awaitable[Message]]] = {
            "hello": self.hello, "generate": self.generate, "cancel": self.cancel,
            "sync": self.sync, "reset": self.reset,
        }  # fmt: skip

    async def run(self, host: str, port: int, announce: Callable[[int], None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.stop.set)
        # To the end: vLLM's processes talk through sockets in it.
        with engine_folder() as folder:
            os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
            await self.run_in(str(folder), host, port, announce)

    async def run_in(
        self, folder: str, host: str, port: int, announce: Callable[[int], None]
    ) -> None:
        write_engine_config(self.config, self.settings, folder)
        self.engine = _start_engine(engine_arguments(self.settings, folder))
        workers = await self.engine.collective_rpc("phimini_guard", args=(os.getpid(),))
        if sys.platform == "linux":
            _unname_shared_memory(workers)
        server = await asyncio.start_server(self.connection, host, port)
        beats = asyncio.create_task(self.beat())
        beats.add_done_callback(self.beats_ended)
        announce(server.sockets[0].getsockname()[1])
        await self.stop.wait()
        beats.cancel()
        if self.writer is not None:
            self.writer.close()
        if self.connections:
            await asyncio.wait(list(self.connections), timeout=5)
        server.close()
        self.engine.shutdown()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await read(reader)
        if hello is None or hello.get("op") != "hello" or "id" not in hello:
            writer.close()  # a health check, or a port scan
            return
        task = asyncio.current_task()
        assert task is not None, "a connection is served by a task"
        self.connections.add(task)
        task.add_done_callback(self.connections.discard)
        async with self.seat:  # a second trainer is not answered before the first has gone
            await self.serve(hello, reader, writer)

    async def serve(
        self, hello: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.writer = writer
        message: Message | None = hello
        while message is not None:
            task = asyncio.create_task(self.answer(message))
            self.tasks.add(task)
            task.add_done_callback(lambda task, id=message["id"]: self.answered(task, id))
            message = await read(reader)
        self.writer = None
        writer.close()
        if self.owned:
            self.stop.set()
        if not self.stop.is_set():
            await self.trainer_left()

    async def trainer_left(self) -> None:
        await self.engine.abort(list(self.requests))
        if self.tasks:
            await asyncio.wait(list(self.tasks))
        if await self.engine.is_paused():  # it left in the middle of a sync
            await self.sync({"phase": "abort", "info": {}})

    async def answer(self, message: Message) -> Message:
        if message["op"] not in self.ops:
            raise ValueError(f"unknown op {message['op']!r}; expected one of {sorted(self.ops)}")
        return await self.ops[message["op"]](message)

    def answered(self, task: asyncio.Task, id: int) -> None:
        self.tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.send({"id": id, **task.result()})
        elif not self.engine.errored:
            self.send({"id": id, "error": f"{type(error).__name__}: {error}"})
        elif not self.stop.is_set():
            # No answer: a connection that ends says that the engine is gone.
            print(f"phimini: the vLLM engine died: {error}", file=sys.stderr, flush=True)
            self.stop.set()

    def send(self, message: Message) -> None:
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(encode(message))

    async def beat(self) -> None:
        """Says that the model's process answers; silence says that it does not."""
        number = 0
        while True:
            await asyncio.sleep(BEAT_S)
            await self.engine.collective_rpc("phimini_guard", args=(os.getpid(),))
            number += 1
            self.send({"beat": number})

    def beats_ended(self, task: asyncio.Task) -> None:
        """End the server when its engine dies between requests."""
        if not task.cancelled() and not self.stop.is_set():
            print(f"phimini: the vLLM engine died: {task.exception()}", file=sys.stderr, flush=True)
            self.stop.set()

    # --- what a trainer can ask for ---------------------------------------------------------------
    async def hello(self, message: Message) -> Message:
        """Both sides must mean the same model and the same engine."""
        mine = {
            "config": dataclasses.asdict(self.config),
            "settings": dataclasses.asdict(self.settings),
        }
        for kind, fields in mine.items():
            for name, value in fields.items():
                value = list(value) if isinstance(value, tuple) else value
                theirs = message[kind].get(name)
                if theirs != value:
                    raise ValueError(f"{kind}.{name}: the engine has {value}, the trainer {theirs}")
        workers = await self.engine.collective_rpc("phimini_guard", args=(os.getpid(),))
        return {"pid": os.getpid(), "workers": workers, "version": self.version}

    async def generate(self, message: Message) -> Message:
        if self.version is None and self.old_version is None:
            raise RuntimeError("the engine has no whole set of weights; a sync comes first")
        fields = message["params"]
        params = SamplingParams(**{**fields, "stop_ids": tuple(fields["stop_ids"])})
        request_id = message["request"]
        self.requests.add(request_id)
        last = None
        try:
            async for output in self.engine.generate(
                {"prompt_token_ids": message["prompt"]},
                vllm_params(params, message["seed"]),
                request_id=request_id,
            ):
                last = output
        finally:
            self.requests.discard(request_id)
        assert last is not None, "a request ends with an output"
        output = last.outputs[0]
        done = sampled(output)
        return {
            "tokens": done.tokens,
            "logprobs": done.logprobs,
            "finish_reason": "abort" if output.finish_reason == "abort" else done.finish_reason,
            "versions": [list(span) for span in done.versions],
        }

    async def cancel(self, message: Message) -> Message:
        await self.engine.abort(message["requests"])
        return {}

    async def reset(self, message: Message) -> Message:
        if not await self.engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use and was not reset")
        return {}

    async def sync(self, message: Message) -> Message:
        phase, info = message["phase"], message["info"]
        if phase == "pause":
            await self.engine.pause_generation(mode=info.get("mode", "keep"), clear_cache=True)
            return {"workers": []}
        if phase == "resume":
            await self.engine.resume_generation()
            return {"workers": []}
        if phase == "start":
            self.old_version, self.version = self.version, None
        workers = await self.engine.collective_rpc("phimini_sync", args=(phase, info))
        failed = any("error" in worker for worker in workers)
        if phase == "finish" and not failed:
            await self.engine.update_weight_version(info["version"])
            await self.reset({})
            self.version, self.old_version = int(info["version"]), None
        if phase == "abort":
            await self.aborted(whole=all(worker["whole"] for worker in workers))
        return {"workers": workers}

    async def aborted(self, whole: bool) -> None:
        """After a failed sync, continue with the old weights if they are whole; otherwise refuse to sample."""
        if whole and self.version is None:
            self.version = self.old_version
        self.old_version = None
        if self.version is None:
            await self.engine.abort(list(self.requests))
        await self.engine.resume_generation()


def _unname_shared_memory(workers: list[int]) -> None:
    """On a CPU, workers of one engine meet in shared memory that vLLM 0.32 never removes; they have it mapped by now."""
    for pid in workers:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            path = line[line.find("/") :]
            if path.startswith("/dev/shm/") and "-cpushm_" in path:
                Path(path).unlink(missing_ok=True)


def _start_engine(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AsyncEngineArgs(**arguments).create_engine_config()
    # vLLM spawns its core on a CPU, which imports everything again (10 s); this process has no threads yet. With CUDA it
    # would fork, and a fork cannot use CUDA once this process has asked it for anything.
    method = "spawn" if torch.cuda.is_available() else "fork"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
