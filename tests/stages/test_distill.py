import json
from pathlib import Path

import pytest

from phimini.model.io.json_files import read_json, write_rows
from phimini.stages.config.recipes import recipe_config
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.curate import curate
from phimini.stages.data.arithmetic_problems import number_key
from phimini.stages.distill import distill

SMALL = ["distill.num_problems=120", "distill.num_prompts=60", "distill.num_heldout=60", "distill.num_validation=40",
         "distill.rollouts_per_problem=3", "curate.sft_examples=90"]  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return override(recipe_config("tiny"), [f"out={tmp_path / 'run'}", *SMALL])


def test_no_heldout_numbers_occur_in_any_training_set(run: RunConfig) -> None:
    data = distill(run)
    curated = curate(run)
    heldout = {number_key(row["question"]) for row in rows(data / "heldout.jsonl")}
    validation = {number_key(row["question"]) for row in rows(data / "validation.jsonl")}
    assert len(heldout) == 60
    for path in (
        data / "rollouts.jsonl",
        data / "prompts.jsonl",
        curated / "midtrain.jsonl",
        curated / "sft.jsonl",
    ):
        seen = {number_key(row["question"]) for row in rows(path)}
        assert seen and not seen & heldout, f"{path.name} has a held-out question's numbers"
        assert not seen & validation, f"{path.name} has a validation question's numbers"


def test_the_heldout_set_is_the_same_for_every_seed_and_training_is_not(
    run: RunConfig, tmp_path: Path
) -> None:
    first = distill(run)
    second = distill(override(run, ["seed=1", f"out={tmp_path / 'other'}"]))
    assert (first / "heldout.jsonl").read_text() == (second / "heldout.jsonl").read_text()
    assert (first / "rollouts.jsonl").read_text() != (second / "rollouts.jsonl").read_text()


def test_midtraining_gets_every_correct_rollout_and_only_those(run: RunConfig) -> None:
    data = distill(run)
    curated = curate(run)
    rollouts = rows(data / "rollouts.jsonl")
    correct = [r["id"] for r in rollouts if r["correct"]]
    kept = rows(curated / "midtrain.jsonl")
    assert all(r["correct"] for r in kept)
    texts = lambda some: {(r["problem_id"], r["response"]) for r in some}
    assert texts(kept) == texts(r for r in rollouts if r["correct"]), "every text is there"
    assert len(texts(kept)) == len(kept), "and once"
    assert 0 < len(correct) < len(rollouts), "the teacher is sometimes wrong"
    sft = [r["id"] for r in rows(curated / "sft.jsonl")]
    assert set(sft) <= set(correct) and len(sft) == 90 < len(correct)


def test_a_complete_stage_is_not_run_again_but_redo_does(run: RunConfig) -> None:
    path = distill(run)
    first = read_json(path / "summary.json")["id"]
    distill(run)
    assert read_json(path / "summary.json")["id"] == first
    distill(run, redo=True)
    assert read_json(path / "summary.json")["id"] != first


def test_other_settings_or_other_inputs_of_a_complete_stage_are_named(run: RunConfig) -> None:
    distill(run)
    curate(run)
    with pytest.raises(ValueError, match=r"distill was made with distill.slip=0.15, now it is 0.5"):
        distill(override(run, ["distill.slip=0.5"]))
    distill(run, redo=True)
    with pytest.raises(ValueError, match="distill was made again since; use --redo"):
        curate(run)


def test_a_stage_without_its_input_is_named(run: RunConfig) -> None:
    with pytest.raises(
        ValueError, match=r"curate: .*distill is not complete; run `phimini distill` first"
    ):
        curate(run)


def write_source(folder: Path, rollouts: list[dict]) -> None:
    folder.mkdir()
    held_out = [
        {"id": "h", "question": "What is 3 + 4?", "answer": "7", "response": r"\boxed{7}"},
        {"question": "What is 9 + 9?", "answer": "18"},
    ]
    for name, content in {
        "rollouts.jsonl": rollouts,
        "prompts.jsonl": [{"id": "p", "question": "What is 30 + 40?", "answer": "70"}],
        "validation.jsonl": [
            {"question": "What is 5 + 5?", "answer": "10", "response": r"\boxed{10}"}
        ],
        "heldout.jsonl": held_out,
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))


def test_own_data_is_verified_and_cleared_of_heldout_questions(
    run: RunConfig, tmp_path: Path
) -> None:
    write_source(
        tmp_path / "own",
        [
            {"question": "What is 1 + 1?", "answer": "2", "response": r"so \boxed{2}"},
            {"question": "What is 1 + 1?", "answer": "2", "response": r"so \boxed{3}"},
            {"question": "Add 4 and 3.", "answer": "7", "response": r"\boxed{7}"},
        ],
    )
    data = distill(override(run, [f"distill.source={tmp_path / 'own'}"]))
    assert [(r["question"], r["correct"]) for r in rows(data / "rollouts.jsonl")] == [
        ("What is 1 + 1?", True),
        ("What is 1 + 1?", False),
    ]


def test_a_wrong_validation_row_is_left_out_and_named(run: RunConfig, tmp_path: Path) -> None:
    """The validation loss is of right answers only, as the training sets are."""
    write_source(tmp_path / "own", [{"question": "What is 1 + 1?", "answer": "2", "response": r"\boxed{2}"}])  # fmt: skip
    right = {"id": "v0", "question": "What is 5 + 5?", "answer": "10", "response": r"\boxed{10}"}
    wrong = {"id": "v1", "question": "What is 6 + 5?", "answer": "11", "response": r"\boxed{12}"}
    write_rows(tmp_path / "own" / "validation.jsonl", [right, wrong])
    data = distill(override(run, [f"distill.source={tmp_path / 'own'}"]))
    assert [row["id"] for row in rows(data / "validation.jsonl")] == ["v0"]
    (dropped,) = rows(data / "dropped.jsonl")
    assert (dropped["id"], dropped["reason"]) == ("v1", "validation, different")


def test_an_answer_that_was_cut_off_is_not_correct(run: RunConfig, tmp_path: Path) -> None:
    """Stages 1 and 2 append end tokens, so the model would learn to stop within a sentence."""
    given = [
        (r"so \boxed{2}", {}, True),
        (r"so \boxed{2}. We check", {"finish_reason": "length"}, False),
        (r"so \boxed{2} ", {"finish_reason": "stop"}, True),
        (r"<think>so \boxed{2}", {}, False),
        (r"<think>so \boxed{2}</think>\boxed{2}", {"finish_reason": None}, True),
    ]
    question = {"question": "What is 1 + 1?", "answer": "2"}
    write_source(tmp_path / "own", [question | {"response": r} | more for r, more, _ in given])
    own = override(run, [f"distill.source={tmp_path / 'own'}", "curate.level_weights=1"])
    assert [r["correct"] for r in rows(distill(own) / "rollouts.jsonl")] == [c for *_, c in given]
    assert {r["response"] for r in rows(curate(own) / "midtrain.jsonl")} == {r for r, _, c in given if c}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "answer": "1", "response": "r", "finish_reason": "eos"},
            r"rollouts.jsonl, line 1, field 'finish_reason': expected stop or length, got 'eos'",
        ),
        (
            {"question": "q", "answer": "1", "response": "<|user|>"},
            r"rollouts.jsonl, line 1, response: expected plain text, got the control token <\|user\|>",
        ),
        ({"question": "q", "response": "r"}, r"rollouts.jsonl.*1.*answer"),
        ({"question": "q", "answer": " ", "response": "r"}, r"rollouts.jsonl.*1.*answer"),
        ({"question": "q", "answer": 3, "response": "r"}, r"rollouts.jsonl.*1.*answer"),
    ],
)
def test_own_data_with_a_bad_row_names_file_and_line(
    run: RunConfig, tmp_path: Path, row: dict, message: str
) -> None:
    write_source(tmp_path / "own", [row])
    with pytest.raises(ValueError, match=message):
        distill(override(run, [f"distill.source={tmp_path / 'own'}"]))


def test_own_data_that_is_no_folder_is_named(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distill.source: expected `generator`, a folder"):
        distill(override(run, [f"distill.source={tmp_path / 'none'}"]))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("prompts.jsonl", {"id": "p1", "question": "What is 77 + 88?", "answer": "165"}, "prompts.jsonl, line 2, field 'id': expected one that no earlier row has, got 'p1'"),
        ("heldout.jsonl", {"id": "h1", "question": "What is 777 + 88?", "answer": "865"}, "heldout.jsonl, line 3, field 'id': expected one that no earlier row has, got 'h1'"),
        ("rollouts.jsonl", {"problem_id": "r1", "question": "What is 7 + 88?", "answer": "95", "response": "96"}, "rollouts.jsonl, line 2, field 'problem_id': 'r1' stands for two questions"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.endswith("l") else "",
)  # fmt: skip
def test_an_id_of_two_questions_is_refused(
    name: str, row: dict, message: str, tmp_path: Path
) -> None:
    """A chosen answer of one question would be paired with a rejected one of another."""
    sets = {
        "rollouts.jsonl": {"problem_id": "r1", "question": "What is 1 + 2?", "answer": "3", "response": "\\boxed{3}"},
        "validation.jsonl": {"question": "What is 11 + 2?", "answer": "13", "response": "\\boxed{13}"},
        "prompts.jsonl": {"id": "p1", "question": "What is 12 + 2?", "answer": "14"},
        "heldout.jsonl": {"id": "h1", "question": "What is 15 + 2?", "answer": "17"},
    }  # fmt: skip
    for file, first in sets.items():
        (tmp_path / file).write_text(json.dumps(first) + "\n")
    with (tmp_path / "heldout.jsonl").open("a") as file:
        file.write(json.dumps({"question": "What is 16 + 2?", "answer": "18"}) + "\n")
    own = override(recipe_config("tiny"), [f"out={tmp_path / 'run'}", f"distill.source={tmp_path}"])
    distill(own)
    with (tmp_path / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        distill(own, redo=True)


def test_prompts_are_in_the_window_of_pass_rates_and_processes_make_no_difference(
    run: RunConfig, tmp_path: Path
) -> None:
    """Question n has n % 5 correct rollouts of 4; a held-out question stays so when others are added."""
    given = [
        {"question": f"What is {n} + {n}?", "answer": str(2 * n), "id": f"q{n}/{k}",
         "response": f"{k}: \\boxed{{{2 * n if k < n % 5 else 1}}}"}
        for n in range(100, 160)
        for k in range(4)
    ]  # fmt: skip
    path = tmp_path / "given.jsonl"
    words = [f"distill.source={path}", "distill.num_heldout=10", "distill.num_validation=5",
             "distill.min_pass_rate=0.2", "distill.max_pass_rate=0.5", "distill.licence=MIT"]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    data = distill(override(run, words))
    asked = [int(row["question"].split()[2]) for row in rows(data / "prompts.jsonl")]
    trained = {int(row["question"].split()[2]) for row in rows(data / "rollouts.jsonl")}
    assert sorted(asked) == sorted(n for n in trained if n % 5 in (1, 2))
    assert {row["licence"] for row in rows(data / "rollouts.jsonl")} == {"MIT"}
    other = distill(override(run, [*words, "distill.workers=2", f"out={tmp_path / 'other'}"]))
    for name in ("rollouts", "validation", "prompts", "heldout", "dropped"):
        assert (data / f"{name}.jsonl").read_bytes() == (other / f"{name}.jsonl").read_bytes()
    path.write_text("".join(json.dumps(row) + "\n" for row in given[: 4 * 40]))
    held = lambda folder: {row["question"] for row in rows(folder / "heldout.jsonl")}
    fewer = held(distill(override(run, [*words, f"out={tmp_path / 'fewer'}"])))
    assert held(data) & {row["question"] for row in given[: 4 * 40]} <= fewer
