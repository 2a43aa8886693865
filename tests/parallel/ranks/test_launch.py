"""The elastic launcher: results, failures, Ctrl-C, no orphans, fork and spawn; and the same job under torchrun."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks as run_forked
from parity_cases import (  # noqa: F401
    GROUPS,
    config,
    cross_entropy_head,
    poison_uninitialised_memory,
    share_of,
)

from phimini.parallel.megatron.builder import build_model
from phimini.parallel.ranks import process
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import RankFailure, run_ranks
from phimini.parallel.ranks.lost_ranks import closing_or_naming_lost_ranks
from phimini.parallel.ranks.process import end_job_without_restart
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.step import forward_backward


def gathered_sum(factor: int) -> tuple[int, float, torch.Tensor]:
    dist.init_process_group("gloo")
    x = torch.tensor([float(dist.get_rank() + 1)]) * factor
    dist.all_reduce(x)
    return dist.get_rank(), x.item(), x


def test_results_come_back_by_rank() -> None:
    results = run_ranks(gathered_sum, 3, 10)
    assert [r for r, _, _ in results] == [0, 1, 2]
    assert all(total == 60.0 and x.equal(torch.tensor([60.0])) for _, total, x in results)


def fail_on_one(how: str) -> None:
    if os.environ["RANK"] != "1":
        time.sleep(60)
    if how == "raises":
        raise ValueError("the batch is sour")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(3)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "ValueError: the batch is sour"),
        ("killed", "SIGKILL"),
        ("exits", "SystemExit: 3"),
    ],
)
def test_a_failing_rank_is_named_and_ends_the_others(how: str, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankFailure, match=says) as failure:
        run_ranks(fail_on_one, 3, how)
    assert failure.value.rank == 1
    assert "rank 1 of 3 failed" in str(failure.value)
    assert time.monotonic() - began < 20


def die_in_a_step(name: str) -> None:
    layout = Layout(tensor=2, pipeline=2)
    world = initialize(layout, config(), timeout_s=200)
    with closing_or_naming_lost_ranks(world, 2.0):
        model = build_model(config(), world, seed=0)
        victim = dict(model.named_parameters()).get(name)
        if world.rank == 3:
            assert victim is not None
            victim.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        model.zero_grad()
        forward_backward(model, share_of(GROUPS, 0, 1), cross_entropy_head)
    raise AssertionError("the step ended")


def test_a_rank_killed_in_the_middle_of_a_step_ends_the_others_and_is_named() -> None:
    """Killed in the backward of the last stage, while the others wait in gloo for a tensor or a reduction.

    gloo sometimes crashes in another rank at that moment, and the launcher then hears of that one; the survivors'
    record names both.
    """
    began = time.monotonic()
    named = r"(?s)rank \d of 4 failed: .*LostRanks: rank (\d, )*3 of 4 gave no sign of life"
    with pytest.raises(RankFailure, match=named):
        run_ranks(die_in_a_step, 4, "chunks.0.decoder.layers.1.mlp.linear_fc1.weight")
    assert time.monotonic() - began < 100, "half of the collectives' deadline"


def test_a_late_rank_is_named() -> None:
    with pytest.raises(RankFailure, match="rank 0, 1 of 2 did not end within 0.5 s"):
        run_forked(time.sleep, 2, 30, timeout_s=0.5)


def threads() -> tuple[int, str]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def test_a_rank_computes_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run_ranks(threads, 2) == [(1, "1")] * 2


def test_a_process_that_uses_cuda_or_a_process_group_cannot_fork(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert process.can_fork()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not process.can_fork()
    monkeypatch.undo()
    monkeypatch.setattr(process, "process_group_joined", True)
    assert not process.can_fork()


def test_ranks_are_spawned_where_a_fork_would_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "can_fork", lambda: False)
    # A closure cannot be sent to a spawned process: these ranks were not forked.
    with pytest.raises(AttributeError, match="local object"):
        run_ranks(lambda: 0, 1)
    assert run_ranks(os.getenv, 2, "RANK") == ["0", "1"]


ORPHANS = """
import os, sys, time
from phimini.parallel.ranks.local_launch import run_ranks

def rank():
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)

run_ranks(rank, 2)
"""


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed parent leaves a folder
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    ranks = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in ranks)
    parent.stdout.close()


def is_running(pid: int) -> bool:
    """Return False for a zombie too: without a reaper orphans stay in the process table."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_to_be_interrupted(folder: Path) -> None:
    try:
        (folder / f"started{os.environ['RANK']}").touch()  # the signal may come right after
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)  # time enough for a second signal to do harm
        (folder / f"saved{os.environ['RANK']}").touch()
        raise


class Cycle:
    """Garbage that only the collector finds; where it is destroyed is written to a file."""

    def __init__(self, file: Path) -> None:
        self.me, self.file = self, file

    def __del__(self) -> None:
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")


def collect() -> int:
    gc.collect()
    return os.getpid()


@pytest.mark.parametrize("launch", [run_ranks, run_forked])
def test_the_parents_garbage_is_not_collected_by_a_rank(launch: Any, tmp_path: Path) -> None:
    """A rank once hung there: the destructor of an inherited store waited for a thread that was not forked."""
    gc.disable()
    try:
        Cycle(tmp_path / "destroyed")
        (rank,) = launch(collect, 1)
    finally:
        gc.enable()
    gc.collect()
    where = (tmp_path / "destroyed").read_text().split()
    assert where == [str(os.getpid())] and rank != os.getpid()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_reach_every_rank_once(number: signal.Signals, tmp_path: Path) -> None:
    # A shell ignores SIGINT for what it starts in the background, and a process inherits that.
    previous = signal.signal(number, signal.default_int_handler)

    began = time.monotonic()

    def interrupt() -> None:
        while len(list(tmp_path.glob("started*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_ranks(wait_to_be_interrupted, 2, tmp_path)
        assert signal.getsignal(number) is signal.default_int_handler, "the launcher's own is gone"
        assert time.monotonic() - began < 20, "nothing waited to be killed"
    finally:
        signal.signal(number, previous)
    assert sorted(p.name for p in tmp_path.glob("saved*")) == ["saved0", "saved1"]


@pytest.mark.parametrize("module", ["phimini.stages.cli", "phimini.bench.cli"])
def test_whether_there_is_a_gpu_is_asked_in_a_way_that_forks_survive(module: str) -> None:
    """torch's own words: is_available will not poison fork if the variable is set."""
    code = (
        "import os, torch; asked = []; name = 'PYTORCH_NVML_BASED_CUDA_CHECK'; os.environ.pop(name, None)\n"
        "torch.cuda.is_available = lambda: asked.append(os.environ.get(name)) or False\n"
        f"import {module}, phimini.parallel\n"
        "assert asked and set(asked) == {'1'}, asked"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_rank_without_a_gpu_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"rank 1 of 2 is number 1 .* 1 GPUs are visible"):
        initialize(Layout(), config())


def test_a_job_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        run_ranks(time.sleep, 0, 1)


def test_bad_input_is_not_restarted() -> None:
    """Without the signal to its agent each of the three restarts would meet the same bad input."""
    out = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
         "--max-restarts", "3", "-m", "phimini.stages.cli", "recipe", "no_such_recipe"],
        env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert out.returncode != 0
    assert len(re.findall("^phimini: .*no_such_recipe", out.stderr, re.M)) == 1, out.stderr[-3000:]


def test_bad_input_does_not_end_the_program_that_started_the_ranks() -> None:
    """Its launcher restarts no rank, so the signal would reach only the program itself: pytest, here."""
    assert run_ranks(end_job_without_restart, 1) == [None]


TORCHRUN_PROGRAM = """
import os
from parity_cases import GROUPS, config, cross_entropy_head, share_of
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.training.step import forward_backward
from phimini.parallel.ranks.world import initialize

world = initialize(Layout(tensor=2), config(), timeout_s=200)
model = build_model(config(), world, seed=0)
result = forward_backward(model, share_of(GROUPS, world.data_rank, world.data_size), cross_entropy_head)
os.write(1, f"rank {world.rank} loss {result.loss!r}\\n".encode())  # at once: the ranks share the pipe
world.close()
"""


def test_the_same_job_under_torchrun(tmp_path: Path) -> None:
    from parity_cases import GROUPS, LIMIT, config, reference

    program = tmp_path / "job.py"
    program.write_text(TORCHRUN_PROGRAM)
    tests = str(Path(__file__).parents[2] / "support")
    out = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)],
        env=os.environ | {"PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"rank \d loss (\S+)", out.stdout)]
    want, _ = reference(config(), GROUPS)
    assert len(losses) == 2 and all(abs(loss - want) <= LIMIT * want for loss in losses), out.stdout
