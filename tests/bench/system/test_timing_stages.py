"""Negative controls of the marks in the stages: work planted in one phase of a real RL step is in that phase's row and in no other."""

import contextlib
import statistics
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks

from phimini.bench.gate.rows import Row
from phimini.bench.system.train import _coin_rewards, _for_steps, prepare, timed_collectives
from phimini.bench.system.train_rows import (
    RankResult,
    describe,
    make_row,
    outside_share,
    too_much_outside,
)
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.timing import PHASES, Recorder, Step
from phimini.parallel.ranks.world import World, initialize
from phimini.parallel.training import optimizer
from phimini.stages import rlvr
from phimini.stages.base import base_config
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.rl import loss as policy_head
from phimini.stages.rl import rollouts
from phimini.stages.rollout import engine as rollout

SMALL = [
    "processes=2", "distill.num_problems=60", "distill.num_prompts=30", "distill.num_heldout=24",
    "distill.num_validation=24", "curate.sft_examples=60", "rlvr.prompts_per_step=4", "rlvr.max_new_tokens=32",
    "rlvr.min_rollouts=2", "rlvr.probe_prompts=8",
]  # fmt: skip
PLANTED_S = 0.4
BEFORE = 2
"""steps without anything planted; one more each between two planted ones would show the same"""


class Planted:
    """One phase's step has PLANTED_S of CPU work more, once, where that phase's own code runs."""

    def __init__(self) -> None:
        self.now: str | None = None

    def work(self, name: str) -> None:
        if self.now == name:
            self.now = None
            until = time.process_time() + PLANTED_S
            while time.process_time() < until:
                pass

    def before(self, owner: Any, attribute: str, name: str) -> None:
        """Plants before the code of `owner.attribute`."""
        real = getattr(owner, attribute)

        def fn(*args: Any, **kwargs: Any) -> Any:
            self.work(name)
            return real(*args, **kwargs)

        setattr(owner, attribute, fn)

    def in_model(self) -> None:
        """In the forward pass, and behind the last layer's output in the backward pass."""
        from megatron.core.models.gpt import GPTModel

        planted, real = self, GPTModel.forward

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.view_as(x)

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
                planted.work("backward")
                return grads[0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            planted.work("forward")
            return Backward.apply(real(*args, **kwargs))

        GPTModel.forward = forward

    def everywhere(self) -> None:
        self.before(rlvr, "rollout_batch", "data")
        self.in_model()
        self.before(policy_head, "linear_policy_loss", "head")
        self.before(dist.ProcessGroup, "allreduce", "communication")
        self.before(optimizer, "refuse_unscheduled_decay", "optimizer")
        self.before(rollout, "sample", "rollout")
        self.before(rollouts, "on_every", "verify")
        self.before(rollout, "to_hf", "sync")
        self.before(rlvr, "choose", "other")


def rank(run: RunConfig) -> tuple[list[Step], Row, Row]:
    """Return every step's times, and the rows of an unchanged step and of the step with work outside all phases."""
    world = initialize(Layout(), base_config(run))
    planted = Planted()
    planted.everywhere()

    def between(done: int) -> None:
        assert planted.now is None, f"nothing ran in {planted.now}"
        planted.now = PHASES[done - BEFORE] if 0 <= done - BEFORE < len(PHASES) else None

    with _coin_rewards(True), timed_collectives(), Recorder(world.device, between) as recorder:
        with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere):
            rlvr.rlvr(run, world)
    steps = recorder.steps
    outside = steps[BEFORE + PHASES.index("other")]
    rows = [row_of(run, world, step) for step in (steps[BEFORE - 1], outside)]
    return steps, rows[0], rows[1]


def row_of(run: RunConfig, world: World, step: Step) -> Row:
    result = RankResult([step], [step], [1e11], 1, None, 1)
    log = [{"loss": 1.0, "grad_norm": 1.0}]
    return make_row(run, "rlvr", world, world.all_gather_objects(result), log, "coin")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[Step], Row, Row]]:
    run = override(tiny(), [*SMALL, f"out={tmp_path_factory.mktemp('run')}"])
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere):
        prepare(run, "rlvr", None)
    return run_ranks(rank, 2, _for_steps(run, "rlvr", BEFORE + len(PHASES) + 1))


@pytest.mark.parametrize("name", PHASES)
def test_planted_work_is_in_its_phase_and_nowhere_else(ranks: list, name: str) -> None:
    number = BEFORE + PHASES.index(name)
    for steps, _, _ in ranks:
        for phase in PHASES:
            others = [step.cpu_s[phase] for i, step in enumerate(steps)
                      if i not in (0, number, BEFORE + PHASES.index(phase))]  # fmt: skip
            more = steps[number].cpu_s[phase] - statistics.median(others)
            if phase == name:
                assert 0.9 * PLANTED_S < more < 1.6 * PLANTED_S, (name, more)
                assert steps[number].wall_s[phase] > 0.9 * PLANTED_S
            else:
                assert abs(more) < 0.4 * PLANTED_S, (name, phase, more)


def test_work_outside_all_phases_is_reported(ranks: list) -> None:
    _, quiet, outside = ranks[0]
    assert outside_share(outside) > outside_share(quiet) + 0.05
    assert too_much_outside(outside) and ", MORE THAN 5" in describe(outside)
    least = outside.info["share"]["other"]
    assert least > 0.05 and outside_share(outside) == pytest.approx(
        sum(outside.info["share"].get(p, 0.0) for p in ("data", "communication", "other"))
    )
