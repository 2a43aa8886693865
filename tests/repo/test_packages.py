"""The commands run with the packages that `make demo` installs, and not only with those of the tests."""

import ast
import contextlib
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = """
import sys
import phimini.stages.commands
print(*(m.__file__ for name, m in sys.modules.items() if name.startswith("phimini.")), sep=chr(10))
"""


def imported_at_once(file: Path) -> set[str]:
    """Return the packages that a module imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"phimini"}


def with_requirements(names: set[str]) -> set[str]:
    """Return the distributions `names` with all that they require here, as canonical names."""
    found, left = set(), {canonicalize_name(name) for name in names}
    while left:
        found.add(name := left.pop())
        with contextlib.suppress(PackageNotFoundError):  # a requirement of another platform
            needed = [Requirement(line) for line in requires(name) or []]
            here = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
            left |= {canonicalize_name(r.name) for r in here} - found
    return found


def test_the_commands_need_no_package_but_those_of_make_demo() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = [*project.get("dependencies", []), *project["optional-dependencies"]["cpu"]]
    allowed = with_requirements({Requirement(line).name for line in pinned})
    listed = subprocess.run(
        [sys.executable, "-c", FILES], capture_output=True, text=True, check=True, timeout=120
    )
    files = [Path(line) for line in listed.stdout.splitlines()]
    packages = {name for file in files for name in imported_at_once(file)}
    of_package = packages_distributions()
    more = {
        name
        for name in packages
        if not {canonicalize_name(dist) for dist in of_package.get(name, [])} & allowed
    }
    assert len(files) > 50 and "torch" in packages
    assert not more, f"only the tests install {sorted(more)}"
