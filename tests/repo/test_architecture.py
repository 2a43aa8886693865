"""The architecture, as tests: who may import whom, and what every kernel file must come with."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A folder may import the folders to its left.
LAYERS = ["kernels", "model", "parallel", "stages", "bench"]
KERNEL_FILES = sorted(p for p in (ROOT / "kernels").glob("*.py") if not p.name.startswith("_"))


def our_imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {n.split(".")[1] for n in names if n.startswith("phimini.")}


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_point_one_way(folder: str) -> None:
    allowed = set(LAYERS[: LAYERS.index(folder) + 1])
    for file in (ROOT / folder).rglob("*.py"):
        wrong = our_imports(file) - allowed
        assert not wrong, (
            f"{file.relative_to(ROOT)} imports {sorted(wrong)}; allowed: {sorted(allowed)}"
        )


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda p: p.stem)
def test_every_kernel_has_a_reference_a_test_and_a_bench(file: Path) -> None:
    functions = {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}
    assert f"{file.stem}_reference" in functions, f"{file.name}: no {file.stem}_reference"
    assert (ROOT / "tests" / f"test_{file.name}").exists(), f"no tests/test_{file.name}"
    assert (ROOT / "bench" / file.name).exists(), f"no bench/{file.name}"


def test_every_package_folder_is_shipped() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [
        "phimini." + ".".join(p.parent.relative_to(ROOT).parts)
        for folder in LAYERS
        for p in (ROOT / folder).rglob("__init__.py")
    ]
    assert sorted(shipped) == sorted(found)


def test_the_readme_tree_names_every_file_and_no_other() -> None:
    """A folder ends in `/`; its files follow, indented, each with the first line of its docstring."""
    text = (ROOT / "README.md").read_text()
    tree = text.split("## What is where", 1)[1].split("```")[1]
    named, folder = set(), ""
    for line in filter(str.strip, tree.splitlines()):
        name, note = line.split(maxsplit=1)
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            assert (ROOT / name).exists(), f"README's tree names {name}, which does not exist"
        else:
            named.add(f"{folder}{name}")
            docstring = ast.get_docstring(ast.parse((ROOT / folder / name).read_text())) or ""
            assert note.rstrip(".") == docstring.split("\n")[0].rstrip("."), f"{folder}{name}"
    found = {
        str(p.relative_to(ROOT))
        for f in LAYERS
        for p in (ROOT / f).rglob("*.py")
        if p.name != "__init__.py"
    }
    assert named == found, (
        f"README's tree lacks {sorted(found - named)}, has {sorted(named - found)}"
    )
