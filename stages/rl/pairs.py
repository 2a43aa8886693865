"""Pairs of stage 3: a right and a wrong answer to one question, as rows and as tokens."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phimini.model.io.chat import encode_example, encode_prompt
from phimini.model.io.json_files import array_of, read_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.data.packing import Example

PAIR_FIELDS = {"problem_id": str, "question": str, "chosen": str, "rejected": str}
LOGPS = "logps.npy"
"""file of stage 3 with the summed log-probs of its first pairs, (pairs, before and after, chosen and rejected)"""


@dataclass(frozen=True, slots=True)
class Pair:
    """A correct and an incorrect answer to one question."""

    chosen: Example
    rejected: Example

    @property
    def lengths(self) -> tuple[int, int]:
        """Input positions of the chosen and the rejected answer, with their question."""
        return len(self.chosen), len(self.rejected)

    def digest(self) -> tuple[int, int]:
        """Return checksums of all that training sees."""
        return self.chosen.digest(), self.rejected.digest()


def read_pairs(
    path: Path, tokenizer: Tokenizer, template: str, pairs_per_prompt: int | None = None
) -> list[Pair]:
    """Return the first `pairs_per_prompt` pairs of each problem, or all.

    Sampled answers keep the tokens that were sampled; texts are encoded, with an end token unless `*_ended` is false.
    Raises ValueError that names file and line.
    """
    pairs, seen = [], Counter()
    for line, row in enumerate(read_rows(path, PAIR_FIELDS), 1):
        seen[row["problem_id"]] += 1
        if pairs_per_prompt is not None and seen[row["problem_id"]] > pairs_per_prompt:
            continue
        sides = []
        for side in ("chosen", "rejected"):
            try:
                tokens, loss_from = _encode_side(tokenizer, row, side, template)
            except ValueError as error:
                raise ValueError(f"{path}, line {line} ({side}), {error}") from error
            sides.append(Example(f"{path}:{line} ({side})", tokens, loss_from))
        pairs.append(Pair(*sides))
    return pairs


def _encode_side(
    tokenizer: Tokenizer, row: dict, side: str, template: str
) -> tuple[list[int], int]:
    if f"{side}_tokens" in row:
        prompt = encode_prompt(tokenizer, row["question"], template)
        return prompt + array_of(row[f"{side}_tokens"], np.int32).tolist(), len(prompt)
    ended = row.get(f"{side}_ended", True)
    return encode_example(tokenizer, row["question"], row[side], template, ended=ended)
