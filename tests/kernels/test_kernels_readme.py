"""The code in kernels/README.md runs, and the page stays short."""

import re
from pathlib import Path

import phimini.kernels

README = Path(phimini.kernels.__file__).resolve().parent / "README.md"


def test_the_example_runs() -> None:
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(found) == 1
    exec(compile(found[0], str(README), "exec"), {})
    used = set(re.findall(r"\b\w+", found[0]))
    public = {name for name in phimini.kernels.__all__ if name[0].islower()} - {"apply_to"}
    missing = {name for name in public if not name.endswith(("_reference", "checksums"))} - used
    assert not missing, f"kernels/README.md does not show {sorted(missing)}"


def test_the_page_has_at_most_80_lines() -> None:
    assert len(README.read_text().splitlines()) <= 80
