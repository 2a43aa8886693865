"""Functions run in processes forked from one that has imported vLLM, which pays the import once per pytest session.

The pytest process itself never imports vLLM, and no engine outlives the test that started it.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forked_ranks import run_ranks

from phimini.stages.rollout.vllm_settings import require_vllm

PRELOADED = ["vllm_preload"]


def context() -> Any:
    """Return the forkserver context; its first process takes 20 CPU seconds, later ones a few milliseconds."""
    require_vllm()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    # It inherits neither sys.path nor, on purpose, the interpreter that this session's kernels run in.
    saved = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    os.environ.pop("TRITON_INTERPRET", None)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(saved)
    return server


def in_vllm(
    fn: Callable[..., Any], *args: Any, world_size: int = 1, timeout_s: float = 300
) -> list[Any]:
    """Call `run_ranks(fn, world_size, *args)` where vLLM is imported. The results of fn must pickle."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = context().Process(
        target=_child, args=(send, os.getpid(), fn, world_size, args, timeout_s)
    )
    process.start()
    send.close()
    try:
        assert receive.poll(timeout_s + 60), "no result in time"
        kind, value = receive.recv()
    except EOFError:
        process.join(10)
        raise AssertionError(f"the process ended without a result: {process.exitcode}") from None
    finally:
        receive.close()
        process.kill()
        process.join(10)
    if kind == "failed":
        raise AssertionError(value)
    return value


def _child(
    send: Connection,
    parent: int,
    fn: Callable[..., Any],
    world_size: int,
    args: tuple,
    timeout_s: float,
) -> None:
    started = time.process_time()
    try:
        message: tuple[str, Any] = (
            "returned",
            run_ranks(fn, world_size, *args, timeout_s=timeout_s),
        )
    except BaseException as error:
        message = ("failed", f"{type(error).__name__}: {error}")  # a RankFailure does not unpickle
    send.send(message)
    spent = time.process_time() - started + sum(os.times()[2:4])
    print(f"{fn.__name__}: {spent:.1f} CPU s of process {parent}'s forkserver", flush=True)
