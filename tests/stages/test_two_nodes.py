"""The printed job script on two nodes: a rank is killed, all ranks start again, and the result is that of a quiet job.

Both nodes are this machine: two torchrun agents that meet at 127.0.0.1.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipe_cases import MICRO, with_data

from phimini.parallel.cluster.job_scripts import LaunchSettings, render_torchrun

TIME_LIMIT_S = 300.0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the data and the start model of a run."""
    run = tmp_path_factory.mktemp("nodes") / "start"
    return with_data(run)


def started(run: Path, *words: str) -> list[subprocess.Popen]:
    """Start stage 1 on two nodes of one rank each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = LaunchSettings(
        nodes=2, gpus=1, cpus=1, venv=None, numa=False, doctor=False, interface="lo", port=port, save_seconds=30,
        command=("midtrain", "tiny", f"out={run}", *MICRO, "midtrain.checkpoint_every=1", *words),
    )  # fmt: skip
    environment = os.environ | {"HEAD": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ["bash", "-c", render_torchrun(settings)]
    return [
        subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]


def ended(nodes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Return the exit status of each node, and what they wrote to stderr."""
    try:
        said = [node.communicate(timeout=TIME_LIMIT_S)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [node.returncode for node in nodes], "\n".join(said)


def kill_a_rank(node: subprocess.Popen, run: Path, *, after_steps: int) -> None:
    """Kill the node's rank once the log has so many steps. The script has become torchrun, so the rank is its child."""
    log, deadline = run / "midtrain" / "metrics.jsonl", time.monotonic() + TIME_LIMIT_S
    while not log.exists() or len(log.read_text().splitlines()) < after_steps:
        assert time.monotonic() < deadline and node.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    ranks = [int(c) for c in children if b"phimini.stages.cli" in Path(f"/proc/{c}/cmdline").read_bytes()]  # fmt: skip
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)


def model_of(run: Path) -> dict[str, str]:
    files = sorted((run / "midtrain" / "model").glob("*"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def quiet(prepared: Path) -> dict[str, str]:
    """Run the job without a fault, and return the checksums of its model."""
    run = shutil.copytree(prepared, prepared.parent / "quiet")
    status, said = ended(started(run))
    assert status == [0, 0], said[-3000:]
    return model_of(run)


def restarted(prepared: Path, run: Path, node: int, after_steps: int) -> dict[str, str]:
    """Run the job, kill the rank of a node after so many steps, and return the checksums of its model."""
    nodes = started(shutil.copytree(prepared, run))
    kill_a_rank(nodes[node], run, after_steps=after_steps)
    status, said = ended(nodes)
    assert status == [0, 0], said[-3000:]
    return model_of(run)


def test_a_job_whose_rank_is_killed_ends_like_a_quiet_one(
    prepared: Path, quiet: dict[str, str], tmp_path: Path
) -> None:
    assert "model.safetensors" in quiet
    assert restarted(prepared, tmp_path / "run", node=1, after_steps=2) == quiet


@pytest.mark.faults
def test_ten_times_of_ten(prepared: Path, quiet: dict[str, str], tmp_path: Path) -> None:
    for k in range(10):
        found = restarted(prepared, tmp_path / str(k), node=k % 2, after_steps=1 + k % 4)
        assert found == quiet, f"time {k + 1}"
        print(f"two nodes, a rank of node {k % 2} killed: time {k + 1} of 10 ended equal")


def test_bad_input_ends_both_nodes_at_once(prepared: Path, tmp_path: Path) -> None:
    run = shutil.copytree(prepared, tmp_path / "run")
    status, said = ended(started(run, "midtrain.sequence_length=3"))
    told = said.count("tokens, but midtrain.sequence_length is 3")  # by each rank, once
    assert 0 not in status and 1 <= told <= 2, said[-3000:]
