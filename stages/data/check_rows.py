"""The check of a user's files before stage 1: every row's fields and control tokens, and the lengths of the longest rows.

Tokens are counted only in the longest rows of each file: to encode billions of tokens takes hours, to read them minutes.
"""

import heapq
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from phimini.model.io.chat import encode_example
from phimini.model.io.json_files import Row
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.layouts import mapping_of
from phimini.stages.data.own_rows import MAX_LEVELS, SETS, own_problems, own_rollouts, sets_in
from phimini.stages.data.row_fields import check_texts, encode_problems, is_correct

COUNTED_ROWS = 200
"""longest rows of each file whose tokens are counted"""
Told = Callable[[str], None]
PromptCheck = Callable[[dict[str, list[int]]], None]
ROLLOUT_SETS = ("rollouts", "validation")


def check_files(
    run: RunConfig,
    source: Path,
    tokenizer: Tokenizer | None,
    check_prompts: PromptCheck,
    told: Told,
) -> list[str]:
    """Return a line for each file of `distill.source` that is missing or has bad rows.

    tokenizer: of the base model; None if it is yet to be trained, or cannot be read. check_prompts: of the longest prompts
    of stage 4, by id; raises ValueError. told: gets a line on the amount of the rollouts.
    """
    if not source.exists():
        return [
            f"distill.source={source}: expected a file or folder of rollouts, or a folder with {', '.join(SETS)}, found none"
        ]
    try:
        sets = sets_in(source)
    except ValueError as error:
        return [str(error)]
    of_rollouts = partial(_check_rollouts, told)
    if run.distill.teacher.model is not None:  # it answers the questions there
        of_rollouts = partial(_check_problems, None, num_levels=len(run.curate.level_weights))
    if not sets:
        return problems_of(partial(of_rollouts, run, source, tokenizer))
    found: list[str] = []
    for name in SETS:
        check = of_rollouts
        if name not in ROLLOUT_SETS:
            check = partial(_check_problems, check_prompts if name == "prompts" else None)
        if name in sets:
            found += problems_of(partial(check, run, sets[name], tokenizer))
        else:
            found.append(f"{source / name}.jsonl: missing")
    return found


def problems_of(check: Callable[[], None]) -> list[str]:
    """Return the message of the error that `check` raises for bad input, if it raises one."""
    try:
        check()
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _check_rollouts(told: Told, run: RunConfig, path: Path, tokenizer: Tokenizer | None) -> None:
    fields = ("question", "response")
    check = partial(check_texts, tokenizer, fields)
    mapped = mapping_of(run.distill.layout, run.distill.fields)
    rollouts = own_rollouts(path, path.name, len(run.curate.level_weights), check, mapped)
    amount = Amount()
    longest = _longest(amount.of(rollouts), fields)
    if tokenizer is None:
        told(f"{path}: {amount.rows:,} rollouts")
        return
    told(f"{path}: {amount.described(run, tokenizer)}")
    # All correct rollouts are stage 1's; any of them may be chosen for stage 2.
    setting = min("midtrain", "sft", key=lambda stage: getattr(run, stage).sequence_length)
    limit = getattr(run, setting).sequence_length
    too_long = {}
    for row in longest:
        tokens, _ = encode_example(
            tokenizer, row["question"], row["response"], tokenizer.chat_template
        )
        if len(tokens) - 1 > limit and is_correct(row):
            too_long[row["id"]] = len(tokens) - 1
    if too_long:
        id, count = max(too_long.items(), key=lambda item: item[1])
        raise ValueError(
            f"{path}: {len(too_long)} of the {len(longest)} longest rows exceed {setting}.sequence_length={limit}, "
            f"e.g. {id!r:.60} with {count} tokens; raise it or drop them"
        )


@dataclass(slots=True)
class Amount:
    """Counts of rollouts as they are read, and an even sample of them."""

    rows: int = 0
    characters: int = 0
    sample: list[Row] = field(default_factory=list)

    def of(self, rollouts: Iterable[Row]) -> Iterator[Row]:
        """Yield the rollouts, and count them."""
        rng = random.Random(0)
        for row in rollouts:
            self.rows += 1
            self.characters += _characters(row)
            place = len(self.sample) if self.rows <= COUNTED_ROWS else rng.randrange(self.rows)
            if place < COUNTED_ROWS:
                self.sample[place : place + 1] = [row]
            yield row

    def described(self, run: RunConfig, tokenizer: Tokenizer) -> str:
        """Return a line with rows, tokens, bytes and hours of encoding, from the tokens of the sample and the time that they took."""
        began, workers = time.process_time(), run.tokenize.workers or len(os.sched_getaffinity(0))
        encode = lambda row: encode_example(tokenizer, row["question"], row["response"], tokenizer.chat_template)  # fmt: skip
        counted = sum(len(encode(row)[0]) for row in self.sample)
        factor = self.characters / max(sum(map(_characters, self.sample)), 1)
        hours = factor * (time.process_time() - began) / 3600 / workers
        return (
            f"{self.rows:,} rollouts of about {factor * counted / 1e6:,.3g} M tokens; all of them are "
            f"{4 * factor * counted / 1e9:,.3g} GB of token files, {hours:,.2g} hours of encoding in {workers} processes"
        )


def _characters(row: Row) -> int:
    return len(row["question"]) + len(row["response"])


def _check_problems(
    check_prompts: PromptCheck | None,
    run: RunConfig,
    path: Path,
    tokenizer: Tokenizer | None,
    num_levels: int = MAX_LEVELS,
) -> None:
    fields = ("question",)
    mapped = mapping_of(run.distill.layout, run.distill.fields)
    check = partial(check_texts, tokenizer, fields)
    longest = _longest(own_problems(path, "", check, mapped, num_levels), fields)
    if tokenizer is not None and check_prompts is not None and not run.distill.gym_tasks:
        check_prompts(encode_problems(tokenizer, longest, tokenizer.chat_template))


def _longest(rows: Iterable[Row], fields: Sequence[str]) -> list[Row]:
    return heapq.nlargest(COUNTED_ROWS, rows, key=lambda row: sum(len(row[f]) for f in fields))
