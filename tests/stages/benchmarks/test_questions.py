"""Benchmarks' questions from every public layout, with the exact prompts; bad files are refused in one sentence."""

import csv
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from benchmark_cases import OTHER_REQUEST, additions, write_data

from phimini.model.io.json_files import write_rows
from phimini.stages.benchmarks.questions import BENCHMARKS, file_of, questions_of
from phimini.stages.config.options import BenchmarkName

BOX = "Please reason step by step, and put your final answer within \\boxed{}. "
CHOICE = "Please reason step by step, and put your final choice of one letter from A/B/C/D within \\boxed{}. "


def read(name: str, data: Path, seed: int = 0, most: int | None = None) -> list[dict[str, Any]]:
    return questions_of(name, file_of(name, str(data)), seed, most)


def test_every_benchmark_that_an_option_names_is_one() -> None:
    assert list(BENCHMARKS) == list(get_args(BenchmarkName))
    assert {name: b.k for name, b in BENCHMARKS.items() if b.k != 8} == {"aime24": 64, "aime25": 64}


@pytest.mark.parametrize("name", ["aime24", "aime25", "math500", "gsm8k"])
def test_prompts_are_exact_in_every_layout(name: str, tmp_path: Path) -> None:
    rows = read(name, write_data(tmp_path / "data"))
    assert [(row["question"], row["answer"]) for row in rows] == [(BOX + q, a) for q, a in additions()]  # fmt: skip
    if name == "math500":
        assert [(row["id"], row["family"], row["level"]) for row in rows[:2]] == [("m/0", "Subject 0", 1), ("m/1", "Subject 1", 2)]  # fmt: skip
    assert len(read(name, tmp_path / "data", most=2)) == 2


def test_a_problem_needs_no_solution(tmp_path: Path) -> None:
    write_rows(tmp_path / "aime25.jsonl", [{"problem": f"What is {n}?", "answer": n} for n in (1, 2)])  # fmt: skip
    assert [(row["question"], row["answer"]) for row in read("aime25", tmp_path)] == [(f"{BOX}What is {n}?", str(n)) for n in (1, 2)]  # fmt: skip


def test_lists_of_answers_and_letters(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    assert read("olympiadbench", data)[0]["answer"] == "42, $x$"
    (row, *_) = read("aqua_rat", data)
    assert row["answer"] == "B" and row["question"].endswith("within \\boxed{}. What is 17 + 25?\n(A) 1\n(B) 42")  # fmt: skip


def test_choices_are_shuffled_by_seed_and_question(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    orders = set()
    for seed in range(8):
        rows = read("gpqa_diamond", data, seed)
        assert rows == read("gpqa_diamond", data, seed)
        for row, (question, answer) in zip(rows, additions(), strict=True):
            text, *choices = re.split(r"\n\n?(?=[A-D]\) )", row["question"])
            assert text == f"{CHOICE}{question}\nTake your time, please."
            assert sorted(choice[3:] for choice in choices) == sorted([answer, "1, or 2", "3", '"four"'])  # fmt: skip
            assert f"{row['answer']}) {answer}" in choices and row["family"] == "Sums"
        orders.add("".join(row["answer"] for row in rows))
    assert len(orders) > 4


def test_a_question_of_one_line_keeps_its_request(tmp_path: Path) -> None:
    write_rows(tmp_path / "aime25.jsonl", [{"prompt": f"{OTHER_REQUEST} {n}", "answer": n} for n in (1, 2)])  # fmt: skip
    assert read("aime25", tmp_path)[1]["question"] == f"{BOX}{OTHER_REQUEST} 2"


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "other columns": ([{"text": "a", "label": 1}], r"aime24.jsonl, line 1, field 'question': expected a string, got no such field; the row has \['label', 'text'\]"),
    "one question": ([{"prompt": "a", "answer": 1}], r"aime24.jsonl: expected two or more questions, got 1"),
    "two answers": ([{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 2}], r"aime24.jsonl:1 and aime24.jsonl:2 are one question with two answers, '1' and '2'"),
    "no answer": ([{"problem": "a", "answer": None}], r"field 'question': expected a string, got no such field"),
    "two messages": ([{"prompt": [{"content": "a"}] * 2, "reward_model": {}}], r"line 1, too many values to unpack"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(case: str, tmp_path: Path) -> None:
    rows, message = BAD[case]
    write_rows(tmp_path / "aime24.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        read("aime24", tmp_path)
    with pytest.raises(ValueError, match=r"data=.*: found no file for gsm8k; expected one of gsm8k, gsm8k.jsonl, .*gsm8k_test.csv"):  # fmt: skip
        read("gsm8k", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("Question,Correct Answer\nq,a,b\n", "not readable as CSV: line 2: expected 2 columns, got 3"),
     ('Question,Correct Answer\n"q,a\n', "not readable as CSV: unexpected end of data"),
     ("Question,Correct Answer\nq,\n", "row 1: expected the layout gpqa: KeyError 'Incorrect Answer 1'"),
     ("Question,Answer\nq,a\n", r"row 1, field 'question': expected a string, got no such field; the row has \['Answer', 'Question'\]"),
     ("", "expected at least one row, got an empty file")],
)  # fmt: skip
def test_a_bad_csv_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gpqa_diamond.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read("gpqa_diamond", tmp_path)


# --- real files -----------------------------------------------------------------------------------
SAMPLES = os.environ.get("PHIMINI_DATA_SAMPLES")
needs_samples = pytest.mark.skipif(
    SAMPLES is None, reason="PHIMINI_DATA_SAMPLES names no folder of public sets"
)


@needs_samples
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "gpqa_diamond"])
def test_real_files_are_the_whole_benchmark(name: str) -> None:
    rows = read(name, Path(SAMPLES or ""))
    assert len(rows) == BENCHMARKS[name].size
    assert all(row["question"].count("\\boxed{}") == 1 and row["answer"] for row in rows)
    if name == "math500":
        assert len({row["family"] for row in rows}) == 7 and {row["level"] for row in rows} == {1, 2, 3, 4, 5}  # fmt: skip


@needs_samples
def test_both_copies_of_math500_ask_the_same(tmp_path: Path) -> None:
    (tmp_path / "math500.parquet").symlink_to(Path(SAMPLES or "") / "math500.parquet")
    of_both = [
        {row["question"]: row["answer"] for row in read("math500", folder)}
        for folder in (tmp_path, Path(SAMPLES or ""))
    ]
    assert of_both[0] == of_both[1]


@needs_samples
def test_the_layout_of_gpqa_is_read(tmp_path: Path) -> None:
    (tmp_path / "gpqa_diamond.csv").symlink_to(Path(SAMPLES or "") / "layout_gpqa.csv")
    rows = read("gpqa_diamond", tmp_path)
    with (tmp_path / "gpqa_diamond.csv").open() as file:
        right = [row["Correct Answer"] for row in csv.DictReader(file)]
    for row, answer in zip(rows, right, strict=True):
        assert f"\n{row['answer']}) {answer}" in row["question"]
