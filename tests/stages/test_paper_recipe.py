"""The recipes in miniature: the same functions, a tiny base model, two steps of each stage, on a CPU."""

from pathlib import Path

import pytest
from forked_ranks import run_ranks
from rollout_cases import reference

from phimini.model.config import preset
from phimini.model.io.chat import TEMPLATES
from phimini.model.io.huggingface import save_reference
from phimini.model.io.json_files import read_json, read_rows, write_rows
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.stages.cli import main
from phimini.stages.config.recipes import RECIPES
from phimini.stages.config.schema import to_dict
from phimini.stages.data.arithmetic_problems import generate_problems, teach
from phimini.stages.recipe import TRAINING
from phimini.stages.verify import verdict as scorer

MINIATURE = [
    "model=tiny", "context_parallel=1",
    "distill.num_heldout=4", "distill.num_validation=4", "distill.num_prompts=8", "curate.sft_examples=8",
    "midtrain.epochs=none", "midtrain.steps=2", "midtrain.sequence_length=256", "midtrain.rows_per_step=2",
    "sft.epochs=1", "sft.examples_per_step=4", "sft.sequence_length=256",
    "rollout_dpo.pairs_per_step=11", "rollout_dpo.sequence_length=256",
    "rlvr.steps=2", "rlvr.prompts_per_step=2", "rlvr.rollouts_per_prompt=4", "rlvr.probe_prompts=8",
    "rlvr.oversample_to=8", "rlvr.max_new_tokens=16", "rlvr.sequence_length=256", "rlvr.min_rollouts=2",
    "rlvr.max_accuracy=0.9", "evaluate.max_new_tokens=16",
    "rollout.engine=local", "rollout.max_batch=32",
]  # fmt: skip


MICRO_SIZES = {
    "midtrain": "micro_rows", "sft": "micro_tokens", "rollout_dpo": "micro_tokens", "rlvr": "micro_tokens"
}  # fmt: skip


def rollouts(count: int) -> list[dict]:
    """Return four rollouts of a fallible teacher per question, correct and wrong ones."""
    return [
        {"id": f"{p.id}/{k}", "family": p.family, "level": p.level, "question": p.question, "answer": p.answer,
         "response": teach(p, k, quick=0.9, slip=0.4)}
        for p in generate_problems(5, count)
        for k in range(4)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return base= and distill=: a tiny model's folder and a file of rollouts."""
    folder = tmp_path_factory.mktemp("paper")
    rows = rollouts(40)
    write_rows(folder / "rollouts.jsonl", rows)
    texts = [row["question"] + row["response"] for row in rows]
    tokenizer = train_tiny_tokenizer(texts, vocab_size=256)
    save_reference(reference(preset("tiny"), 1), folder / "base", stop_ids=tokenizer.stop_ids)
    tokenizer.save(folder / "base", chat_template=TEMPLATES["reasoning"])
    return [
        f"base={folder / 'base'}",
        f"distill.source={folder / 'rollouts.jsonl'}",
        f"out={folder / 'run'}",
    ]


def command(words: list[str]) -> int:
    """Run the command in another process, with a coin as reward, because an untrained model has no right answer."""
    scorer.is_right = lambda question, answer, response, finish_reason: len(response) % 2 == 0
    return main(words)


def test_two_steps_of_every_stage(inputs: list[str]) -> None:
    words = ["recipe", "phi4_mini_reasoning", *inputs, *MINIATURE]
    assert run_ranks(main, 1, [*words, "--dry-run", "gpus=2"])[0] == 0
    assert run_ranks(command, 2, words, timeout_s=600) == [0, 0]
    run = Path(inputs[2].removeprefix("out="))
    for stage in TRAINING:
        assert read_json(run / stage / "summary.json")["steps"] == 2
        assert (run / stage / "model" / "config.json").exists()
    results = read_json(run / "results.json")
    assert [row["stage"] for row in results["stages"]] == ["base", *TRAINING]
    held, trained = (
        {row["question"] for row in read_rows(run / "distill" / name, {"question": str})}
        for name in ("heldout.jsonl", "rollouts.jsonl")
    )
    assert len(held) == 4 and not held & trained


SHARED = [
    word for word in MINIATURE if not word.startswith(("model=", "rollout_dpo.pairs_per_step="))
]
ON_DATA_RANKS: dict[str, list[str]] = {
    "phi4_mini_reasoning": MINIATURE,
    "tiny": [*SHARED, "distill.num_problems=20", "distill.rollouts_per_problem=2", "rollout_dpo.pairs=teacher",
             "rollout_dpo.epochs=1", "rollout_dpo.pairs_per_step=4"],
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_own_micro_batches_run_on_three_data_ranks(
    name: str, inputs: list[str], tmp_path: Path
) -> None:
    """The batches do not divide by 3, and stage 1's two rows leave one rank without a row."""
    given = inputs[:2] if name == "phi4_mini_reasoning" else []
    words = ["recipe", name, *given, f"out={tmp_path}", *ON_DATA_RANKS[name]]
    assert run_ranks(command, 3, words, timeout_s=600) == [0] * 3
    made, own = read_json(tmp_path / "config.json"), to_dict(RECIPES[name]())
    for stage, field in MICRO_SIZES.items():
        assert made[stage][field] == own[stage][field]
        assert read_json(tmp_path / stage / "summary.json")["steps"] >= 1
    used = [row["used_rollouts"] for row in read_rows(tmp_path / "rlvr" / "metrics.jsonl", {})]
    assert any(used)


def test_a_file_with_too_few_questions_is_named(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["distill", "phi4_mini_reasoning", *inputs[:2], f"out={tmp_path}"]
    assert main([*words, "distill.num_heldout=36", "distill.num_validation=4"]) == 2
    assert "40 different questions; num_heldout=36" in capsys.readouterr().err
