"""The rows of a user's own files: every known field is checked and completed where its row is read.

A source is a file (JSON Lines, also `.gz` and `.zst`, Parquet, CSV) or a folder of such files at any depth; it is read row by
row. `layouts.py` maps the rows of published data sets to ours. A row of ours has `question`, `answer` and, in a file of rollouts, `response`. It may have `id`, `problem_id`, `family`, `level`,
`source`, `licence` (or `license`), `teacher`, `sampling` and `finish_reason`; null is as if the field were missing. Ids may
be integers. A level may be a number or `Level 5`, as in the MATH data set. Other fields are kept as they are. `origin` is
added: the file and line that a row is from.
"""

import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phimini.model.io.json_files import Row, Span, dump, numbered_rows
from phimini.model.io.tokenizer import around
from phimini.stages.data.decontaminate import fingerprint, same_question
from phimini.stages.data.layouts import AUTO, Mapping
from phimini.stages.data.row_fields import ASKED_FIELDS, GIVEN_FIELDS, text_hash
from phimini.stages.verify.numerals import MAX_CHARACTERS

RowCheck = Callable[[Row], None]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".csv")
SETS = ("rollouts", "validation", "prompts", "heldout")

_LEVEL = re.compile(r"\s*(?:level)?\s*([0-9]{1,3})\s*", re.IGNORECASE)
MAX_LEVELS = 1000
MAX_ENTRIES = 100_000
"""files below a folder of rows: 30 B tokens are some 10,000 shards"""
_PROVENANCE = dict.fromkeys(("family", "source", "licence", "teacher"), str) | {"sampling": dict}


def sets_in(folder: Path) -> dict[str, Path]:
    """Return the file or folder of each of SETS in a user's folder. Raises ValueError for two of one name."""
    found: dict[str, Path] = {}
    for name in SETS:
        paths = [folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)]
        there = [path for path in paths if path.exists()]
        if len(there) > 1:
            raise ValueError(f"{folder}: expected one set {name}, found {[p.name for p in there]}")
        found |= dict.fromkeys([name] * len(there), *there)
    return found


def files_of(source: Path) -> list[Path]:
    """Return the file, or the files below a folder that are not hidden, in the order of their names.

    Raises ValueError for a folder without any, and for one with more than MAX_ENTRIES files of any kind, such as `/`.
    """
    if not source.is_dir():
        return [source]
    found, entries = [], 0
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        entries += len(names)
        if entries > MAX_ENTRIES:
            raise ValueError(f"{source}: expected a folder of rows, found more than {MAX_ENTRIES:,} files in it")  # fmt: skip
        found += [
            Path(folder, name) for name in names if name.endswith(SUFFIXES) and name[0] != "."
        ]
    if not found:
        raise ValueError(f"{source}: expected files named *{', *'.join(SUFFIXES)}, found none")
    return sorted(found)


def name_in(source: Path, name: str, path: Path) -> str:
    """Return the name that ids and origins give to one of a source's files."""
    return f"{name}/{path.relative_to(source)}" if path != source else name


def own_rollouts(
    source: Path,
    name: str,
    num_levels: int,
    check: RowCheck | None = None,
    mapped: Mapping = AUTO,
    note: Callable[[], None] = lambda: None,
    span: Span | None = None,
) -> Iterator[Row]:
    """Yield a source's rollouts with all our fields but the verdict; rows without an id get `name:line`.

    num_levels: of `curate.level_weights`. check: raises ValueError that names a field that it refuses.
    mapped: of a published layout. note: called at each row of the file, of which several rollouts may be. span: the lines
    of a file to read. Raises one ValueError for all bad rows of a file; see `numbered_rows`.
    """
    seen = _Seen()

    def completed(row: Row, at: str) -> Row:
        row = _completed(row, at, num_levels)
        _check_id(seen, row, at)
        if row.get("finish_reason") not in (None, "stop", "length"):
            raise _refused(at, "finish_reason", "stop or length", row["finish_reason"])
        row.setdefault("problem_id", row["question"])
        _check_problem(seen, row, at)
        _apply(check, row, at)
        return row

    yield from _numbered(source, name, GIVEN_FIELDS, completed, mapped, note, span)


def own_problems(
    source: Path,
    name: str = "",
    check: RowCheck | None = None,
    mapped: Mapping = AUTO,
    num_levels: int = MAX_LEVELS,
    note: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Yield a source's questions. name: default that of the file. Other arguments and errors as in `own_rollouts`."""
    seen = _Seen()

    def completed(row: Row, at: str) -> Row:
        row = _completed(row, at, num_levels)
        _check_id(seen, row, at)
        _apply(check, row, at)
        return row

    yield from _numbered(source, name or source.name, ASKED_FIELDS, completed, mapped, note)


def _numbered(
    source: Path,
    name: str,
    required: dict[str, type],
    completed: Callable[[Row, str], Row],
    mapped: Mapping,
    note: Callable[[], None],
    span: Span | None = None,
) -> Iterator[Row]:
    for path in files_of(source):
        file = name_in(source, name, path)
        before, k = 0, 0
        for line, row in numbered_rows(
            path, required, completed=completed, span=span, mapped=mapped
        ):
            before, k = line, k + 1 if line == before else 0
            if not k:
                note()
            origin = f"{file}:{line}/{k}" if k else f"{file}:{line}"
            yield {"id": origin, "origin": origin} | row


class _Seen:
    """The ids and problems of earlier rows, in a temporary database on the disk: those of ten million rows would fill the memory."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(
            "PRAGMA journal_mode=OFF; CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN;"
            "CREATE TABLE problems (id BLOB PRIMARY KEY, place, question, answer) WITHOUT ROWID"
        )

    def is_new(self, id: str) -> bool:
        """Add an id, and return False if it was there."""
        added = self._db.execute("INSERT OR IGNORE INTO ids VALUES (?)", (text_hash(id),))
        return added.rowcount == 1

    def problem(self, row: Row, at: str) -> tuple[str, str, str]:
        """Return place, question and answer of the first row with this row's problem id, which may be this row."""
        key, fields = text_hash(row["problem_id"]), (at, row["question"], row["answer"])
        query = "SELECT place, question, answer FROM problems WHERE id = ?"
        found = self._db.execute(query, (key,)).fetchone()
        if found is None:
            self._db.execute("INSERT INTO problems VALUES (?, ?, ?, ?)", (key, *fields))
        return found or fields


def _check_id(seen: _Seen, row: Row, at: str) -> None:
    """Raise ValueError for an id that an earlier row has."""
    if "id" in row and not seen.is_new(row["id"]):
        raise _refused(at, "id", "one that no earlier row has", row["id"])


def _completed(row: Row, at: str, num_levels: int) -> Row:
    _check_characters(row, at)
    if len(row["answer"]) > MAX_CHARACTERS:
        expected = f"at most {MAX_CHARACTERS} characters"
        raise _refused(at, "answer", expected, f"{len(row['answer'])} characters")
    row = {field: value for field, value in row.items() if value is not None}
    for field in ("id", "problem_id"):
        if field in row:
            row[field] = _identifier(row[field], at, field)
    if "license" in row:
        row.setdefault("licence", row.pop("license"))
    row = {"family": "", "source": "file"} | row
    for field, kind in _PROVENANCE.items():
        if field in row and not isinstance(row[field], kind):
            expected = "a string" if kind is str else "an object"
            raise _refused(at, field, expected, row[field])
    return row | {"level": _level(row.get("level", 0), at, num_levels)}


def _check_characters(row: Row, at: str) -> None:
    """Raise ValueError for a half of a UTF-16 pair, which JSON can escape and UTF-8 cannot hold."""
    for field, value in row.items():
        written = value if isinstance(value, str) else dump(value, f"{at}, field {field!r}")
        for text in (field, written):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                lone = text[error.start]
                raise ValueError(
                    f"{at}, field {field!r}: expected whole characters, got the lone surrogate {lone!r} in "
                    f"{around(text, lone)!r}"
                ) from error


def _identifier(value: Any, at: str, field: str) -> str:
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise _refused(at, field, "text or an integer", value)
    return value


def _level(value: Any, at: str, num_levels: int) -> int:
    """Return the level that a number or a text such as `Level 5` denotes."""
    if isinstance(value, str) and (match := _LEVEL.fullmatch(value)):
        level = int(match[1])
    elif type(value) is int or isinstance(value, float) and value.is_integer():
        level = int(value)
    else:
        raise _refused(at, "level", "a whole number or a text such as 'Level 3'", value)
    if not 0 <= level < num_levels:
        raise _refused(at, "level", f"0 to {num_levels - 1}, a weight of curate.level_weights for each", value)  # fmt: skip
    return level


def _check_problem(seen: _Seen, row: Row, at: str) -> None:
    """Raise ValueError if a problem id, by which pairs are found, stands for two questions or two answers."""
    place, question, answer = seen.problem(row, at)
    is_same = question == row["question"] or same_question(
        fingerprint(question), fingerprint(row["question"])
    )
    if not is_same:
        raise ValueError(
            f"{at}, field 'problem_id': {row['problem_id']!r:.60} stands for two questions: {question!r:.60} "
            f"in {place} and {row['question']!r:.60}"
        )
    if answer != row["answer"]:
        expected = f"{answer!r:.60}, the answer to this question in {place}"
        raise _refused(at, "answer", expected, row["answer"])


def _apply(check: RowCheck | None, row: Row, at: str) -> None:
    if check is not None:
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"{at}, {error}") from error


def _refused(at: str, field: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{at}, field {field!r}: expected {expected}, got {got!r:.60}")
