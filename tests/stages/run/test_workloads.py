"""Workloads of a run's stages for the plan: two rows per pair, the rollouts of a group, a reference model if kept."""

import dataclasses

from phimini.parallel.plan.engine import Engine
from phimini.stages.config.recipes import phi4_mini_reasoning
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.run.workloads import workloads


def test_the_papers_stages() -> None:
    w = workloads(phi4_mini_reasoning())
    sizes = {s: (x.sequence_length, x.rows_per_step, x.micro_rows) for s, x in w.items()}
    assert sizes == {
        "midtrain": (16384, 128, 1),
        "sft": (20480, 128, 1),
        "rollout_dpo": (16384, 256, 2),
        "rlvr": (25600, 2048, 1),
    }
    assert [x.extra_forwards for x in w.values()] == [0, 0, 1, 0]
    assert [x.engine for x in w.values()] == [None, None, None, Engine(longest=32_768)]
    assert not any(x.reference_model for x in w.values())
    assert all(x.zero1 and x.fp8 == "none" for x in w.values())


def sampling(run: RunConfig, stage: str) -> tuple[int, int]:
    workload = workloads(run)[stage]
    return workload.samples_per_step, workload.samples_before


def test_answers_are_counted_as_they_may_be_sampled() -> None:
    """Of a hard prompt `oversample_to`, and the probe's; 0 where the pairs are the teacher's."""
    run = phi4_mini_reasoning()
    assert sampling(run, "rlvr") == (128 * 128, 20_000 * 2 * 4)
    assert sampling(run, "rollout_dpo") == sampling(run, "sft") == (0, 0)
    plain = override(run, ["rlvr.rebalance=false", "rollout_dpo.pairs=policy"])
    assert sampling(plain, "rlvr")[0] == 128 * 16
    assert sampling(plain, "rollout_dpo") == (0, 600 * 8)
    assert sampling(override(plain, ["rollout.oversample=1.3"]), "rlvr")[0] == 128 * 21


def test_what_a_setting_changes() -> None:
    run = phi4_mini_reasoning()
    kl = workloads(override(run, ["rlvr.kl_coef=0.1"]))["rlvr"]
    assert kl.reference_model and kl.extra_forwards == 1
    assert workloads(override(run, ["rollout.placement=separate"]))["rlvr"].engine is None
    assert not workloads(override(run, ["overlap=false"]))["sft"].overlap
    assert {x.fp8 for x in workloads(override(run, ["fp8=te"])).values()} == {"auto"}
    assert {x.fp8 for x in workloads(override(run, ["fp8=emulate"])).values()} == {"none"}
    plain = dataclasses.replace(run, distributed_optimizer=False)
    assert not any(x.zero1 for x in workloads(plain).values())
