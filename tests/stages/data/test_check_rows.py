"""A user's files before stage 1: all rows are read, control tokens and lengths too; later stages' needs are asked."""

import json
from pathlib import Path

import pytest

from phimini.model.io.chat import encode_example
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.stages.config.recipes import recipe_config
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.curate import curate
from phimini.stages.data import check_rows
from phimini.stages.data.token_files import shards_of, write_shard
from phimini.stages.distill import distill
from phimini.stages.rl.groups import check_room

TOKENIZER = train_tiny_tokenizer(["Is 12 odd? a: \\boxed{0}"])


def rollouts(number: int = 60, right: bool = True) -> list[dict]:
    return [
        {"question": f"Is {n} odd?", "answer": str(n % 2), "response": f"{k}: \\boxed{{{n % 2 if right or k == 'a' else 2}}}"}
        for n in range(1000, 1000 + number)
        for k in "ab"
    ]  # fmt: skip


def check_files(run: RunConfig, source: Path, tokenizer: Tokenizer | None) -> list[str]:
    return check_rows.check_files(
        run, source, tokenizer, lambda prompts: check_room(prompts, run.rlvr, "rlvr"), told=print
    )


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    words = [f"out={tmp_path / 'run'}", f"distill.source={tmp_path / 'rows.jsonl'}", "distill.num_heldout=5", "distill.num_validation=5"]  # fmt: skip
    return override(recipe_config("tiny"), words)


@pytest.mark.parametrize("tokenizer", [None, TOKENIZER], ids=["tokenizer to be trained", "given"])
def test_a_bad_row_deep_in_a_file_is_found(tokenizer, run: RunConfig, tmp_path: Path) -> None:
    rows = rollouts(200)
    path = write(tmp_path / "rows.jsonl", rows)
    assert check_files(run, path, tokenizer) == []
    rows[333]["response"] = "x " * 60 + "<|endoftext|> is the end"
    rows[350]["level"] = "hard"
    [message] = check_files(run, write(path, rows), tokenizer)
    control, level = message.split("; ")
    assert "line 334, response: expected plain text, got the control token <|endoftext|> in " in control  # fmt: skip
    assert control.endswith("'x x x x x x x x x x <|endoftext|> is the end'")
    assert "line 351, field 'level'" in level


def test_a_character_without_a_token_is_found(run: RunConfig, tmp_path: Path) -> None:
    rows = [*rollouts(), {"question": "ß?", "answer": "1", "response": "\\boxed{1}"}]
    [message] = check_files(run, write(tmp_path / "rows.jsonl", rows), TOKENIZER)
    assert "line 121, tokenizer: cannot encode 'ß'" in message


def test_rows_that_are_too_long_are_counted(run: RunConfig, tmp_path: Path) -> None:
    """Of the correct ones: stage 1 trains on no others."""
    rows = rollouts()
    for k in (3, 7):
        rows[k]["response"] = "a" * 400 + rows[k]["response"]
    rows[9] |= {"response": "a" * 500, "finish_reason": "length"}
    path = write(tmp_path / "rows.jsonl", rows)
    limited = override(run, ["midtrain.sequence_length=1024", "sft.sequence_length=300"])
    [message] = check_files(limited, path, TOKENIZER)
    assert ": 2 of the 120 longest rows exceed sft.sequence_length=300, e.g. 'rows.jsonl:" in message  # fmt: skip
    assert check_files(override(limited, ["sft.sequence_length=1024"]), path, TOKENIZER) == []


def test_a_prompt_without_room_for_an_answer_is_found(run: RunConfig, tmp_path: Path) -> None:
    asked = [{"question": "a" * n, "answer": "1", "response": 5} for n in (4, 2000)]
    for name in ("rollouts", "validation"):
        write(tmp_path / f"{name}.jsonl", rollouts(2))
    for name in ("prompts", "heldout"):
        write(tmp_path / f"{name}.jsonl", asked)
    [message] = check_files(run, tmp_path, TOKENIZER)
    assert message.startswith("prompts.jsonl, 'prompts.jsonl:2': ") and "rlvr.sequence_length" in message  # fmt: skip


def test_only_correct_rollouts_and_the_teachers_pairs_end_before_stage_1(
    run: RunConfig, tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl", rollouts())
    teacher = override(run, ["rollout_dpo.pairs=teacher"])
    distill(run)
    with pytest.raises(ValueError, match=r"rollout_dpo.pairs=teacher: no question has a correct and an incorrect rollout"):  # fmt: skip
        curate(teacher)
    curate(run)
    with pytest.raises(
        ValueError, match=r"rollout_dpo.pairs=teacher"
    ):  # complete, and asked for now
        curate(teacher)
    write(tmp_path / "rows.jsonl", rollouts(right=False))
    distill(run, redo=True)
    curate(teacher, redo=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [r | {"response": "?"} for r in rows], "rollouts: none of the .* is correct"),
        (lambda rows: [r | {"level": 1} for r in rows], "curate.level_weights: no level of the .* has a weight above 0"),
    ],
    ids=["no correct rollout", "no level with a weight"],
)  # fmt: skip
def test_a_stage_that_would_have_no_rows_ends_before_stage_1(
    change, message: str, run: RunConfig, tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl", change(rollouts()))
    run = override(run, ["curate.level_weights=1,0"])
    with pytest.raises(ValueError, match=message):
        distill(run)
        curate(run)


def test_an_example_that_cannot_be_encoded_is_named_by_line(tmp_path: Path) -> None:
    rows = rollouts()
    rows[33]["response"] = "see <|end|>"
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 34, response: expected plain text"):
        for shard in shards_of(path, tmp_path / "tokens"):
            write_shard(shard, TOKENIZER, "instruct")
    assert not list((tmp_path / "tokens").iterdir()), "half a shard was left"


def test_the_amount_of_the_rollouts_is_told(run: RunConfig, tmp_path: Path) -> None:
    path, told = write(tmp_path / "rows.jsonl", rollouts(300)), []
    run = override(run, ["tokenize.workers=2"])
    assert check_rows.check_files(run, path, TOKENIZER, lambda prompts: None, told.append) == []
    tokens = sum(len(encode_example(TOKENIZER, r["question"], r["response"])[0]) for r in rollouts(300))  # fmt: skip
    (line,) = told
    assert line.startswith(f"{path}: 600 rollouts of about {tokens / 1e6:,.3g} M tokens; all of them are {4 * tokens / 1e9:,.3g} GB")  # fmt: skip
    assert line.endswith(" hours of encoding in 2 processes")
