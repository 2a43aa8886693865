"""The fields of the rows that stages read and write, and the prompts and verdicts of such rows."""

from collections.abc import Sequence
from hashlib import blake2b

from phimini.model.io.chat import check_plain, encode_prompt
from phimini.model.io.json_files import Row
from phimini.model.io.tokenizer import PHI4_TOKENS, Tokenizer
from phimini.stages.verify.verdict import extract_answer, verify

ASKED_FIELDS = {"question": str, "answer": str}
"""of a user's own question; what else our own have is worked out"""
GIVEN_FIELDS = {**ASKED_FIELDS, "response": str}
"""of a user's own rollout"""
ROLLOUT_FIELDS = {"problem_id": str, **GIVEN_FIELDS, "correct": bool}
PROBLEM_FIELDS = {"id": str, **ASKED_FIELDS}


def encode_problems(
    tokenizer: Tokenizer, problems: list[Row], template: str
) -> dict[str, list[int]]:
    """Return the prompt of each problem by its id; template: as for `chat.render`. Raises ValueError that names the problem, as `encode_prompt`."""
    prompts = {}
    for row in problems:
        try:
            prompts[row["id"]] = encode_prompt(tokenizer, row["question"], template)
        except ValueError as error:
            raise ValueError(f"problem {row['id']!r:.60}: {error}") from error
    return prompts


def check_texts(tokenizer: Tokenizer | None, fields: Sequence[str], row: Row) -> None:
    """Raise ValueError for a text with a control token or a character that a vocabulary cannot encode.

    tokenizer: of the base model; None if it is yet to be trained.
    """
    special = {text for text, is_special, _ in PHI4_TOKENS if is_special}
    for name in fields:
        check_plain(tokenizer.special_tokens if tokenizer else special, name, row[name])
        if tokenizer is not None:
            tokenizer.check(row[name])


def text_hash(*texts: str) -> bytes:
    """Return 8 bytes that differ for the texts of ten million rows, and are the same in every process."""
    return blake2b("\0".join(texts).encode(), digest_size=8).digest()


def is_correct(row: dict) -> bool:
    """Return the verdict on a rollout: whole, and its answer right."""
    return has_ended(row) and verify(row["response"], row["answer"])


def has_ended(row: dict) -> bool:
    """Return True if a rollout is whole, by its `finish_reason`; without one, by a closed box and no open <think>."""
    if row.get("finish_reason") is not None:
        return row["finish_reason"] == "stop"
    response = row["response"]
    thinking = response.rfind("<think>") > response.rfind("</think>")
    return not thinking and extract_answer(response) is not None
