"""Additions of a model behind an endpoint: a second look at rows first marked wrong, and domain and level of each question.

A verifier misses right answers in other forms, so the paper looks again at rollouts first marked wrong. A reply must be the
JSON object that the prompt asks for: any other is counted, and changes nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from phimini.model.io.json_files import Row, numbered_rows
from phimini.stages.config.cleaning import DOMAINS, LEVELS
from phimini.stages.config.data_steps import TeacherConfig
from phimini.stages.corpus.steps import JUDGED, Named
from phimini.stages.data.teacher import ask

SHOWN = 1500
"""characters of a response's end that the judge sees"""


class Judgement(msgspec.Struct, forbid_unknown_fields=True):
    """The judge's reply."""

    verdict: Literal["right", "wrong"]
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


class Label(msgspec.Struct, forbid_unknown_fields=True):
    """The reply on a question."""

    domain: Literal[DOMAINS]  # pyright: ignore[reportInvalidTypeForm]
    level: Annotated[int, msgspec.Meta(ge=0, lt=len(LEVELS))]


T = TypeVar("T", Judgement, Label)


def parsed(kind: type[T], reply: str) -> T | None:
    """Return the object that a reply is, after its thoughts; None for any other text."""
    try:
        return msgspec.json.decode(reply.rpartition("</think>")[2].strip(), type=kind)
    except (msgspec.DecodeError, UnicodeError):
        return None


def replies(
    config: TeacherConfig,
    field: str,
    questions: Callable[[], Iterable[Row]],
    path: Path,
    kind: type[T],
) -> Iterator[tuple[str, T | None]]:
    """Yield the id of each question, in order, and what the model replies, or None for an invalid reply. Errors as in `ask`.

    The replies are in the file `path`, so that a step that runs again does not ask again.
    """
    if not path.exists():
        ask(config, 0, questions, path, field=field)
    path.with_suffix(".journal").unlink(missing_ok=True)
    for _, row in numbered_rows(path, {"response": str}) if path.stat().st_size else ():
        yield row["problem_id"], parsed(kind, row["response"])


def judged(given: Iterable[Named], config: TeacherConfig, path: Path) -> Iterator[Named]:
    """Yield the rows of a shard; whole ones that the verifier marked wrong get the judge's verdict, and its reason."""
    rows = list(given)
    wrong = [
        row for name, row in rows if name != "dropped" and not row["correct"] and row["verdict"] != "cut off"
    ]  # fmt: skip
    questions = [
        {"id": row["id"], "question": f"\nQuestion:\n{row['question']}\n\nReference answer:\n{row['answer']}\n\n"
                                      f"End of the response:\n{row['response'][-SHOWN:]}"}
        for row in wrong
    ]  # fmt: skip
    found = replies(config, "clean.judge", lambda: questions, path, Judgement)
    for row, (_, reply) in zip(wrong, found, strict=True):
        known: dict[str, Any] = {"verdict": reply and reply.verdict, "reason": reply and reply.reason}  # fmt: skip
        row["judge"] = {"model": config.model, "verifier": row["verdict"]} | known
        if reply is not None and reply.verdict == "right":
            row |= {"correct": True, "verdict": JUDGED}
    yield from rows
