"""The command `phimini`: `bench` is answered here, every other verb by `phimini.stages.cli`.

A bench is a file of this folder whose docstring begins with "`phimini bench NAME" and which has `main(arguments)`,
returning the exit status: 0 done, 1 a check that says no, 2 bad input.
"""

import importlib
import os
import re
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

from phimini.model.suggest import nearest
from phimini.parallel.ranks.local_launch import RankFailure
from phimini.stages.cli import EXPECTED
from phimini.stages.cli import main as stages_main
from phimini.stages.run.output import lasting_output

_FIRST_LINE = re.compile(r'"""`(phimini bench ([a-z0-9-]+)[^`]*)`[.:]? *(.*?)(?:""")?$')


def benches() -> dict[str, tuple[str, str]]:
    """Name -> (module, how it is called and what it measures), found by looking; nothing is imported.

    Some benches decide at import whether Triton interprets or compiles.
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        with path.open(encoding="utf-8") as file:
            first, rest = file.readline().strip(), file.read(400)
        if match := _FIRST_LINE.match(first):
            usage, name, what = match.groups()
            # A first line that only says how it is called: the next sentence says what it does.
            what = textwrap.shorten(what or rest.split(". ")[0], 110, placeholder=" ...")
            found[name] = (f"phimini.bench.{path.stem}", f"{usage}\n    {what.rstrip('.')}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; 2 for an unknown bench."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] != "bench":
        return stages_main(arguments)
    with lasting_output() as output:
        status = bench(arguments)
    return status or int(output.lost is not None)


def bench(arguments: list[str]) -> int:
    known = benches()
    if len(arguments) < 2 or arguments[1] in ("-h", "--help"):
        print("\n".join(usage for _, usage in known.values()))
        return 0
    name = arguments[1]
    if name not in known:
        print(f"phimini: unknown bench {name!r}; {nearest(name, known)}", file=sys.stderr)
        return 2
    try:
        check_options(arguments[2:])
        return importlib.import_module(known[name][0]).main(arguments[2:])
    except (ValueError, OSError, RankFailure) as error:
        kind, message = type(error).__name__, str(error)
        if isinstance(error, RankFailure):
            kind, message = error.error or (kind, message)
        elif isinstance(error, ValueError):  # its subclasses too
            kind = "ValueError"
        if kind not in EXPECTED:
            raise
        print(f"phimini: bench {name}: {message}", file=sys.stderr)
        return EXPECTED[kind]


def check_options(words: list[str]) -> None:
    """Before anything is measured: counts are at least 1, and the folder of `--json PATH` can be written."""
    split = [part for w in words for part in (w.split("=", 1) if w.startswith("--") else [w])]
    for option, value in pairwise(split):
        if option in ("--rounds", "--steps", "--repeats") and re.fullmatch("-[0-9]+|0+", value):
            raise ValueError(f"{option}: expected at least 1, got {value}")
        if option == "--json":
            folder = Path(value).parent
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK) or Path(value).is_dir():
                raise ValueError(f"--json {value}: expected a file that can be written")


if __name__ == "__main__":
    sys.exit(main())
