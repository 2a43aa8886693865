"""Command-line options that the benches share, and the file that `--json PATH` names."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from phimini.bench.gate.rows import Row, SchemaError, write
from phimini.model.io.json_files import write_json


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, which the command prints in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def parser(name: str, doc: str | None, *, json: bool = True) -> Parser:
    """Return the parser of `phimini bench NAME`; `doc`, its module's docstring, is its help."""
    made = Parser(
        prog=f"phimini bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if json:
        made.add_argument(
            "--json",
            type=output_file,
            metavar="PATH",
            help="write the rows here; *.jsonl: as `bench compare` reads them",
        )
    return made


def at_least_one(text: str) -> int:
    """Return a count from its option's text."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def output_file(text: str) -> Path:
    """Return a path whose folder exists and can be written, so that no measurement is lost at its end."""
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: expected a file that can be written")
    return path


def finish(
    path: Path | None, rows: Sequence[Row], plain: Sequence[Mapping[str, Any]] | None = None
) -> int:
    """Write the rows of a bench and return its status: 1 if one of our results is wrong.

    A *.jsonl path gets `rows`. Any other path gets `plain`, one JSON list for the users' own gates, where the bench has
    such rows.
    """
    if path is not None and (plain is None or path.suffix == ".jsonl"):
        write(path, rows)
    elif path is not None:
        write_json(path, plain)
    return 0 if all(row.correct for row in rows if row.provider == "phimini") else 1


def status_of(name: str, run: Callable[[], int]) -> int:
    """Return run()'s status, or 4 for files of another schema and 2 for unreadable ones, after one line on stderr."""
    try:
        return run()
    except SchemaError as problem:
        print(f"schema change: {problem}", file=sys.stderr)
        return 4
    except (OSError, ValueError) as problem:
        print(f"phimini: bench {name}: {problem}", file=sys.stderr)
        return 2
