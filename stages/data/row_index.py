"""An index of a file of verified rollouts: 34 bytes a row, by which rows are chosen before any is copied."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phimini.model.io.json_files import Row, atomic_file
from phimini.stages.data.row_fields import has_ended, text_hash

CORRECT, ENDED, EMPTY = 1, 2, 4
"""bits of `flags`"""
LOOP_WORDS = 10
"""words of a sequence that `repetition` compares"""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Facts of each row of a JSON-lines file, in arrays over its rows."""

    path: Path
    starts: np.ndarray
    """bytes before each row, int64"""
    problems: np.ndarray
    """hashes of the problem ids, int64"""
    texts: np.ndarray
    """hashes of problem id and response, int64"""
    lengths: np.ndarray
    """characters of the responses, int32"""
    cells: np.ndarray
    """places in `names`, int32"""
    flags: np.ndarray
    """CORRECT, ENDED and EMPTY, uint8"""
    repetitions: np.ndarray
    """percent of the words that `repetition` counts, uint8; 0 where it was not asked for"""
    names: list[tuple[str, int]]
    """family and level of each cell, in the order of appearance"""

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, flag: int) -> np.ndarray:
        """Return the places of the rows that have a flag."""
        return np.flatnonzero(self.flags & flag)

    def lines(self, places: Iterable[int]) -> Iterator[bytes]:
        """Yield the lines of rows, as they are in the file."""
        with self.path.open("rb") as file:
            for place in places:
                file.seek(int(self.starts[place]))
                yield file.readline()

    def rows(self, places: Iterable[int]) -> Iterator[Row]:
        """Yield rows."""
        return map(json.loads, self.lines(places))

    def copy(self, places: Iterable[int], to: Path) -> None:
        """Write rows as lines of another file, atomically."""
        with atomic_file(to) as file:
            file.writelines(self.lines(places))


def index_rows(
    path: Path, *, with_repetition: bool = False, note: Callable[[], None] = lambda: None
) -> RowIndex:
    """Return the index of a file of `distill`. with_repetition: look for it, which takes a millisecond a row.

    note: called after each row.
    """
    starts, problems, texts = array("q"), array("q"), array("q")
    lengths, cells, flags, repetitions = array("i"), array("i"), array("B"), array("B")
    names: dict[tuple[str, int], int] = {}
    as_int = lambda *parts: int.from_bytes(text_hash(*parts), "little", signed=True)
    start = 0
    with path.open("rb") as file:
        for line in file:
            row = json.loads(line)
            starts.append(start)
            start += len(line)
            problems.append(as_int(row["problem_id"]))
            texts.append(as_int(row["problem_id"], row["response"]))
            lengths.append(len(row["response"]))
            cells.append(names.setdefault((row["family"], row["level"]), len(names)))
            empty = EMPTY * (not row["response"])
            flags.append(CORRECT * row["correct"] | ENDED * has_ended(row) | empty)
            share = repetition(row["response"]) if with_repetition else 0.0
            repetitions.append(round(100 * share))
            note()
    arrays = [
        np.frombuffer(values, values.typecode) if len(values) else np.empty(0, values.typecode)
        for values in (starts, problems, texts, lengths, cells, flags, repetitions)
    ]
    return RowIndex(path, *arrays, names=list(names))


def repetition(text: str) -> float:
    """Return the share of a text's sequences of `LOOP_WORDS` words that occurred before in it: near 1 for a loop."""
    sequences = sequence_hashes(np.fromiter(map(hash, text.split()), np.int64), LOOP_WORDS)
    return 1.0 - len(np.unique(sequences)) / len(sequences) if len(sequences) else 0.0


def sequence_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """Return a hash of each sequence of `length` words: a polynomial of the words' hashes, modulo 2^64."""
    sequences = np.zeros(max(len(words) - length + 1, 0), words.dtype)
    for k in range(length):
        sequences = sequences * sequences.dtype.type(1_000_003) + words[k : k + len(sequences)]
    return sequences
