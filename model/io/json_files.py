"""The one writer of files, and the readers of JSON, JSON Lines, Parquet and CSV, whose errors name the line.

A file is written under a temporary name in its own directory, flushed to the disk and renamed over
the old one, so a reader sees the old file or the new one and never a half of either.
"""

import base64
import csv
import errno
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]

TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")
"""The names of files that are not whole yet; a killed writer leaves one."""
COMPRESSED = (".gz", ".zst")
_JSON_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false",
               list: "a list", dict: "an object", type(None): "null"}  # fmt: skip


class Span(NamedTuple):
    """Consecutive lines of a file."""

    start: int
    """bytes before them"""
    line: int
    """number of the first, from 1"""
    lines: int


def read_rows(
    path: str | Path,
    required: Mapping[str, type],  # field -> str, int, float, bool, list or dict
    non_blank: Collection[str] = ("question", "answer"),
) -> list[Row]:
    """Return the rows of a JSON-lines file; see `numbered_rows`."""
    return [row for _, row in numbered_rows(path, required, non_blank)]


def numbered_rows(
    path: str | Path,
    required: Mapping[str, type],
    non_blank: Collection[str] = ("question", "answer"),
    completed: Callable[[Row, str], Row] = lambda row, at: row,
    span: Span | None = None,
    mapped: Callable[[Row, str], list[Row]] = lambda row, at: [row],
) -> Iterator[tuple[int, Row]]:
    """Yield (line, row) of a JSON-lines, Parquet or CSV file, each row an object that has the `required` fields.

    Required fields named in `non_blank` must hold more than white space. A float field takes integers too; an integer
    field does not take true or false. Empty lines are skipped. `mapped(row, "file, line N")` returns the rows that one of
    the file stands for, and `completed(row, "file, line N")` the row that is yielded; both may raise ValueError that names
    the place. span: the lines to read; default all. Raises, after the last line, one ValueError for all bad rows: it names
    file, line, field, the expected type and the value of the first bad row of each field, and counts the others; raises
    OSError if the file is unreadable.
    """
    found, refused = False, {}
    word = "row" if Path(path).suffix in _TABLES else "line"
    for line, parse in _records(Path(path), span):
        found, at = True, f"{path}, {word} {line}"
        try:
            rows = [
                _checked(row, required, non_blank, at) for row in mapped(_object(parse(at), at), at)
            ]
            rows = [completed(row, at) for row in rows]
        except ValueError as error:
            field = str(error).removeprefix(at).partition(":")[0]
            first, count = refused.get(field, (str(error), 0))
            refused[field] = first, count + 1
        else:
            yield from ((line, row) for row in rows)
    if not found:
        raise ValueError(f"{path}: expected at least one row, got an empty file")
    if refused:
        firsts = [
            f"{first} (the first of {count:,} such rows)" if count > 1 else first
            for first, count in refused.values()
        ]
        raise ValueError("; ".join(firsts))


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically.

    Raises ValueError that names a row that JSON cannot hold (NaN, a tensor), and OSError if the file cannot be written
    (disk full, no permission); the old file then stays.
    """

    def lines() -> Iterator[str]:
        for number, row in enumerate(rows, start=1):
            yield dump(row, f"{path}: row {number}") + "\n"

    _replace_file(Path(path), lines())


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file. Raises ValueError with the file and the place of a syntax error."""
    return _parsed(Path(path).read_bytes(), f"{path}")


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file of another program, which may hold NaN and Infinity.

    Raises ValueError that names the file if it is missing, malformed or holds anything but an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, atomically; errors as in `write_rows`."""
    _replace_file(Path(path), [dump(value, f"{path}", indent=2) + "\n"])


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, atomically; errors as in `write_rows`."""
    _replace_file(Path(path), [text])


def dump(value: Any, where: str, indent: int | None = None) -> str:
    """Return the JSON text of `value`. Raises ValueError that starts with `where` if JSON cannot hold it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not writable as JSON: {error}") from error


def array_text(array: np.ndarray) -> str:
    """Return an array's bytes as text that JSON can hold; 5.3 characters for each 4 bytes."""
    return base64.b64encode(array.tobytes()).decode()


def array_of(text: str, dtype: npt.DTypeLike) -> np.ndarray:
    """Return the array of `array_text`; it is read-only."""
    return np.frombuffer(base64.b64decode(text), dtype)


def append_line(file: IO[bytes], line: bytes, path: Path) -> None:
    """Write a line and its end to an unbuffered file by one system call, so that a process that dies loses no line.

    Raises OSError that names `path` if it cannot be written, in part or at all.
    """
    try:
        written = file.write(line + b"\n")
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    if written != len(line) + 1:  # the disk is full after a part of the line
        raise OSError(errno.ENOSPC, "cannot write: No space left on device", str(path))


def parsed_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield pairs of `file, line N` and the parsed line."""
    for number, line in _lines(path):
        at = f"{path}, line {number}"
        yield at, _parsed(line, at)


def spans(path: Path, least_bytes: int) -> Iterator[Span]:
    """Yield the spans that divide a file of lines, each of at least so many bytes but for the last."""
    start, line, size, number = 0, 1, 0, 0
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):  # noqa: B007
            size += len(text)
            if size >= least_bytes:
                yield Span(start, line, number + 1 - line)
                start, line, size = start + size, number + 1, 0
    if size:
        yield Span(start, line, number + 1 - line)


def count_rows(path: Path) -> int:
    """Return the number of rows of a file, for a progress: of its lines, also empty ones, or of a table."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with path.open("rb") as file:
            return pyarrow.parquet.ParquetFile(file).metadata.num_rows
    with _opened(path) as file:
        return sum(block.count(b"\n") for block in iter(partial(file.read, 1 << 20), b""))


def _records(path: Path, span: Span | None) -> Iterator[tuple[int, Callable[[str], Any]]]:
    """Yield the number of each row, and a function that returns its value; it takes the row's place for its errors."""
    if path.suffix in _TABLES:
        for number, row in enumerate(_TABLES[path.suffix](path), start=1):
            yield number, lambda _, row=row: row
    else:
        for number, line in _lines(path, span):
            yield number, partial(_parsed, line)


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, a few pages of it in memory."""
    import pyarrow.parquet

    try:
        with path.open("rb") as source, pyarrow.parquet.ParquetFile(source, buffer_size=1 << 20) as file:  # fmt: skip
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise ValueError(f"{path}: not readable as Parquet: {error}") from error


def _csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file, whose first row names the fields; an empty cell is null."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            for values in filter(None, reader):
                if len(values) != len(names):
                    where = (
                        f"line {reader.line_num}: expected {len(names)} columns, got {len(values)}"
                    )
                    raise csv.Error(where)
                yield {name: value or None for name, value in zip(names, values, strict=True)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as CSV: {error}") from error


_TABLES = {".parquet": _parquet_rows, ".csv": _csv_rows}
"""readers of files of rows by suffix; all others are of lines"""


def _lines(path: Path, span: Span | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, numbered from 1. ValueError if the file is cut or not of its suffix's format."""
    start, first, count = span or (0, 1, None)
    # Split at \n only: text mode would also break at U+2028, which JSON strings may contain.
    with _opened(path) as file:
        if start:
            file.seek(start)
        for number, line in enumerate(islice(file, count), start=first):
            if line.strip():
                yield number, line


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; `.gz` and `.zst` are decompressed. Raises ValueError for one that is cut off or another format."""
    if path.suffix not in COMPRESSED:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow  # here and below only where it is needed: it takes a quarter of a second and 40 MB

    with path.open("rb"), io.BufferedReader(pyarrow.input_stream(path)) as file:  # pyright: ignore[reportArgumentType]
        try:
            yield file
        except OSError as error:
            raise ValueError(f"{path}: cannot be decompressed: {error}") from error


def _parsed(data: bytes, at: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"{at}: not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"{at}: malformed JSON: nested too deeply") from error
    except ValueError as error:
        excerpt = data[:60].decode("utf-8", "replace").strip()
        raise ValueError(f"{at}: malformed JSON: {error}; it starts with {excerpt!r}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _object(row: Any, at: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{at}: expected an object, got {_described(row)}")
    return row


def _checked(row: Row, required: Mapping[str, type], non_blank: Collection[str], at: str) -> Row:
    for field, kind in required.items():
        if field not in row:
            raise ValueError(
                f"{at}, field {field!r}: expected {_JSON_NAMES[kind]}, got no such field; "
                f"the row has {sorted(row)}"
            )
        value = row[field]
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(
                f"{at}, field {field!r}: expected {_JSON_NAMES[kind]}, got {_described(value)}"
            )
        if field in non_blank and isinstance(value, str) and not value.strip():
            raise ValueError(f"{at}, field {field!r}: expected text, got {_described(value)}")
    return row


def _described(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{_JSON_NAMES.get(type(value), type(value).__name__)}: {text[:60]}{'...' if len(text) > 60 else ''}"


def _replace_file(path: Path, pieces: Iterable[str]) -> None:
    try:
        with atomic_file(path) as file:
            file.writelines(piece.encode() for piece in pieces)
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: not writable as UTF-8: {error.reason}") from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` when the block ends without an error, flushed to the disk.

    Makes the folder if it is missing. Raises OSError that names `path` if it cannot be written (disk full, no
    permission); the old file stays. An OSError of another file that the block reads passes through.
    """
    # A link keeps pointing to where its owner put the file: the file behind it is replaced.
    path, target = Path(path), Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        flush_directory(target.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (
            None,
            *map(str, (temporary, target, target.parent)),
        ):
            raise
        # os.path: a folder that may not be entered counts as no file.
        kept = (
            "the file that was there is unchanged" if os.path.exists(path) else "no file was left"
        )
        raise OSError(error.errno, f"cannot write: {error.strerror}; {kept}", str(path)) from error
    finally:
        if os.path.exists(temporary):  # only if something failed before the rename
            temporary.unlink()


def flush_directory(directory: Path) -> None:
    """Make renames and new names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush a directory
            raise
    finally:
        os.close(handle)
