"""The mismatch measure, the importance weights and the diagnosis, without an engine that takes seconds to start."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from forked_ranks import run_ranks
from rollout_cases import LONG, SAMPLING, cases, prompts, sampled_by, trainer
from torch import Tensor

from phimini.parallel.ranks.layout import Layout
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rl import mismatch_diagnosis as mismatch_doctor
from phimini.stages.rl.mismatch import (
    ALARM_LEVELS,
    Mismatch,
    MismatchMeter,
    alarm_level,
    importance_of,
    importance_weights,
)
from phimini.stages.rl.mismatch_diagnosis import Verdict, diagnose
from phimini.stages.rollout.engine import LocalEngine


# --- the measure -----------------------------------------------------------------------------------
def measured(layout: Layout, d_M: Tensor, age_M: Tensor, counts_M: Tensor) -> Mismatch:
    """Measure with every other row on each data rank, in two micro-batches; ranks of a replica see the same rows."""
    from phimini.parallel.ranks.world import initialize

    world = initialize(layout, LONG)
    meter = MismatchMeter()
    mine = slice(world.data_rank, None, world.data_size)
    if world.is_last_stage:
        for part in range(2):
            meter.add(d_M[mine][part::2], age_M[mine][part::2], counts_M[mine][part::2])
    result = meter.collect(world)
    return result


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(data=2), Layout(tensor=2), Layout(pipeline=2)],
    ids=["1", "dp2", "tp2", "pp2"],
)
def test_every_layout_measures_the_same(layout: Layout) -> None:
    d_M = torch.randn(41) * torch.logspace(-4, 0.5, 41)
    age_M, counts_M = torch.randint(0, 3, (41,)), torch.rand(41) < 0.8
    fresh = counts_M & (age_M == 0)
    d = d_M[fresh].double()
    world_size = layout.model_size * (layout.data or 1)
    for got in run_ranks(measured, world_size, layout, d_M, age_M, counts_M):
        assert got.tokens == int(fresh.sum()) and got.stale_tokens == int(
            (counts_M & (age_M > 0)).sum()
        )
        assert got.mean_abs == pytest.approx(d.abs().mean().item(), rel=1e-12)
        assert got.max_abs == pytest.approx(d.abs().max().item(), rel=1e-12)
        assert got.kl == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-9)
        assert got.shares == tuple((d.abs() > t).double().mean().item() for t in (0.01, 0.1))
        assert got.max_age == int(age_M[counts_M].max())


def test_the_alarm_is_by_precision_and_hears_nan() -> None:
    fine = Mismatch(
        tokens=5, mean_abs=2e-3, max_abs=1.0, kl=0.0, shares=(0, 0), stale_tokens=0, max_age=0
    )
    assert fine.exceeds(alarm_level(None, "float32")) and not fine.exceeds(
        alarm_level(None, "bfloat16")
    )
    assert not fine.exceeds(alarm_level(0.5, "float32"))
    assert dataclasses.replace(fine, mean_abs=math.nan).exceeds(1e9)
    assert not dataclasses.replace(fine, tokens=0, mean_abs=math.nan).exceeds(1e-9)
    assert ALARM_LEVELS["float32"] < ALARM_LEVELS["bfloat16"] < ALARM_LEVELS["fp8"]


def test_what_was_not_measured_is_not_in_the_log() -> None:
    some = Mismatch(tokens=5, mean_abs=0.0, max_abs=0.0, kl=0.0, shares=(0, 0), stale_tokens=7, max_age=1)  # fmt: skip
    assert some.row()["mismatch"] == 0 and some.row()["stale_tokens"] == 7
    assert dataclasses.replace(some, tokens=0).row() == {"stale_tokens": 7, "max_age": 1}


# --- importance weights ----------------------------------------------------------------------------
D_M = torch.tensor([0.5, -1.0, 3.0, 5e-5, 0.2, 0.3, -0.1])
COUNTS_M = torch.tensor([1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
DOCUMENTS_M = torch.tensor([0, 0, 1, 1, 2, 2, 2])


def weighed(mode: str) -> list[float]:
    return importance_weights(
        D_M,
        COUNTS_M,
        mode,
        cap=2.0,
        low=0.5,
        documents_M=DOCUMENTS_M,
        num_documents=3,
        rounding=1e-4,
    ).tolist()


def test_importance_weights_by_name() -> None:
    e = math.exp
    token = [e(0.5), e(-1), 2.0, 1.0, e(0.2), 1.0, e(-0.1)]
    assert weighed("token_truncated") == pytest.approx(token)
    assert weighed("token_masked") == pytest.approx([e(0.5), 0, 0, 1, e(0.2), 1, e(-0.1)])
    assert weighed("sequence_truncated") == pytest.approx([e(-0.5)] * 2 + [2.0] * 2 + [e(0.1)] * 3)
    assert weighed("sequence_masked") == pytest.approx([e(-0.5)] * 2 + [0.0] * 2 + [e(0.1)] * 3)
    with pytest.raises(ValueError, match="got 'tokens'"):
        weighed("tokens")


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], "off"),
        (["rollout.asynchronous=true"], "token_truncated"),
        (["rollout.asynchronous=true", "rlvr.importance=off"], "off"),
        (["rlvr.importance=sequence_masked"], "sequence_masked"),
    ],
)
def test_answers_of_older_weights_are_weighed_unless_told_otherwise(
    words: list[str], mode: str
) -> None:
    assert importance_of(override(tiny(), words)) == mode


def test_rounding_weighs_exactly_one() -> None:
    d_M = torch.randn(1000).clamp(-1, 1) * 1e-4
    for mode in ("token_truncated", "token_masked", "sequence_truncated", "sequence_masked"):
        w_M = importance_weights(
            d_M, torch.ones(1000, dtype=torch.bool), mode, cap=2.0, low=0.5,
            documents_M=torch.zeros(1000, dtype=torch.long), num_documents=1, rounding=1e-4,
        )  # fmt: skip
        assert bool((w_M == 1).all()), mode


# --- the doctor ------------------------------------------------------------------------------------
class Rounded(LocalEngine):
    """An engine that computes with weights of half the precision."""

    def sync(self, model) -> None:
        super().sync(model)
        for p in self._model.parameters():
            p.data.copy_(p.data.bfloat16())


class OtherFunction(LocalEngine):
    """An engine with a different attention."""

    def sync(self, model) -> None:
        super().sync(model)
        for name, p in self._model.named_parameters():
            if name.endswith("o_proj.weight"):
                p.data.mul_(-1)


class Slept(LocalEngine):
    """An engine whose first answers are wrong, and which then releases its memory to the trainer."""

    asleep, answered = False, False

    def sleep(self) -> None:
        self.asleep = True

    def sync(self, model) -> None:
        super().sync(model)
        self.asleep = False

    def generate(self, *args):
        if self.asleep:
            raise RuntimeError("sync comes first")
        done = super().generate(*args)
        if self.answered:
            return done
        self.answered = self.asleep = True
        return [c and dataclasses.replace(c, logprobs=c.logprobs - np.float32(0.2)) for c in done]


def examined(engine_type: type[LocalEngine]) -> Verdict:
    model = trainer(LONG, Layout(), 1)
    engine = engine_type(LONG, model.world, 16)
    engine.sync(model)
    asked = prompts()
    done = sampled_by(engine, asked, SAMPLING, list(range(len(asked))))
    found = cases(asked, done, SAMPLING.temperature)
    return diagnose(engine, model, found)


def cause(engine_type: type[LocalEngine]) -> Verdict:
    return run_ranks(examined, 1, engine_type)[0]


def test_the_doctor_finds_nothing_where_nothing_is() -> None:
    assert cause(LocalEngine).cause == "none"


def test_the_doctor_names_precision() -> None:
    verdict = cause(Rounded)
    assert verdict.cause == "precision", verdict.page()


def test_the_doctor_wakes_an_engine_that_sleeps_while_the_trainer_trains() -> None:
    verdict = cause(Slept)
    assert verdict.cause == "stale weights" and "when it slept" in verdict.page(), verdict.page()


def test_the_doctor_blames_the_engine_last() -> None:
    verdict = cause(OtherFunction)
    assert verdict.cause == "engine", verdict.page()
    assert len(verdict.evidence) > 15, "every hypothesis was asked"


def test_the_doctor_blames_a_trainer_that_differs_from_the_reference() -> None:
    def run() -> Verdict:
        own = mismatch_doctor.trainer_logprobs
        mismatch_doctor.trainer_logprobs = lambda model, cases: own(model, cases) + 0.3
        return examined(LocalEngine)

    assert run_ranks(run, 1)[0].cause == "trainer kernel"


def test_the_doctor_wants_answers() -> None:
    with pytest.raises(ValueError, match="at least one sampled answer"):
        diagnose(None, None, [])  # pyright: ignore[reportArgumentType]
