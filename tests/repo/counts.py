"""Counts of the repository: `python tests/repo/counts.py [ROOT]` prints lines, files per folder and prose shares.

Works on any revision that has the folders, such as a `git worktree` of an old commit. Files and functions on the way
of a document, a rollout and a weight are counted by `test_journeys.py`.
"""

import sys
from collections import Counter
from pathlib import Path

import prose

PRODUCT = ["kernels", "model", "parallel", "stages", "bench"]


def count_lines(root: Path) -> dict[str, int]:
    """Return the number of lines of Python, and of templates, in each package."""
    files = {p: [*(root / p).rglob("*.py"), *(root / p).rglob("*.j2")] for p in prose.PACKAGES}
    return {p: sum(len(f.read_text().splitlines()) for f in found) for p, found in files.items()}


def count_files(root: Path) -> Counter[str]:
    """Return the number of Python files in each folder."""
    files = (file for package in prose.PACKAGES for file in (root / package).rglob("*.py"))
    return Counter(str(file.parent.relative_to(root)) for file in files)


def main(root: Path) -> None:
    """Print all counts."""
    lines = count_lines(root)
    for package, count in lines.items():
        print(f"lines: {package}: {count:,}")
    print(
        f"lines: product: {sum(lines[package] for package in PRODUCT):,}; tests: {lines['tests']:,}"
    )
    folders = count_files(root)
    for folder, count in sorted(folders.items()):
        print(f"files: {folder}: {count}")
    print(
        f"files: {sum(folders.values())} in {len(folders)} folders, at most {max(folders.values())}"
    )
    prose.main(root)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
