"""Journal of a benchmark's samples: each is on the disk as soon as it is complete, and is never asked again.

`samples/NAME.RANK.jsonl` is what one rank sampled. Its first line says what the samples are of: model, prompts and settings.
A process that dies leaves at most half of a last line, which the next one cuts off.
"""

import os
from pathlib import Path
from typing import IO, Any, NamedTuple

from phimini.model.io.json_files import append_line, dump, parsed_lines
from phimini.stages.run.stage_folder import check_same_settings


class Key(NamedTuple):
    """A sample's place."""

    problem: str
    """id of its problem"""
    number: int
    """from 0"""


class Sample(NamedTuple):
    """A finished sample."""

    response: str
    finish_reason: str
    tokens: int
    """number of sampled tokens"""


def journals(folder: Path, name: str) -> list[Path]:
    """Return the journals of a benchmark, of all ranks that ever sampled."""
    return sorted(folder.glob(f"{name}.*.jsonl"))


def finished(folder: Path, name: str, made: dict[str, Any]) -> dict[Key, Sample]:
    """Cut off torn last lines and return the samples in all journals of a benchmark.

    Raises ValueError for a journal of another model, prompts or settings (it names the field), and for a damaged one.
    """
    found: dict[Key, Sample] = {}
    for path in journals(folder, name):
        _cut_torn_line(path)
        lines = parsed_lines(path)
        for at, then in lines:  # the first line
            if not isinstance(then, dict):
                raise ValueError(f"{at}: expected an object, got {then!r:.60}: the file is damaged")
            check_same_settings(then, made, path)
            break
        for at, row in lines:
            try:
                problem, number, *sample = row
                key = Key(problem, number)
                is_new = key not in found
                found[key] = Sample(*sample)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{at}: expected a sample: {error}: the file is damaged"
                ) from error
            if not is_new:
                raise ValueError(f"{at}: {key} is here a second time: the file is damaged")
    return found


def _cut_torn_line(path: Path) -> None:
    """Cut off what follows the last end of a line; a file without one is removed."""
    with path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
    if b"\n" not in data:
        path.unlink()


class Journal:
    """This rank's journal of a benchmark, as a context manager."""

    def __init__(self, folder: Path, name: str, rank: int, made: dict[str, Any]) -> None:
        self.path = folder / f"{name}.{rank}.jsonl"
        self._made = made
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        if not self._file.tell():
            self._append(self._made)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()

    def write(self, key: Key, sample: Sample) -> None:
        """Record a finished sample. Raises OSError for a full disk."""
        self._append([*key, *sample])

    def _append(self, value: Any) -> None:
        assert self._file is not None, "opened by `with`"
        append_line(self._file, dump(value, f"{self.path}").encode(), self.path)
