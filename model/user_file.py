"""Functions in Python files of the user's, named `FILE.py:FUNCTION` on the command line."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phimini.model.suggest import nearest


def function_of(name: str, field: str) -> Callable[..., Any]:
    """Import the file and return the function. `field`: the setting that names it, for errors.

    Raises ValueError for a file or function that is not there, and for a file that cannot be imported.
    """
    path, _, function = name.rpartition(":")
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"user_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(
            f"{field} {name}: expected FILE.py:FUNCTION, found no Python file at {path or name}"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    # Import runs the user's code, which may raise any kind of error: raised again, with the setting's name.
    except Exception as error:
        raise ValueError(
            f"{field} {name}: {file} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    made = {key: value for key, value in vars(module).items() if callable(value)}
    if function not in made:
        raise ValueError(
            f"{field} {name}: no function {function!r} in {file}; {nearest(function, made)}"
        )
    return made[function]
