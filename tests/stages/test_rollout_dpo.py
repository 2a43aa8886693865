"""Stage 3's pairs, and its check that policy and reference are equal at the first step, also in FP8 and bf16."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked_ranks import run_ranks
from rollout_cases import reference

from phimini.model.config import preset
from phimini.model.io.chat import TEMPLATES, encode_example
from phimini.model.io.huggingface import load_reference, save_reference
from phimini.model.io.json_files import read_json, read_rows, write_rows
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.step import StepMetrics
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import CurateConfig, OptimizerSettings, RolloutDpoConfig, override
from phimini.stages.curate import pair_rows
from phimini.stages.data.row_index import index_rows
from phimini.stages.data.selection import preference_pairs
from phimini.stages.rl.pairs import LOGPS, read_pairs
from phimini.stages.rollout_dpo import check_first_step, logps_are_exact, pair_up, rollout_dpo
from phimini.stages.run.outputs import write_summary
from phimini.stages.run.training import layout_of


def make_run(folder: Path) -> None:
    """Write sft/model and curate/pairs.jsonl, as if the earlier stages had run."""
    rng = random.Random(0)

    def numbers(count: int) -> str:
        return " ".join(str(rng.randrange(1000)) for _ in range(count))

    tokenizer = train_tiny_tokenizer([numbers(50) for _ in range(20)], vocab_size=256)
    for stage in ("distill", "curate", "sft"):
        (folder / stage).mkdir(parents=True)
    save_reference(reference(preset("tiny"), 1), folder / "sft" / "model", stop_ids=tokenizer.stop_ids)  # fmt: skip
    tokenizer.save(folder / "sft" / "model", chat_template=TEMPLATES["instruct"])
    answers = [numbers(rng.randrange(10, 60)) for _ in range(64)]
    pairs = [
        {"id": f"p{i}", "problem_id": f"p{i}", "question": numbers(3), "answer": "1", "chosen": chosen, "rejected": rejected}
        for i, (chosen, rejected) in enumerate(zip(answers[::2], answers[1::2], strict=True))
    ]  # fmt: skip
    write_rows(folder / "curate" / "pairs.jsonl", pairs)
    for stage in ("distill", "curate", "sft"):
        write_summary(folder / stage, {"id": stage})


def first_loss(folder: Path, *words: str) -> float:
    """Return the preference loss of the first step after a resume."""
    settings = ("rollout_dpo.pairs=teacher", "rollout_dpo.sequence_length=400")
    run = override(tiny(), [f"out={folder}", *settings, *words])
    rollout_dpo(run, initialize(layout_of(run), preset("tiny")))
    lines = (folder / "rollout_dpo" / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[0])["preference_loss"]


def teachers() -> list[dict]:
    """Return rollouts of one question: right ones, and wrong ones with or without truncation."""
    answers = [
        ("so \\boxed{4}", True), ("hence \\boxed{4}", True), ("so \\boxed{4}", True),
        ("then \\boxed{4}", True), ("ends \\boxed{5}", False), ("was cut", False),
        ("ends \\boxed{5}", False), ("<think>so \\boxed{5}", False),
    ]  # fmt: skip
    return [
        {"id": f"r{k}", "problem_id": "p", "family": "", "level": 0, "question": "q?", "answer": "4",
         "response": response, "correct": right}
        for k, (response, right) in enumerate(answers)
    ]  # fmt: skip


def teacher_pairs(folder: Path) -> list[dict]:
    write_rows(folder / "rollouts.jsonl", teachers())
    index = index_rows(folder / "rollouts.jsonl")
    pairs = preference_pairs(index, CurateConfig(), seed=0)
    return list(pair_rows(index, pairs, np.ones(len(pairs), bool)))


def test_a_rejected_answer_that_was_cut_off_keeps_no_end(tmp_path: Path) -> None:
    tokenizer = train_tiny_tokenizer(["text was cut q? boxed 1234567890"] * 3, vocab_size=256)
    write_rows(tmp_path / "pairs.jsonl", teacher_pairs(tmp_path))
    pairs = read_pairs(tmp_path / "pairs.jsonl", tokenizer, "instruct")
    ends = [tokenizer.end_id, tokenizer.eos_id]
    assert [list(pair.chosen.tokens[-2:]) == ends for pair in pairs] == [True, True, True]
    rejected = [list(pair.rejected.tokens[pair.rejected.loss_from :]) for pair in pairs]
    assert rejected == [
        tokenizer.encode("ends \\boxed{5}") + ends,
        tokenizer.encode("was cut"),
        tokenizer.encode("<think>so \\boxed{5}"),
    ]


def test_the_teachers_pairs_have_no_text_twice_and_are_limited(tmp_path: Path) -> None:
    pairs = teacher_pairs(tmp_path)
    assert len({p["chosen"] for p in pairs}) == len({p["rejected"] for p in pairs}) == len(pairs) == 3  # fmt: skip
    tokenizer = train_tiny_tokenizer(["q?"] * 3, vocab_size=256)
    other = [row | {"problem_id": "other"} for row in pairs]
    write_rows(tmp_path / "pairs.jsonl", [*pairs, *other])
    taken = [
        len(read_pairs(tmp_path / "pairs.jsonl", tokenizer, "instruct", most)) for most in (1, 2, 9)
    ]
    assert taken == [2, 4, 6]


def test_the_teachers_pairs_are_limited_in_the_stage(tmp_path: Path) -> None:
    make_run(tmp_path)
    rows = read_rows(tmp_path / "curate" / "pairs.jsonl", {})
    write_rows(tmp_path / "curate" / "pairs.jsonl", [row | {"problem_id": "one"} for row in rows])
    write_summary(tmp_path / "curate", {"id": "curate"})
    run_ranks(
        first_loss, 1, tmp_path, "rollout_dpo.pairs_per_prompt=3", "rollout_dpo.pairs_per_step=2"
    )
    assert read_json(tmp_path / "rollout_dpo" / "summary.json")["pairs"] == 3


def summed_logps(folder: Path, stage: str, row: dict, side: str) -> float:
    """Return the log-prob of an answer under a stage's exported model, by the reference."""
    directory = folder / stage / "model"
    tokenizer = Tokenizer.load(directory)
    ids, loss_from = encode_example(tokenizer, row["question"], row[side])
    model = load_reference(directory, dtype=torch.float32)
    with torch.no_grad():
        logp_TV = model.logits(model(torch.tensor([ids[:-1]])))[0].log_softmax(-1)
    each = logp_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return float(each[loss_from - 1 :].sum())


def test_the_log_probs_of_pairs_before_and_after_are_written(tmp_path: Path) -> None:
    make_run(tmp_path)
    run_ranks(first_loss, 1, tmp_path, "rollout_dpo.pairs_per_step=4", "rollout_dpo.epochs=0.25")
    logps = np.load(tmp_path / "rollout_dpo" / LOGPS)
    rows = read_rows(tmp_path / "curate" / "pairs.jsonl", {})
    assert logps.shape == (len(rows), 2, 2)
    expected = [
        [summed_logps(tmp_path, stage, rows[3], side) for side in ("chosen", "rejected")]
        for stage in ("sft", "rollout_dpo")
    ]
    assert logps[3] == pytest.approx(np.array(expected), rel=1e-4)
    assert abs(logps[:, 1] - logps[:, 0]).min() > 1e-3, "training changed every log-prob"


def test_a_models_own_pairs_have_no_text_twice() -> None:
    rows = [row | {"response_tokens": "AQAAAA=="} for row in teachers()]
    pairs = pair_up(rows, 9, seed=0)
    assert len({p["chosen"] for p in pairs}) == len({p["rejected"] for p in pairs}) == len(pairs) == 3  # fmt: skip


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_stage_3_starts_in_emulated_fp8(recipe: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    # Steps of 3 pairs: other micro-batches than the reference's.
    words = ("fp8=emulate", f"fp8_recipe={recipe}", "rollout_dpo.pairs_per_step=3")
    loss = run_ranks(first_loss, 1, tmp_path, *words)[0]
    off = abs(loss - math.log(2))
    # One scale for a whole micro-batch: a log-prob depends on what else is in it.
    assert off > 1e-3 if recipe == "tensorwise" else off <= 1e-4


def test_another_reference_is_seen_in_every_precision() -> None:
    def metrics(off: float) -> StepMetrics:
        return StepMetrics(loss_sum=0.0, count=2.0, metrics={"preference_loss": 2 * (math.log(2) + off)})  # fmt: skip

    dpo = RolloutDpoConfig(optimizer=OptimizerSettings(lr=1e-3))
    check_first_step(metrics(9e-4), dpo, exact=True)
    check_first_step(metrics(-0.04), dpo, exact=False)
    for off, exact in ((2e-3, True), (-2e-3, True), (0.06, False), (math.nan, False)):
        with pytest.raises(RuntimeError, match="expected ln 2"):
            check_first_step(metrics(off), dpo, exact=exact)


def test_another_reference_is_seen_with_ipo() -> None:
    ipo = RolloutDpoConfig(optimizer=OptimizerSettings(lr=1e-3), loss="ipo", beta=0.5)
    metrics = lambda margin: StepMetrics(
        loss_sum=0.0, count=2.0, metrics={"preference_loss": 2 * ((margin - 0.5) / 0.5) ** 2}
    )
    check_first_step(metrics(0.0), ipo, exact=True)
    for margin in (3e-3, -3e-3):
        with pytest.raises(RuntimeError, match=r"expected 1 / \(2 beta\)\^2 = 1\.000000"):
            check_first_step(metrics(margin), ipo, exact=True)


@pytest.mark.parametrize(
    "dtype, words, exact",
    [
        (torch.float32, [], True),
        (torch.float32, ["fp8=emulate", "fp8_recipe=blockwise"], True),
        (torch.float32, ["fp8=emulate", "fp8_recipe=tensorwise"], False),
        (torch.bfloat16, [], False),
    ],
)
def test_where_log_probs_depend_on_the_micro_batch(
    dtype: torch.dtype, words: list[str], exact: bool
) -> None:
    model: Any = SimpleNamespace(
        world=SimpleNamespace(device=torch.device("cpu")),
        chunks=[torch.nn.Linear(2, 2, dtype=dtype)],
    )
    assert logps_are_exact(override(tiny(), words), model) is exact
