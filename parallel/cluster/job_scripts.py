"""Bash scripts that start a job on a cluster, with Slurm or with torchrun on every node by hand.

The text is in job.sh.j2 and, for what differs, slurm.sh.j2 and torchrun.sh.j2. Both scripts run torchrun once per node
(c10d rendezvous on the first node), check the ranks with `phimini doctor --dist` first, and handle failures:

    a rank fails      torchrun starts all ranks again, up to `max_restarts` times; stages go on from their checkpoints.
                      Bad input (exit status 2) ends the job at once
    SIGTERM           (a preemption, `save_seconds` before the time limit, scancel) reaches every rank; each stage
                      saves after its step and ends; torchrun waits that long before it kills. After scancel
                      Slurm itself waits only its KillWait, often 30 s
    a node fails      Slurm puts the job back into the queue; the same script goes on from the checkpoints

Nothing is run here: `render_slurm` and `render_torchrun` return text.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jinja2

from phimini.model.checked_fields import Range, check

Size = Annotated[int, Range(1, 100_000)]

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"quote": shlex.quote, "join_words": shlex.join}


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSettings:
    """A job on a cluster, and behind `--` the command that it runs."""

    command: tuple[str, ...] = ()
    """the words after `phimini`, e.g. recipe,phi4_mini_reasoning,out=runs/a; simpler behind `--`"""
    nodes: Size = 1
    """number of machines"""
    gpus: Size = 8
    """GPUs per node; one rank each"""
    cpus: Size = 12
    """CPU cores per GPU"""
    name: str = "phimini"
    """name of the job and of its rendezvous"""
    time: str = "24:00:00"
    """Slurm's time limit"""
    partition: str | None = None
    """Slurm's partition"""
    account: str | None = None
    """Slurm's account"""
    venv: str | None = ".venv"
    """virtual environment to activate, relative to the folder the job starts in; `none` keeps the current one"""
    interface: str | None = None
    """the network interface of NCCL's and the rendezvous' sockets; None lets NCCL choose"""
    port: Annotated[int, Range(1, 65535)] = 29500
    """port of the rendezvous on the first node"""
    max_restarts: Annotated[int, Range(0, 1000)] = 3
    """restarts of all ranks after one failed"""
    save_seconds: Size = 300
    """time between SIGTERM and SIGKILL: one step and one checkpoint"""
    numa: bool = True
    """bind each rank to the CPUs of its GPU's NUMA node"""
    doctor: bool = True
    """check the ranks before the command"""

    def __post_init__(self) -> None:
        check(self, "launch ")
        if not self.command:
            raise ValueError("launch: no command; put it behind --, e.g. `-- recipe tiny`")
        # torchrun would take a name that begins with '-' for an option.
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"launch name={self.name!r}: expected letters, digits, '_' and, not first, '.' and '-'"
            )
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ValueError(
                f"launch time={self.time!r}: expected Slurm's form, e.g. 24:00:00 or 2-0"
            )
        for name in ("partition", "account", "interface"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,=^-]+", value):
                raise ValueError(f"launch {name}={value!r}: expected one word")


def render_slurm(settings: LaunchSettings, doctor: Sequence[str] = ()) -> str:
    """Return the script for `sbatch`, submitted from the folder the job is to run in: one torchrun per node.

    doctor: words of `doctor --dist`, which examines the ranks first.
    """
    return _rendered("slurm.sh.j2", settings, doctor)


def render_torchrun(settings: LaunchSettings, doctor: Sequence[str] = ()) -> str:
    """Return the script to run by hand: on a single machine, or on every node with HEAD set to the first one's name."""
    return _rendered("torchrun.sh.j2", settings, doctor)


def _rendered(name: str, settings: LaunchSettings, doctor: Sequence[str]) -> str:
    examine = ["doctor", "--dist", *doctor]
    return _TEMPLATES.get_template(name).render(s=settings, examine=examine)
