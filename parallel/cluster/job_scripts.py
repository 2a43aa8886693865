"""Bash scripts that start a job on a cluster: with Slurm, or with torchrun on every node by hand.

Both run torchrun once per node (c10d rendezvous on the first node), check the ranks with
`phimini doctor --dist` first, and end well:

    a rank fails      torchrun starts all ranks again, up to `max_restarts` times; stages go on from their checkpoints
    SIGTERM           (a preemption, `save_seconds` before the time limit, scancel) reaches every rank; each stage
                      saves after its step and ends; torchrun waits that long before it kills. After scancel
                      Slurm itself waits only its KillWait, often 30 s
    a node fails      Slurm puts the job back into the queue; the same script goes on from the checkpoints

Nothing is run here: `render_slurm` and `render_torchrun` return text.
"""

import re
import shlex
from dataclasses import dataclass
from typing import Annotated

from phimini.model.checked_fields import Range, check

Size = Annotated[int, Range(1, 100_000)]

_ENTRY = "phimini.stages.cli"
# Variable -> (value, why).
_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "Megatron's overlap of tensor-parallel communication needs it"),
    "PYTORCH_ALLOC_CONF": ("expandable_segments:True", "packed batches differ in size: less fragmentation"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("1", "a rank whose peer died ends instead of hanging"),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": ("1", "the flight recorder says which collective hung"),
    "TORCH_FR_BUFFER_SIZE": ("2000", "collectives the flight recorder remembers"),
    "NCCL_DEBUG": ("WARN", "NCCL says why it gave up"),
    "NCCL_IB_TIMEOUT": ("22", "InfiniBand retries for about a minute before an error"),
    "NCCL_IB_QPS_PER_CONNECTION": ("4", "several paths through the fabric per connection"),
    "NVTE_FWD_LAYERNORM_SM_MARGIN": ("16", "leaves SMs to communication that overlaps"),
    "NVTE_BWD_LAYERNORM_SM_MARGIN": ("16", "leaves SMs to communication that overlaps"),
    "PYTHONFAULTHANDLER": ("1", "a crash prints Python's stack"),
}  # fmt: skip


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
    """a virtual environment to activate, seen from the folder the job starts in; `none` for the surrounding one"""
    interface: str | None = None
    """the network interface of NCCL's and the rendezvous' sockets; None lets NCCL choose"""
    port: Annotated[int, Range(1, 65535)] = 29500
    """port of the rendezvous on the first node"""
    max_restarts: Annotated[int, Range(0, 1000)] = 3
    """restarts of all ranks after one failed"""
    save_seconds: Size = 300
    """time between SIGTERM and SIGKILL: one step and one checkpoint"""
    numa: bool = True
    """binds each rank to the CPUs of its GPU's NUMA node"""
    doctor: bool = True
    """checks the ranks before the command"""

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


def render_slurm(settings: LaunchSettings) -> str:
    """For `sbatch`, submitted from the folder the job is to run in. One task per node, torchrun in it."""
    options = {
        "job-name": settings.name,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": settings.gpus,
        "cpus-per-task": settings.gpus * settings.cpus,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        # To the job's steps, not to this script: torchrun passes it on to the ranks.
        "signal": f"TERM@{settings.save_seconds}",
        "output": "%x-%j.log",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --exclusive", "#SBATCH --requeue", "#SBATCH --open-mode=append"]
    head = [
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        f'id="{settings.name}-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"',
    ]
    # Since Slurm 22.05 a step does not inherit --cpus-per-task.
    srun = f"srun --cpus-per-task={settings.gpus * settings.cpus} --kill-on-bad-exit=1"
    return _script(settings, "sbatch this file", [*lines, ""], head, [srun])


def render_torchrun(settings: LaunchSettings) -> str:
    """To be run by hand: once on a single machine, or on every node with HEAD set to the first one's name."""
    if settings.nodes == 1:
        return _script(settings, "bash this file", [], [], [])
    how = "HEAD=<first node> bash this file, on every node"
    head = [
        f'head="${{HEAD:?set it to the name of the first node: {how}}}"',
        f'id="{settings.name}"',
    ]
    return _script(settings, how, [], head, [])


def _script(
    settings: LaunchSettings, how: str, header: list[str], head: list[str], prefix: list[str]
) -> str:
    ranks = settings.nodes * settings.gpus
    lines = ["#!/bin/bash", f"# {how}: {settings.nodes} x {settings.gpus} = {ranks} ranks"]
    lines += [*header, "set -euo pipefail", ""]
    if settings.venv is not None:
        lines += [f"source {shlex.quote(settings.venv + '/bin/activate')}", ""]
    lines += [f"export {name}={value}  # {why}" for name, (value, why) in _ENVIRONMENT.items()]
    lines.append(f"export OMP_NUM_THREADS={settings.cpus}")
    if settings.interface is not None:
        sockets = f"NCCL_SOCKET_IFNAME={settings.interface} GLOO_SOCKET_IFNAME={settings.interface}"
        lines.append(f"export {sockets}")
    lines += [
        "",
        *head,
        "launch=(",
        *(f"    {words}" for words in prefix + _torchrun(settings)),
        ")",
    ]
    if settings.doctor:
        lines.append(_start(settings, 0, ("doctor", "--dist")))
    # exec: a SIGTERM for this script is one for torchrun.
    lines.append("exec " + _start(settings, settings.max_restarts, settings.command))
    return "\n".join(lines) + "\n"


def _start(settings: LaunchSettings, restarts: int, command: tuple[str, ...]) -> str:
    # Every start has a rendezvous of its own.
    name = "doctor" if command[0] == "doctor" else "run"
    identity = f' --rdzv-id "$id-{name}"' if settings.nodes > 1 else ""
    rest = f"--max-restarts {restarts} -m {_ENTRY} {shlex.join(command)}"
    return f'"${{launch[@]}}"{identity} {rest}'


def _torchrun(settings: LaunchSettings) -> list[str]:
    where = "--standalone"
    if settings.nodes > 1:
        where = (
            f'--nnodes {settings.nodes} --rdzv-backend c10d --rdzv-endpoint "$head:{settings.port}"'
        )
    words = ["torchrun", where, f"--nproc-per-node {settings.gpus}"]
    # Slurm kills save_seconds after its SIGTERM; torchrun must have ended before.
    words.append(f"--shutdown-timeout {max(1, settings.save_seconds - 10)}")
    if settings.numa:
        words.append("--numa-binding node")
    return words
