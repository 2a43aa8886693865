r"""The benchmarks by name, and their questions from files in the public layouts.

The prompt is a request and the question, with a space between them; requests and settings are those of arXiv 2507.06607,
appendix G, which names no prompt for the three benchmarks that the paper lacks. Copies of a set carry other requests in
their questions (`... within \boxed{}.` as first or last line); these are removed, and so are repeated rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phimini.model.io.checked_files import describe_file
from phimini.model.io.json_files import Row
from phimini.stages.data.layouts import AUTO, as_text, mapped_by
from phimini.stages.data.own_rows import SUFFIXES, files_of, own_problems
from phimini.stages.data.packing import derive

BOX = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = "Please reason step by step, and put your final choice of one letter from A/B/C/D within \\boxed{}."


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published set of questions."""

    title: str
    size: int
    """questions of the whole set"""
    request: str = BOX
    k: int = 8
    """samples of each question"""


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("AIME 2024", 30, k=64),
    "aime25": Benchmark("AIME 2025", 30, k=64),
    "math500": Benchmark("MATH-500", 500),
    "gpqa_diamond": Benchmark("GPQA Diamond", 198, CHOICE),
    "gsm8k": Benchmark("GSM8K", 1319),
    "olympiadbench": Benchmark("OlympiadBench (English, text)", 675),
    "aqua_rat": Benchmark("AQuA-RAT", 254, CHOICE.replace("A/B/C/D", "A/B/C/D/E")),
}


def file_of(name: str, data: str) -> Path:
    """Return the first file or folder for a benchmark in `data`. Raises ValueError without one."""
    names = [f"{stem}{suffix}" for stem in (name, f"{name}_test") for suffix in ("", *SUFFIXES)]
    for path in (Path(data, each) for each in names):
        if path.exists():
            return path
    raise ValueError(f"data={data}: found no file for {name}; expected one of {', '.join(names)}")


def described(source: Path) -> dict[str, str]:
    """Return the sha256 of each file of a benchmark, by its name in the folder of data."""
    name = lambda path: str(path.relative_to(source.parent))
    return {name(path): describe_file(path)["sha256"] for path in files_of(source)}


def questions_of(name: str, source: Path, seed: int, most: int | None) -> list[Row]:
    """Return a benchmark's questions with their requests: rows with id, question, answer, family and level.

    seed: of the order of GPQA's choices. most: only so many, the first ones. Raises ValueError as `own_problems`, for one
    question with two answers, and for fewer than two questions, which have no interval.
    """
    rows: dict[str, Row] = {}
    for row in bare_questions(source, seed):
        question = row["question"]
        asked = row | {"question": f"{BENCHMARKS[name].request} {question}"}
        first = rows.setdefault(question, asked)
        if first["answer"] != row["answer"]:
            raise ValueError(
                f"{source}: {first['id']} and {row['id']} are one question with two answers, {first['answer']!r:.60} and "
                f"{row['answer']!r:.60}"
            )
    if len(rows) < 2:
        raise ValueError(f"{source}: expected two or more questions, got {len(rows)}")
    return list(rows.values())[:most]


def bare_questions(source: Path, seed: int = 0) -> Iterator[Row]:
    """Yield the questions of a benchmark in any public layout, without requests. Arguments and errors as in `questions_of`."""
    for row in own_problems(source, mapped=partial(_mapped, seed)):
        yield row | {"question": _without_request(row["question"])}


def _without_request(text: str) -> str:
    r"""Remove a first or last line that asks for `\boxed{}`: no question has an empty box."""
    lines = text.strip().splitlines()
    for place in (0, -1):
        if len(lines) > 1 and "\\boxed{}" in lines[place]:
            del lines[place]
    return "\n".join(lines).strip()


def _mapped(seed: int, row: Row, at: str) -> list[Row]:
    """Return the rows of a published row, by its fields; layouts that are not of benchmarks alone as in `layouts`."""
    for name, (fields, mapping) in _LAYOUTS.items():
        if fields <= row.keys():
            return mapped_by(partial(mapping, seed), name, row, at)
    return AUTO(row, at)


def _gpqa(seed: int, row: Row) -> list[Row]:
    """A question with its right and three wrong answers, which get letters in an order of their own for each question."""
    names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    if empty := [name for name in names if row[name] is None]:
        raise ValueError(f"field {empty[0]!r}: expected an answer, got null")
    order = np.random.default_rng(derive(seed, "choices", row["Question"])).permutation(4).tolist()
    choices = [
        f"{letter}) {row[names[i]].strip()}" for letter, i in zip("ABCD", order, strict=True)
    ]
    return [{
        "id": row.get("Record ID"), "question": "\n".join([f"{row['Question'].strip()}\n", *choices]), "answer": "ABCD"[order.index(0)],
        "family": row.get("Subdomain") or row.get("High-level domain"),
    }]  # fmt: skip


def _olympiad(_: int, row: Row) -> list[Row]:
    """A question with its final answers in one text."""
    answer = as_text(row["final_answer"])
    return [{"id": row.get("id"), "question": row["question"], "answer": answer, "family": row.get("subfield")}]  # fmt: skip


def _verl(_: int, row: Row) -> list[Row]:
    """A prompt as messages, and the answer under `reward_model`."""
    (message,) = row["prompt"]
    return [{"question": message["content"], "answer": as_text(row["reward_model"]["ground_truth"])}]  # fmt: skip


def _prompt(_: int, row: Row) -> list[Row]:
    return [{"question": row["prompt"], "answer": as_text(row["answer"])}]


_LAYOUTS: dict[str, tuple[set[str], Callable[[int, Any], list[Row]]]] = {
    "gpqa": ({"Question", "Correct Answer"}, _gpqa),
    "olympiadbench": ({"question", "final_answer"}, _olympiad),
    "verl": ({"prompt", "reward_model"}, _verl),
    "prompt": ({"prompt", "answer"}, _prompt),
}
"""the fields of a layout by which it is recognised, and its mapping of a seed and a row"""
