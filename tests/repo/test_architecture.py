"""The architecture, as tests: the rooms, their laws, and the files that every kernel comes with.

A room is a package folder. The docstring of its `__init__.py` is its law: one sentence that says what belongs
there, and a line "May import: ..." that lists rooms (`a/*` stands for the room `a` and every room in it).
"""

import ast
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ["kernels", "model", "parallel", "stages", "bench"]
"""A layer may import the layers to its left."""
MAX_FILES = 15
ROOMS = sorted(
    str(file.parent.relative_to(ROOT))
    for layer in LAYERS
    for file in (ROOT / layer).rglob("__init__.py")
)
NO_OPS = {"__init__.py", "transformers_model.py"}
KERNEL_FILES = sorted(p for p in (ROOT / "kernels").glob("*.py") if p.name not in NO_OPS)


def room_of(module: str) -> str:
    """Return the innermost room of a dotted name such as `phimini.kernels.head.rows.select`."""
    parts = module.split(".")[1:]
    while "/".join(parts) not in ROOMS:
        parts.pop()
    return "/".join(parts)


def our_imports(file: Path) -> set[str]:
    """Return the rooms that a file imports, inside functions and under `TYPE_CHECKING` too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {room_of(name) for name in names if name.startswith("phimini.")}


@cache
def imports_of(room: str) -> dict[str, list[str]]:
    """Return each room that `room` imports, with the files that do."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / room).glob("*.py")):
        for other in our_imports(file) - {room}:
            found.setdefault(other, []).append(file.name)
    return found


@cache
def law_of(room: str) -> set[str]:
    """Return the rooms that a room's law allows it to import."""
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or ""
    sentence, _, line = text.partition("\n\nMay import: ")
    assert sentence.count("\n") <= 1 and sentence.endswith("."), f"{room}: no sentence says its law"
    names = line.split(".\n")[0].rstrip(".").replace("\n", " ")
    assert names, f"{room}: its docstring has no line 'May import: ...'"
    allowed: set[str] = set()
    for name in [] if names == "no other room" else names.split(", "):
        inner = [r for r in ROOMS if name.endswith("/*") and r.startswith(name[:-1])]
        allowed |= {name.removesuffix("/*"), *inner}
    assert allowed <= set(ROOMS), f"{room}: its law names {sorted(allowed - set(ROOMS))}"
    return allowed


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_law_allows(room: str) -> None:
    wrong = {r: files for r, files in imports_of(room).items() if r not in law_of(room)}
    assert not wrong, f"{room} imports {wrong}; its law allows {sorted(law_of(room))}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_law_names_no_layer_to_the_right(room: str) -> None:
    later = LAYERS[LAYERS.index(room.split("/")[0]) + 1 :]
    assert not [r for r in law_of(room) if r.split("/")[0] in later]


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    order = TopologicalSorter({room: set(imports_of(room)) for room in ROOMS})
    order.prepare()  # raises CycleError, which names the circle


def test_a_folder_holds_at_most_fifteen_files() -> None:
    folders = {file.parent for name in [*LAYERS, "tests"] for file in (ROOT / name).rglob("*.py")}
    sizes = {str(f.relative_to(ROOT)): len(list(f.glob("*.py"))) for f in folders}
    assert not {folder: n for folder, n in sizes.items() if n > MAX_FILES}


def test_every_folder_of_python_files_is_a_room() -> None:
    folders = {
        str(file.parent.relative_to(ROOT))
        for name in LAYERS
        for file in (ROOT / name).rglob("*.py")
    }
    assert folders == set(ROOMS)


def test_tests_mirror_the_rooms_and_import_no_other_test() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        folder = str(file.parent.relative_to(ROOT / "tests"))
        assert (
            folder in [".", "repo", "stages/faults", *ROOMS] or folder.split("/")[0] == "support"
        ), file
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.startswith("test_")], f"{file.name} imports {names}"


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda p: p.stem)
def test_every_kernel_has_a_reference_a_test_and_a_bench(file: Path) -> None:
    functions = {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}
    assert f"{file.stem}_reference" in functions, f"{file.name}: no {file.stem}_reference"
    tests = ROOT / "tests" / "kernels"
    assert (tests / f"test_{file.name}").exists(), f"no tests/kernels/test_{file.name}"
    assert (ROOT / "bench" / "ops" / file.name).exists(), f"no bench/ops/{file.name}"


def test_every_public_kernel_has_a_user_in_the_product() -> None:
    """Neither another kernel, nor a bench, nor a test is a user. `apply_to` is for other people's models."""
    imported = {
        alias.name
        for layer in ("model", "parallel", "stages")
        for file in (ROOT / layer).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phimini.kernels")
        for alias in node.names
    }
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    public = {a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    ops = {n for n in public if n[0].islower() and not n.endswith("_reference")} - {"apply_to"}
    assert len(ops) > 8 and not ops - imported, f"nothing trains with {sorted(ops - imported)}"


def test_every_room_is_shipped() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(shipped) == sorted("phimini." + room.replace("/", ".") for room in ROOMS)
