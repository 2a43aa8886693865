"""`phimini bench train` runs the real stages, and its phases, FLOPs and rows are what it says they are."""

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks

from phimini.bench.gate.rows import Row, read
from phimini.bench.system.train import STAGES, bench, main, timed_collectives
from phimini.bench.system.train_rows import RankResult, describe, job_steps, make_row
from phimini.model.config import head_flops_per_token, layer_flops_per_token, preset
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.timing import PHASES, Recorder, Step, step_done
from phimini.stages.config.recipes import tiny

SMALL = [
    "distill.num_problems=60", "distill.num_prompts=30", "curate.sft_examples=60", "rlvr.prompts_per_step=4",
    "rlvr.max_new_tokens=16", "rlvr.min_rollouts=2", "rlvr.probe_prompts=8", "sft.examples_per_step=8",
    "rollout_dpo.pairs_per_step=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """Of one command, as a user calls it, in which no number may be odd."""
    folder = tmp_path_factory.mktemp("train")
    path = folder / "rows.jsonl"
    assert main([*STAGES, *SMALL, "--steps", "5", "--json", str(path), "--profile", str(folder)]) == 0  # fmt: skip
    for stage in STAGES:
        with gzip.open(folder / f"{stage}-rank0.trace.json.gz") as trace:
            names = {event.get("name", "") for event in json.load(trace)["traceEvents"]}
        # A product's: torch's, or (on a CPU, `kernels/linear.py`) oneDNN's.
        assert any("mm" in name or "linear" in name for name in names), sorted(names)
    return {str(row.case["stage"]): row for row in read(path)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_row_that_can_be_compared(rows: dict[str, Row], stage: str) -> None:
    row = rows[stage]
    assert row.correct and row.value and row.ratio and len(row.samples) == 5
    assert row.unit == ("samples/cpu_s" if stage == "rlvr" else "tokens/cpu_s")
    assert row.peak_bytes and row.info["peak_rss_bytes"] > row.peak_bytes
    assert row.info["mfu"] is None, "no MFU for a CPU"
    assert f"{row.value.p50:,.0f} {row.unit}" in describe(row)


@pytest.mark.parametrize("stage", STAGES)
def test_the_phases_are_the_step(rows: dict[str, Row], stage: str) -> None:
    share = rows[stage].info["share"]
    assert sum(share.values()) == pytest.approx(1) and share.keys() <= set(PHASES)
    expected = {"data", "forward", "head", "backward", "communication", "optimizer", "other"}
    if stage == "rlvr":
        expected |= {"rollout", "verify", "sync"}
    assert share.keys() == expected
    assert share["backward"] > share["head"]
    # 0.97 to 0.98 measured; of a step this small bookkeeping is a larger part than of any real one.
    assert rows[stage].info["essential_share"] > 0.85


def test_the_flops_are_those_of_the_tokens(rows: dict[str, Row]) -> None:
    config, info = preset("tiny"), rows["midtrain"].info
    training_s = info["step_seconds"]
    per_token = info["flops_per_second"] * training_s / info["tokens_per_step"]
    least = 3 * layer_flops_per_token(config)
    # All trained, with attention over 256 keys, is the most there can be; medians are of different steps.
    most = least + 3 * head_flops_per_token(config) + 12 * 4 * 4 * 32 * 128
    assert 0.8 * least < per_token < 1.3 * most


def test_memory_is_the_same_in_every_run(rows: dict[str, Row]) -> None:
    again = bench("midtrain", SMALL, steps=5)
    assert again.peak_bytes == rows["midtrain"].peak_bytes
    assert again.key == rows["midtrain"].key


def test_two_ranks_count_their_tokens_once(rows: dict[str, Row]) -> None:
    one = rows["sft"].info
    for layout in ("tensor_parallel=2", "processes=2"):
        two = bench("sft", [*SMALL, "processes=2", layout], steps=5)
        assert two.info["tokens_per_step"] == pytest.approx(one["tokens_per_step"], abs=2)
        assert two.case["ranks"] == 2
        assert two.info["first_loss"] == pytest.approx(one["first_loss"], abs=2e-4)
        # What ranks say to each other is seen wherever it is said: here inside the layers.
        assert two.info["share"]["communication"] > one["share"]["communication"]


def test_a_replica_s_ranks_are_one_and_replicas_add_up() -> None:
    step = Step(Counter(forward=2), Counter(forward=1), Counter(tokens=10, flops=100))
    (tensor,) = job_steps([[step], [step]], model_size=2, cuda=False)
    (data,) = job_steps([[step], [step]], model_size=1, cuda=False)
    (gpu,) = job_steps([[step], [step]], model_size=1, cuda=True)
    assert (tensor.counts["tokens"], tensor.total_s) == (10, 2.0)
    assert (data.counts["flops"], data.total_s) == (200, 2.0)
    assert (gpu.counts["tokens"], gpu.total_s) == (20, 2.0)


def test_the_layout_is_the_runs_own() -> None:
    row = bench("midtrain", [*SMALL, "processes=2", "context_parallel=2", "context_keys=ring"], steps=5)  # fmt: skip
    assert (row.case["context"], row.case["context_keys"]) == (2, "ring") and row.correct


@pytest.mark.parametrize(("stage", "unit"), [("sft", "tokens/s"), ("rlvr", "samples/s")])
def test_on_a_gpu_a_row_is_per_second_of_wall_time(
    stage: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    counts = Counter(tokens=20, samples=4, sampled_tokens=8, flops=10**12)
    steps = [Step(wall_s=Counter(forward=2), cpu_s=Counter(forward=9), counts=counts)] * 5
    rank = RankResult(
        steps=steps, marked=steps, gemm_flops=[1e12] * 5, peak_bytes=1, peak_rss_bytes=None, model_size=1
    )  # fmt: skip
    world: Any = SimpleNamespace(device=torch.device("cuda"), layout=Layout())
    log = [{"loss": 1.0, "grad_norm": 1.0}]
    row = make_row(tiny(), stage, world, [rank], log, "coin" if stage == "rlvr" else None)
    assert (row.unit, row.value and row.value.p50) == (unit, 10.0 if stage == "sft" else 2.0)
    assert row.info["mfu"] == pytest.approx(0.5e12 / 989e12)
    said = "% of dense bf16 with FlashAttention 2, which is not made for this GPU"
    assert said in describe(row), "no MFU of a GPU without its attention's name"


def test_a_collective_is_communication() -> None:
    def rank() -> float:
        torch.distributed.init_process_group("gloo")
        with timed_collectives(), Recorder(torch.device("cpu")) as recorder:
            torch.distributed.all_reduce(torch.ones(4))
            step_done()
        return recorder.steps[0].wall_s["communication"]

    assert min(run_ranks(rank, 2)) > 0


def test_bad_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pretrain: expected one of midtrain, sft, dpo, rlvr"):
        main(["pretrain"])
    with pytest.raises(ValueError, match="expected a finished stage base, found none"):
        bench("midtrain", [], source=tmp_path)
