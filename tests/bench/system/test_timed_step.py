"""The timed step of `phimini bench step`, with the tiny model on a CPU: the code that a GPU runs, but for its clock."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from forked_ranks import run_ranks

from phimini.bench.ops import harness
from phimini.bench.system import step, timed_step
from phimini.bench.system.step_work import STAGES, batch_of, lengths_for, lengths_of
from phimini.model.config import preset, training_flops

SMALL = ["--timed", "--model", "tiny", "--lengths", "24", "--rounds", "3"]
SECONDS = [0.4, 0.2, 0.3]
"""of the patched clock: three steps, and then three updates"""


def patched_main(words: list[str], broken: str = "") -> int:
    """Run the command in this rank with a known clock and a known peak, and with a stage that fails."""
    timed_step.seconds_of = lambda device, run, rounds: [run(), SECONDS][1]
    timed_step.PEAKS = {harness.device_name(torch.device("cpu")): (1e12, 1e11)}
    row = timed_step.TimedStep.row

    def fails(self: timed_step.TimedStep, stage: str, *args: Any) -> timed_step.Row:
        if stage == broken:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return row(self, stage, *args)

    with patch.object(timed_step.TimedStep, "row", fails):
        return step.main(words)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_speed_and_mfu_follow_from_the_measured_time(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    words = [*SMALL, "--profile", str(tmp_path / "traces"), "--json", str(path)]
    assert run_ranks(patched_main, 1, words) == [0]
    rows = rows_of(path)
    assert [row["stage"] for row in rows] == list(STAGES)
    for row in rows:
        # The median step has two micro-batches, and an update is shared by sixteen.
        assert row["micro_batch_ms"] == 150 and row["optimizer_ms"] == 300
        assert row["step_ms"] == 150 + 300 / 16
        tokens, seconds = sum(row["lengths"]), row["step_ms"] / 1e3
        assert tokens == 24 and row["tokens_per_second"] == pytest.approx(tokens / seconds, 1e-3)
        cuts = torch.tensor([0, *row["lengths"]]).cumsum(0)
        flops = training_flops(preset("tiny"), cuts)
        assert row["mfu"] == pytest.approx(flops / seconds / 1e12, abs=1e-4) and flops > 1e6
        assert row["peak_bytes"] > 0 and row["loss"] != 0
        assert sum(row["share"].values()) == pytest.approx(1, abs=0.01)
        assert (tmp_path / "traces" / f"{row['stage']}.json.gz").stat().st_size > 1000
    lengths = {row["stage"]: row["lengths"] for row in rows}
    assert lengths["rollout_dpo"] == [12, 12] and lengths["rlvr"] == [24]
    # An untrained model of small weights is near the uniform guess.
    assert rows[0]["loss"] == pytest.approx(math.log(preset("tiny").vocab_size), rel=0.1)


def test_a_stage_that_fails_leaves_the_rows_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    words = ["midtrain", "sft", "rlvr", *SMALL, "--json", str(path)]
    assert run_ranks(patched_main, 1, words, "sft") == [1]
    assert [row["stage"] for row in rows_of(path)] == ["midtrain", "rlvr"]


def test_a_clock_measures_each_of_the_calls() -> None:
    times = timed_step.seconds_of(torch.device("cpu"), lambda: sum(range(10**5)), 4)
    assert len(times) == 4 and all(t > 0 for t in times)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("16384", [16384]), ("4x4096", [4096] * 4), ("8000,300", [8000, 300]), ("2x3,5", [3, 3, 5])],
)
def test_lengths_are_read(text: str, lengths: list[int]) -> None:
    assert lengths_of(text) == lengths


def test_lognormal_lengths_fill_the_tokens_and_have_their_median() -> None:
    lengths = lengths_of("lognormal(500, 0.8, 400000)")
    assert sum(lengths) == 400_000 and min(lengths) >= 2
    assert lengths == lengths_of("lognormal(500,0.8,400000)")
    logs = torch.tensor(lengths[:-1]).double().log()
    assert logs.median().exp().item() == pytest.approx(500, rel=0.1)
    assert logs.std().item() == pytest.approx(0.8, rel=0.1)


@pytest.mark.parametrize("text", ["", "1", "4x", "x3", "lognormal(5,1)", "lognormal(0,1,3)", "-4"])
def test_bad_lengths_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="bench step: lengths: expected numbers of at least 2"):
        lengths_of(text)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_has_random_tokens_and_the_stages_fields(stage: str) -> None:
    batch = batch_of(stage, lengths_for(stage, [301]), 1000)
    assert len(batch.tokens_T.unique()) > 200 and batch.num_tokens == 301
    assert batch.num_documents == (2 if stage == "rollout_dpo" else 1)
    assert 0 <= batch.tokens_T.min() and batch.targets_T.max() < 1000
    assert ("reference_logp" in batch.document_fields) == (stage == "rollout_dpo")
    assert ("old_logp" in batch.fields) == (stage == "rlvr")
