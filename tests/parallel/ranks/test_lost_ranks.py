"""Ranks that are killed or hang in the middle of a step: the others end within the deadline and name them."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import RankFailure, run_ranks
from parity_cases import (  # noqa: F401
    GROUPS,
    config,
    cross_entropy_head,
    poison_uninitialised_memory,
    share_of,
)

from phimini.parallel.megatron.builder import build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.lost_ranks import LostRanks, closing_or_naming_lost_ranks
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.step import forward_backward

LAYOUTS = {"tp2": Layout(tensor=2), "dp2": Layout()}


def step_with_a_bad_rank(
    layout: Layout, signal_number: int, timeout_s: float, wait_s: float
) -> None:
    """Rank 1 sends itself the signal in backward, between two layers."""
    world = initialize(layout, config(), timeout_s=timeout_s)
    with closing_or_naming_lost_ranks(world, wait_s):
        model = build_model(config(), world, seed=0)
        if world.rank == 1:
            weight = next(p for n, p in model.named_parameters() if "layers.1.mlp.linear_fc1" in n)
            weight.register_hook(lambda _: os.kill(os.getpid(), signal_number))
        model.zero_grad()
        forward_backward(
            model, share_of(GROUPS, world.data_rank, world.data_size), cross_entropy_head
        )
    raise AssertionError("the step ended")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_that_hangs_in_a_step_is_named_once_the_deadline_has_passed(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        RankFailure, match="rank 1 of 2 gave no sign of life within 0.5 s"
    ) as failure:
        run_ranks(step_with_a_bad_rank, 2, LAYOUTS[name], signal.SIGSTOP, 2.0, 0.5, timeout_s=60)
    assert failure.value.error is not None and failure.value.error[0] == "LostRanks"
    assert failure.value.rank == 0, "the one that could still speak"
    assert time.monotonic() - began < 30


def test_without_the_deadline_it_waits() -> None:
    """The negative control of the test above."""
    with pytest.raises(RankFailure, match="rank 0, 1 of 2 did not end within 6 s"):
        run_ranks(
            step_with_a_bad_rank, 2, Layout(tensor=2), signal.SIGSTOP, 600.0, 0.5, timeout_s=6
        )


def lost_rank(folder: Path) -> None:
    world = initialize(Layout(), config(), timeout_s=60)
    try:
        with closing_or_naming_lost_ranks(world, 0.3):
            if world.rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            world.barrier()
            dist.all_reduce(torch.zeros(1))
    except LostRanks as lost:
        (folder / f"{world.rank}").write_text(str(lost.missing))


def test_every_survivor_names_the_killed_rank(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="rank 2 of 3 failed: .*SIGKILL"):
        run_ranks(lost_rank, 3, tmp_path, timeout_s=60)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"0": "[2]", "1": "[2]"}


def raise_on_every_rank(message: str) -> tuple[str, str, bool]:
    world = initialize(Layout(), config(), timeout_s=60)
    try:
        with closing_or_naming_lost_ranks(world, 5.0):
            raise RuntimeError(message)
    except RuntimeError as error:
        return type(error).__name__, str(error), dist.is_initialized()


def test_a_network_that_fails_between_ranks_that_live_is_no_lost_rank() -> None:
    for name, message, _ in run_ranks(raise_on_every_rank, 2, "[gloo/pair.cc:1] Connection reset"):
        assert name == "LostRanks" and "though every rank is alive: [gloo/pair.cc:1]" in message


def test_an_error_of_another_kind_stays_what_it_is_and_the_world_is_closed() -> None:
    got = run_ranks(raise_on_every_rank, 2, "shapes do not match")
    assert got == [("RuntimeError", "shapes do not match", False)] * 2
