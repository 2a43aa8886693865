"""Sampling in slices: a killed probe resumes after the last slice that is on disk."""

import json
from pathlib import Path

import pytest
from forked_ranks import RankFailure, run_ranks
from rl_run import make_run, reinforce, run_config

from phimini.stages.config.schema import RunConfig
from phimini.stages.rl import slices
from phimini.stages.rl.groups import GroupSampler

PROBE = ("rlvr.probe_rounds=2", "rlvr.steps=1")
"""8 prompts, 4 answers each, in two rounds"""


def probing(run: RunConfig, fail_at: int | None) -> list[int]:
    """Run stage 4 with slices of three prompts; raise in the probe's call number `fail_at`. Return the calls' sizes."""
    slices.SLICE = 12
    sample, calls = GroupSampler.sample, []

    def counted(self: GroupSampler, asked: list, step: int, temperature: float, purpose: str, **more):  # fmt: skip
        if purpose == "probe":
            if len(calls) == fail_at:
                raise RuntimeError("killed")
            calls.append(len(asked))
        return sample(self, asked, step, temperature, purpose, **more)

    GroupSampler.sample = counted
    reinforce(run)
    return calls


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_probe_loses_one_slice(ranks: int, tmp_path: Path) -> None:
    whole, cut = (run_config(make_run(tmp_path / name), *PROBE) for name in ("whole", "cut"))
    assert run_ranks(probing, ranks, whole, None)[0] == [12, 12, 8] * 2
    with pytest.raises(RankFailure, match="killed"):
        run_ranks(probing, ranks, cut, 4)
    done = sorted(p.relative_to(cut.out) for p in Path(cut.out).glob("rlvr/probe/*/*"))
    assert [str(p) for p in done] == [
        *(f"rlvr/probe/1/00000{n}.jsonl" for n in (1, 2, 3)), "rlvr/probe/2/000001.jsonl"
    ]  # fmt: skip
    assert run_ranks(probing, ranks, cut, None)[0] == [12, 8], "two slices were left"
    for name in ("pool.json", "model/model.safetensors"):
        one, other = (Path(run.out) / "rlvr" / name for run in (whole, cut))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_damaged_slice_is_refused(tmp_path: Path) -> None:
    run = run_config(make_run(tmp_path / "run"), *PROBE)
    with pytest.raises(RankFailure, match="killed"):
        run_ranks(probing, 1, run, 2)
    path = Path(run.out) / "rlvr" / "probe" / "1" / "000002.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"reward": 1.0}) + "\n" for row in rows))
    with pytest.raises(RankFailure, match="000002.jsonl.*the file is damaged"):
        run_ranks(probing, 1, run, None)


def test_answers_of_another_probe_are_refused(tmp_path: Path) -> None:
    """Slices of another size, as another version of the code might make them."""
    run = run_config(make_run(tmp_path / "run"), *PROBE)
    with pytest.raises(RankFailure, match="killed"):
        run_ranks(probing, 1, run, 3)

    def other_size(run: RunConfig) -> None:
        slices.SLICE = 16
        reinforce(run)

    with pytest.raises(RankFailure, match="probe: expected 8 answers to each of 8 prompts; use --redo"):  # fmt: skip
        run_ranks(other_size, 1, run)
