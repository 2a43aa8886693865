"""The check of a user's files before stage 1: every row's fields and control tokens, and the lengths of the longest rows.

Tokens are counted only in the longest rows of each file: to encode billions of tokens takes hours, to read them minutes.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from phimini.model.io.chat import check_plain, encode_example
from phimini.model.io.json_files import Row
from phimini.model.io.tokenizer import PHI4_TOKENS, Tokenizer
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.own_rows import own_problems, own_rollouts
from phimini.stages.data.row_fields import encode_problems
from phimini.stages.distill import is_correct
from phimini.stages.rl.groups import check_room

COUNTED_ROWS = 200
"""longest rows of each file whose tokens are counted"""
ROLLOUT_FILES = ("rollouts.jsonl", "validation.jsonl")
PROBLEM_FILES = ("prompts.jsonl", "heldout.jsonl")


def check_files(run: RunConfig, source: Path, tokenizer: Tokenizer | None) -> list[str]:
    """Return a line for each file of `distill.source` that is missing or has bad rows.

    tokenizer: of the base model; None if it is yet to be trained, or cannot be read.
    """
    if source.is_file():
        return problems_of(partial(_check_rollouts, run, source, tokenizer))
    if not source.is_dir():
        expected = ", ".join(ROLLOUT_FILES + PROBLEM_FILES)
        return [
            f"distill.source={source}: expected a file of rollouts, or a folder with {expected}, found none"
        ]
    found: list[str] = []
    for name in ROLLOUT_FILES + PROBLEM_FILES:
        check = _check_rollouts if name in ROLLOUT_FILES else _check_problems
        if (source / name).is_file():
            found += problems_of(partial(check, run, source / name, tokenizer))
        else:
            found.append(f"{source / name}: missing")
    return found


def problems_of(check: Callable[[], None]) -> list[str]:
    """Return the message of the error that `check` raises for bad input, if it raises one."""
    try:
        check()
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _check_rollouts(run: RunConfig, path: Path, tokenizer: Tokenizer | None) -> None:
    fields = ("question", "response")
    check = partial(_check_texts, tokenizer, fields)
    longest = _longest(own_rollouts(path, path.name, len(run.curate.level_weights), check), fields)
    if tokenizer is None:
        return
    # All correct rollouts are stage 1's; any of them may be chosen for stage 2.
    field = min("midtrain", "sft", key=lambda stage: getattr(run, stage).sequence_length)
    limit = getattr(run, field).sequence_length
    too_long = {}
    for row in longest:
        tokens, _ = encode_example(tokenizer, row["question"], row["response"], run.chat_template)
        if len(tokens) - 1 > limit and is_correct(row):
            too_long[row["id"]] = len(tokens) - 1
    if too_long:
        id, count = max(too_long.items(), key=lambda item: item[1])
        raise ValueError(
            f"{path}: {len(too_long)} of the {len(longest)} longest rows exceed {field}.sequence_length={limit}, "
            f"e.g. {id!r:.60} with {count} tokens; raise it or drop them"
        )


def _check_problems(run: RunConfig, path: Path, tokenizer: Tokenizer | None) -> None:
    fields = ("question",)
    longest = _longest(own_problems(path, partial(_check_texts, tokenizer, fields)), fields)
    if tokenizer is not None and path.name == "prompts.jsonl" and not run.distill.gym_tasks:
        prompts = encode_problems(tokenizer, longest, run.chat_template)
        check_room(prompts, run.rlvr, "rlvr")


def _longest(rows: Iterable[Row], fields: Sequence[str]) -> list[Row]:
    return heapq.nlargest(COUNTED_ROWS, rows, key=lambda row: sum(len(row[f]) for f in fields))


def _check_texts(tokenizer: Tokenizer | None, fields: Sequence[str], row: Row) -> None:
    """Raise ValueError for a text with a control token or a character that a vocabulary cannot encode."""
    special = {text for text, is_special, _ in PHI4_TOKENS if is_special}
    for field in fields:
        check_plain(tokenizer.special_tokens if tokenizer else special, field, row[field])
        if tokenizer is not None:
            tokenizer.check(row[field])
