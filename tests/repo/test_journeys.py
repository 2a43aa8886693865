"""Limits on how many of our files three journeys pass through.

- document: a line of JSON Lines to its gradient, through stage 1 and the Triton text of the head;
- rollout: a prompt to its gradient, through stage 4 with the local engine;
- weight: the trainer's model to vLLM's loader and the proof of the transfer, in the colocated engine.

Each runs in a rank of its own under `sys.setprofile`. Only the rooms of the product count, and only their functions:
a file whose constants or dataclasses are used is not passed through.
"""

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from forked_ranks import run_ranks
from rl_run import make_run, run_config
from rollout_cases import LONG, SETTINGS, move, trainer
from vllm_process import in_vllm

from phimini.model.config import preset
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.stages import rlvr
from phimini.stages.base import base
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.curate import curate
from phimini.stages.distill import distill
from phimini.stages.midtrain import midtrain
from phimini.stages.rl import loss as policy_loss
from phimini.stages.run import training
from phimini.stages.run.stage_folder import Stage
from phimini.stages.tokenize import tokenize
from phimini.stages.verify import verdict as scorer

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "model", "parallel", "stages")
IN_BETWEEN = {
    "parallel/checkpoint/files.py", "parallel/checkpoint/save_load.py", "parallel/ranks/cpu_shim.py",
    "parallel/ranks/timing.py", "parallel/ranks/world.py", "parallel/training/optimizer.py", "stages/run/metrics.py",
    "stages/run/progress.py", "stages/run/stage_folder.py", "stages/run/trackers.py",
}  # fmt: skip
"""files that run during a journey without a part in it: set-up, clocks, log and checkpoints"""
LIMITS = {"document": (28, 220), "rollout": (34, 330), "weight": (12, 100)}
"""files and functions of each journey, IN_BETWEEN left out"""


class Trace:
    """A profile of the functions that run from the first call of `first` up to the first of `last`.

    Covers this thread and those that start meanwhile. `first` and `last` are qualified names, and so are `without`,
    functions left out with all that they call.
    """

    def __init__(self, first: str, last: str = "", without: tuple[str, ...] = ()) -> None:
        self.first, self.last, self.without = first, last, without
        self.codes: dict[Any, None] = {}
        self.state = "before"
        self.left_out: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "return" and frame is self.left_out:
            self.left_out = None
        if event != "call" or self.state == "after" or self.left_out is not None:
            return
        name = frame.f_code.co_qualname
        if name in self.without:
            self.left_out = frame
            return
        if name == self.first:
            self.state = "on"
        elif name == self.last:
            self.state = "after"
        if self.state == "on":
            self.codes[frame.f_code] = None

    def __enter__(self) -> "Trace":
        threading.setprofile(self)  # of threads that start from now on
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        self.state = "after"

    def files(self) -> dict[str, list[str]]:
        """Return the functions by file of our rooms, in the order of their first calls."""
        found: dict[str, list[str]] = {}
        for code in list(self.codes):
            path = Path(code.co_filename).resolve()
            if any(path.is_relative_to(ROOT / room) for room in ROOMS):
                file = str(path.relative_to(ROOT))
                if file not in IN_BETWEEN:
                    found.setdefault(file, []).append(code.co_qualname)
        return found


def document(folder: Path) -> dict[str, list[str]]:
    """Encode the rows of the tiny recipe, and train one step of stage 1 on them."""
    run = override(tiny(), [
        f"out={folder}", "processes=1", "distill.num_problems=60", "distill.num_prompts=20", "distill.num_heldout=24",
        "distill.num_validation=4", "curate.sft_examples=30", "midtrain.steps=1", "midtrain.rows_per_step=2",
        "midtrain.micro_rows=1", "midtrain.validate_every=100", "tokenize.workers=1",
    ])  # fmt: skip
    for stage in (distill, curate, base):
        stage(run)
    with Trace("write_shard", "tokenize.<locals>.<lambda>") as encoding:
        tokenize(run)
    world = initialize(Layout(), preset("tiny"))
    loss: Any = training
    loss.linear_cross_entropy = functools.partial(loss.linear_cross_entropy, _backend="triton")
    with Trace("check_tokens", "Optimizer.step", without=("load_model",)) as training_step:
        midtrain(run, world)
    files = encoding.files()
    for file, functions in training_step.files().items():
        files[file] = list(dict.fromkeys([*files.get(file, []), *functions]))
    return files


def rollout(folder: Path) -> dict[str, list[str]]:
    """Train one step of stage 4, with a reward that random answers sometimes get after the real verdict.

    Its log, guards and audit are left out, as set-up and checkpoints are.
    """
    run = run_config(make_run(folder / "run"), "rlvr.steps=1")
    loss: Any = policy_loss
    loss.linear_policy_loss = functools.partial(loss.linear_policy_loss, _backend="triton")
    judge = scorer.is_right

    def is_right(question: str, answer: str, response: str, finish_reason: str) -> bool:
        judge(question, answer, response, finish_reason)
        return len(response) % 2 == 0

    scorer.is_right = is_right
    world = initialize(Layout(), LONG)
    stage = Stage.begin(run, "rlvr", world)
    left_out = ("write_rollouts", "Step.allows", "audit_metrics", "GroupSampler._audited")
    with Trace("RolloutSource.groups", "Optimizer.step", without=left_out) as trace:
        rlvr.reinforce(run, world, stage, "rollout_dpo")
    return trace.files()


def weight() -> dict[str, list[str]]:
    """Sync changed weights to an engine that had a sync before."""
    from phimini.stages.rollout.colocated_vllm import ColocatedVllm

    model = trainer(LONG, Layout(), 1)
    engine = ColocatedVllm(LONG, SETTINGS, model.world, 60.0)
    engine.sync(model)
    move(model, 2)
    with Trace("ColocatedVllm.sync") as trace:
        engine.sync(model)
    assert engine.last_sync is not None
    return trace.files()


WAYPOINTS = {
    "document": {"model/io/json_files.py", "stages/midtrain.py", "kernels/head/triton_kernels.py"},
    "rollout": {"model/sampler.py", "stages/verify/verdict.py", "kernels/head/triton_kernels.py"},
    "weight": {"stages/rollout/colocated_vllm.py", "parallel/weight_sync/vllm_receiver.py", "kernels/checksum.py"},
}  # fmt: skip
"""files on each journey's way: without them the trace missed a part"""


def check(name: str, files: dict[str, list[str]]) -> None:
    functions = sum(map(len, files.values()))
    print(f"{name}: {len(files)} files, {functions} functions", *files, sep="\n  ")
    most_files, most_functions = LIMITS[name]
    assert WAYPOINTS[name] <= files.keys(), sorted(WAYPOINTS[name] - files.keys())
    assert len(files) <= most_files, list(files)
    assert functions <= most_functions, files


@pytest.mark.parametrize("journey", [document, rollout], ids=lambda journey: journey.__name__)
def test_a_gradient_is_few_files_away(
    journey: Callable[[Path], dict[str, list[str]]], tmp_path: Path
) -> None:
    check(journey.__name__, run_ranks(journey, 1, tmp_path)[0])


@pytest.mark.vllm
def test_a_synced_weight_is_few_files_away() -> None:
    check("weight", in_vllm(weight)[0])
