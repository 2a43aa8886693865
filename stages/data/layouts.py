r"""Layouts of published data sets: each turns a published row into our rows, one for each response.

A layout is recognised by its fields, or named by `distill.layout`. `distill.fields` reads other layouts: it maps a field of ours
to a path in the published row, e.g. `question:prompt.0.content,answer:reward_model.ground_truth`.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from phimini.model.io.json_files import Row
from phimini.model.suggest import nearest
from phimini.stages.verify.verdict import extract_answer

Mapping = Callable[[Row, str], list[Row]]
"""a published row and its place, `file, line N`, to rows of ours; ValueError that names the place and a field"""
OURS = ("question", "answer", "response", "id", "problem_id", "family", "level", "source", "licence", "teacher", "finish_reason")  # fmt: skip

_TEACHERS = dict.fromkeys(("openr1_math", "openthoughts"), "DeepSeek-R1")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Bespoke-Stratos and OpenThoughts put the thoughts between markers of their own, and this request before the question.
_MARKERS = re.compile(r"\s*<\|(begin|end)_of_(thought|solution)\|>\s*")
_WRITTEN = {"begin thought": "<think>\n", "end thought": "\n</think>\n\n"}
_REQUEST = "Return your final response within \\boxed{}. "
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def mapping_of(layout: str, fields: Sequence[str]) -> Mapping:
    """Return the mapping of the settings `distill.layout` and `distill.fields`. Raises ValueError for an unknown field."""
    paths: dict[str, str] = {}
    for field in fields:
        ours, _, path = field.partition(":")
        if ours not in OURS or not path:
            raise ValueError(
                f"distill.fields: expected OUR_FIELD:PATH, got {field}; {nearest(ours, OURS)}"
            )
        paths[ours] = path
    return partial(_picked, paths) if paths else partial(_mapped, layout)


def _mapped(layout: str, row: Row, at: str) -> list[Row]:
    name = recognised(row) if layout == "auto" else layout
    if name == "plain":
        return [row]
    known = {"source": row.get("source", name)}
    known |= {field: row[field] for field in ("licence", "license") if row.get(field) is not None}
    if name in _TEACHERS:
        known["teacher"] = _TEACHERS[name]
    rows = mapped_by(LAYOUTS[name], name, row, at)
    return [known | {k: v for k, v in made.items() if v is not None} for made in rows]


def mapped_by(mapping: Callable[[Row], list[Row]], name: str, row: Row, at: str) -> list[Row]:
    """Return the rows of a mapping. Raises ValueError with the place if the published row has another layout than `name`."""
    try:
        return mapping(row)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{at}: expected the layout {name}: {type(error).__name__} {error}; the row has {sorted(row)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{at}, {error}") from error


def recognised(row: Row) -> str:
    """Return the name of the layout that has the fields of this row, or `plain`."""
    has = lambda *fields: all(row.get(field) is not None for field in fields)
    if has("question", "answer", "response", "origin", "other"):
        return "cleaned"
    if has("problem", "generations"):
        return "openr1_math"
    if has("problem", "deepseek_reasoning"):
        return "openthoughts"
    if has("question", "options", "correct"):
        return "aqua_rat"
    if has("question", "answer"):
        is_worked = isinstance(row["answer"], str) and "####" in row["answer"]
        return "gsm8k" if is_worked and not has("response") else "plain"
    if has("conversations") or has("messages"):
        return "conversation"
    return "math" if has("problem", "solution") or has("problem", "answer") else "plain"


def _picked(paths: dict[str, str], row: Row, at: str) -> list[Row]:
    """Return a row of the values at the given paths; other fields of the published row are left out."""
    picked: Row = {}
    for ours, path in paths.items():
        value: Any = row
        for key in path.split("."):
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{at}, field {path!r}: expected {ours}, got no such field; the row has {sorted(row)}"
                ) from error
        picked[ours] = as_text(value) if ours in ("question", "answer", "response") else value
    return [picked]


def as_text(value: Any) -> Any:
    """Return a number or a list of texts as text; any other value as it is."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _boxed(text: str, field: str) -> str:
    answer = extract_answer(text)
    if not answer:
        raise ValueError(f"field {field!r}: expected an answer in a closed \\boxed{{}}, got {text[-60:]!r}")  # fmt: skip
    return answer


def _openr1_math(row: Row) -> list[Row]:
    """A problem with several generations, each with the verdicts of math-verify and, for some, of a Llama judge."""
    reasons, verdicts = (row.get(name) or [] for name in ("finish_reasons", "correctness_math_verify"))  # fmt: skip
    whole, judged = (row.get(name) or [] for name in ("is_reasoning_complete", "correctness_llama"))
    at = lambda values, k: values[k] if k < len(values) else None
    problem, made = row.get("uuid") or row["problem"], []
    for k, response in enumerate(row["generations"]):
        published = at(verdicts, k) if at(judged, k) is None else at(judged, k)
        made.append({
            "id": f"{problem}/{k}" if row.get("uuid") else None, "problem_id": problem, "question": row["problem"],
            "answer": as_text(row["answer"]), "response": response, "family": row.get("problem_type"), "published": published,
            "finish_reason": at(reasons, k) or (None if at(whole, k) in (None, True) else "length"),
        })  # fmt: skip
    return made


def _openthoughts(row: Row) -> list[Row]:
    """A problem with DeepSeek-R1's thoughts and solution; the answer is the solution's own where no true one is known."""
    solution, truth = row["deepseek_solution"], row.get("ground_truth_solution")
    answer = extract_answer(truth) if truth else None
    return [{
        "question": row["problem"], "response": f"<think>\n{row['deepseek_reasoning'].strip()}\n</think>\n\n{solution.strip()}",
        "answer": answer or _boxed(solution, "deepseek_solution"), "family": row.get("domain"),
    }]  # fmt: skip


def _conversation(row: Row) -> list[Row]:
    """One question and its response, as `messages` (role, content) or `conversations` (from, value).

    Without an answer field the answer is that of a solution or, as in Bespoke-Stratos, whose rows were verified, the
    response's own.
    """
    field = "conversations" if row.get("conversations") else "messages"
    said: dict[str, list[str]] = {"user": [], "assistant": []}
    for turn in row[field]:
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role != "system":
            said.get(_ROLES.get(role, ""), []).append(text)
    if [len(texts) for texts in said.values()] != [1, 1]:
        raise ValueError(f"field {field!r}: expected one question and one response, got roles {[t.get('role', t.get('from')) for t in row[field]]}")  # fmt: skip
    (question,), (response,) = said.values()
    response = _MARKERS.sub(lambda mark: _WRITTEN.get(f"{mark[1]} {mark[2]}", ""), response)
    answer = as_text(row.get("answer")) or extract_answer(row.get("solution") or "")
    known = {"published": row["correct"]} if isinstance(row.get("correct"), bool) else {}
    answer = answer or _boxed(response, field)
    return [{"question": question.removeprefix(_REQUEST), "response": response, "answer": answer} | known]  # fmt: skip


def _gsm8k(row: Row) -> list[Row]:
    """A worked answer whose last line is `#### N`; the calculator's notes `<<48/2=24>>` are left out."""
    worked, mark, answer = row["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError(f"field 'answer': expected a last line '#### N', got {row['answer'][-60:]!r}")  # fmt: skip
    answer = answer.strip()
    response = f"{_CALCULATOR.sub('', worked).strip()}\nThe answer is $\\boxed{{{answer}}}$."
    return [{"question": row["question"], "answer": answer, "response": response}]


def _math(row: Row) -> list[Row]:
    """A problem whose solution has the answer in a box."""
    answer = row.get("answer") or _boxed(row["solution"], "solution")
    family = row.get("subject") or row.get("type")
    return [{"id": row.get("unique_id"), "question": row["problem"], "answer": as_text(answer), "response": row.get("solution"),
             "family": family, "level": row.get("level")}]  # fmt: skip


def _aqua_rat(row: Row) -> list[Row]:
    """A question with choices `A)5`; the answer is the letter."""
    letters = [option[:1] for option in row["options"]]
    if row["correct"] not in letters:
        raise ValueError(f"field 'correct': expected one of {letters}, got {row['correct']!r:.60}")
    choices = "\n".join(f"({option[:1]}) {option[2:].strip()}" for option in row["options"])
    response = f"{row['rationale'].strip()}\nThe answer is $\\boxed{{{row['correct']}}}$."
    return [{"question": f"{row['question']}\n{choices}", "answer": row["correct"], "response": response}]  # fmt: skip


def _cleaned(row: Row) -> list[Row]:
    """A row of `phimini clean`; its column `other` has the fields that other rows may lack, as JSON."""
    known = {name: value for name, value in row.items() if value is not None}
    return [json.loads(known.pop("other")) | known]


LAYOUTS: dict[str, Callable[[Row], list[Row]]] = {
    "cleaned": _cleaned,
    "openr1_math": _openr1_math,
    "openthoughts": _openthoughts,
    "conversation": _conversation,
    "gsm8k": _gsm8k,
    "math": _math,
    "aqua_rat": _aqua_rat,
}
AUTO = mapping_of("auto", ())
