"""A run's stages as the plan sees them: a pair is two rows, a group is its rollouts, a reference only where one is kept."""

import dataclasses

from phimini.stages.config import override
from phimini.stages.recipes import phi4_mini_reasoning
from phimini.stages.workloads import workloads


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
    assert [x.rollout_sequences for x in w.values()] == [0, 0, 0, 8]
    assert not any(x.reference_model for x in w.values())
    assert all(x.zero1 and x.fp8 == "none" for x in w.values())


def test_what_a_setting_changes() -> None:
    run = phi4_mini_reasoning()
    kl = workloads(override(run, ["rlvr.kl_coef=0.1"]))["rlvr"]
    assert kl.reference_model and kl.extra_forwards == 1
    assert workloads(override(run, ["rollout.placement=separate"]))["rlvr"].rollout_sequences == 0
    assert {x.fp8 for x in workloads(override(run, ["fp8=te"])).values()} == {"auto"}
    assert {x.fp8 for x in workloads(override(run, ["fp8=emulate"])).values()} == {"none"}
    plain = dataclasses.replace(run, distributed_optimizer=False)
    assert not any(x.zero1 for x in workloads(plain).values())
