"""A user's rows: known fields are checked and completed where the row is read, and all bad rows are counted at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from phimini.stages.data import own_rows
from phimini.stages.data.own_rows import files_of, own_problems, own_rollouts

ROW = {"question": "What is 1 + 2?", "answer": "3", "response": r"so \boxed{3}"}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("given", "field", "read"),
    [
        ({"level": "Level 5"}, "level", 5), ({"level": "level3"}, "level", 3), ({"level": " 2 "}, "level", 2), ({"level": 2.0}, "level", 2),
        ({"level": None}, "level", 0), ({}, "level", 0), ({"problem_id": 7}, "problem_id", "7"), ({"problem_id": None}, "problem_id", ROW["question"]),
        ({"problem_id": "../../x"}, "problem_id", "../../x"), ({"id": 12}, "id", "12"), ({}, "id", "mine:2"), ({"id": None}, "id", "mine:2"),
        ({"family": None}, "family", ""), ({"family": "algebra"}, "family", "algebra"), ({"source": None}, "source", "file"),
        ({"more": [1, {"a": None}]}, "more", [1, {"a": None}]),
    ],
)  # fmt: skip
def test_a_field_is_read_in_the_spellings_of_public_sets(
    given: dict, field: str, read: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(ROW | given)}\n")  # the id names the line of the file
    assert [row[field] for row in own_rollouts(path, "mine", 6)] == [read]


BAD = {
    "level a word": ({"level": "hard"}, "field 'level': expected a whole number or a text such as 'Level 3', got 'hard'"),
    "MATH's unknown level": ({"level": "Level ?"}, "field 'level': expected a whole number"),
    "level 1.5": ({"level": 1.5}, "field 'level': expected a whole number"),
    "level true": ({"level": True}, "field 'level': expected a whole number"),
    "level a list": ({"level": [1]}, "field 'level': expected a whole number"),
    "endless level": ({"level": 1e308}, "field 'level': expected 0 to 2, a weight of curate.level_weights for each, got 1e+308"),
    "level without a weight": ({"level": "Level 5"}, "field 'level': expected 0 to 2, a weight of curate.level_weights for each, got 'Level 5'"),
    "negative level": ({"level": -1}, "field 'level': expected 0 to 2"),
    "problem_id a list": ({"problem_id": ["a"]}, "field 'problem_id': expected text or an integer, got ['a']"),
    "problem_id an object": ({"problem_id": {"a": 1}}, "field 'problem_id': expected text or an integer"),
    "problem_id blank": ({"problem_id": " "}, "field 'problem_id': expected text or an integer"),
    "id true": ({"id": True}, "field 'id': expected text or an integer, got True"),
    "family a list": ({"family": ["algebra", "hard"]}, "field 'family': expected a string, got ['algebra', 'hard']"),
    "source a number": ({"source": 1}, "field 'source': expected a string, got 1"),
    "finish_reason": ({"finish_reason": "eos"}, "field 'finish_reason': expected stop or length, got 'eos'"),
    "long answer": ({"answer": "1" * 4001}, "field 'answer': expected at most 4000 characters, got '4001 characters'"),
    "surrogate": ({"response": "half an emoji \ud83d here"}, r"field 'response': expected whole characters, got the lone surrogate '\ud83d' in 'half an emoji \ud83d here'"),
    "surrogate in a name": ({"x\ud83d": 1}, r"field 'x\ud83d': expected whole characters"),
    "surrogate deep inside": ({"meta": [{"a": "\udc00"}]}, "field 'meta': expected whole characters"),
    "another answer": ({"answer": "3.0"}, "field 'answer': expected '3', the answer to this question in "),
    "another question": ({"problem_id": ROW["question"], "question": "How many?"}, "field 'problem_id': 'What is 1 + 2?' stands for two questions"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_by_line_and_field_and_counted(case: str, tmp_path: Path) -> None:
    given, message = BAD[case]
    path = write(tmp_path / "rows.jsonl", ROW, ROW | given, ROW, ROW | given, {"answer": "3"})
    kept = []
    with pytest.raises(ValueError) as caught:
        for row in own_rollouts(path, "mine", 3):
            kept.append(row["id"])
    text = str(caught.value)
    assert f"{path}, line 2, {message}" in text and "(the first of 2 such rows)" in text
    assert f"; {path}, line 5, field 'question': expected a string, got no such field" in text
    assert kept == ["mine:1", "mine:3"]
    text.encode()  # any terminal shows it


def test_a_question_asked_twice_in_a_set_is_named(tmp_path: Path) -> None:
    asked = {"question": "How many?", "answer": "3"}
    path = write(tmp_path / "prompts.jsonl", asked | {"id": 1}, asked, asked | {"id": "1"}, asked)
    with pytest.raises(ValueError, match=r"line 3, field 'id': expected one that no earlier row has, got '1'$"):  # fmt: skip
        list(own_problems(path))
    path = write(path, asked | {"id": 1}, asked, asked)
    assert [row["id"] for row in own_problems(path)] == ["1", "prompts.jsonl:2", "prompts.jsonl:3"]


def test_a_check_of_the_caller_is_counted_too(tmp_path: Path) -> None:
    def refuse(row: dict) -> None:
        if row["level"]:
            raise ValueError("level: expected none")

    path = write(tmp_path / "rows.jsonl", ROW, ROW | {"level": 1}, ROW | {"level": 2})
    with pytest.raises(ValueError, match=r"line 2, level: expected none \(the first of 2 such"):
        list(own_rollouts(path, "mine", 3, refuse))


def test_a_folder_of_shards_is_read_by_name_without_hidden_files(tmp_path: Path) -> None:
    names = ["b/2.jsonl", "b/1.parquet", "a.csv", ".cache/0.jsonl", "b/.part.jsonl", "b/notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in files_of(tmp_path)]
    assert found == ["a.csv", "b/1.parquet", "b/2.jsonl"]


def test_a_folder_that_is_no_folder_of_rows_is_named_before_all_of_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_rows, "MAX_ENTRIES", 3)
    for k in range(4):
        write(tmp_path / f"{k}.jsonl", ROW)
    with pytest.raises(
        ValueError, match=r"expected a folder of rows, found more than 3 files in it"
    ):
        files_of(tmp_path)
