"""Limits on the path of one loss through our code: files, functions, and clicks to the Triton text."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import interpreter  # noqa: F401  repairs Triton's interpreter
import pytest
from head_cases import make_head

import phimini.kernels
from phimini.kernels import linear_cross_entropy
from phimini.kernels.backend.launch import Backend

ROOM = Path(phimini.kernels.__file__).resolve().parent
MOST_FILES, MOST_FUNCTIONS, MOST_CLICKS = 6, 30, 5


def functions_run(fn: Callable[[], object]) -> set[tuple[str, str]]:
    """Return (file, function) of each of our functions that `fn` runs, on this thread."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, _arg: object) -> None:
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        fn()
    finally:
        sys.setprofile(None)
    found = {(Path(code.co_filename).resolve(), code.co_qualname) for code in codes}
    return {
        (str(path.relative_to(ROOM)), name) for path, name in found if path.is_relative_to(ROOM)
    }


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_cross_entropy_runs_through_few_files(backend: Backend, each_library: str) -> None:
    hidden, weight, targets = make_head(40, 64, 300)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    step = lambda: linear_cross_entropy(*leaves, targets, _backend=backend)[0].backward()
    step()  # what is computed once per process
    found = functions_run(step)
    files = {file for file, _ in found}
    assert {"linear_cross_entropy.py", f"head/{backend}_backend.py"} <= files
    assert len(files) <= MOST_FILES, sorted(files)
    assert len(found) <= MOST_FUNCTIONS, sorted(found)


def definitions(file: Path) -> dict[str, tuple[Path, ast.AST]]:
    """Return the functions and classes that a name means in `file`, defined there or imported from this project."""
    found: dict[str, tuple[Path, ast.AST]] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = (file, node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phimini.kernels"):
            assert node.module is not None
            path = ROOM.joinpath(*node.module.split(".")[2:]).with_suffix(".py")
            own = definitions(path) if path.exists() else {}
            found |= {alias.name: own[alias.name] for alias in node.names if alias.name in own}
    return found


def clicks(file: Path, start: str, goal: str) -> list[str]:
    """Return the names to follow from `start` to `goal`, each one read in the definition of the name before it.

    A method that is called on an object (`head.forward`) is not followed: an editor may not know the object's class.
    """
    ways = [([start], definitions(file)[start])]
    seen = {start}
    for names, (path, node) in ways:
        if names[-1] == goal:
            return names[1:]
        known = definitions(path)
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in known and part.id not in seen:
                seen.add(part.id)
                ways.append(([*names, part.id], known[part.id]))
    return []


@pytest.mark.parametrize("op", ["cross_entropy", "dpo", "policy_loss", "logprob"])
@pytest.mark.parametrize("kernel", ["_head_logits_kernel", "_head_gradient_kernel"])
def test_the_triton_text_is_five_clicks_away(op: str, kernel: str) -> None:
    followed = clicks(ROOM / f"linear_{op}.py", f"linear_{op}", kernel)
    assert 0 < len(followed) <= MOST_CLICKS, followed
