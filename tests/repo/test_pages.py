"""The pages in the rooms: their length, and every command in them run in order, with the files that they show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked_ranks import run_ranks

from phimini.stages.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(ROOT.glob("[a-z]*/README.md"))
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_a_page_has_at_most_120_lines() -> None:
    assert {page.parent.name for page in PAGES} >= {"kernels", "parallel", "stages", "bench"}
    assert not [page for page in PAGES if len(page.read_text().splitlines()) > 120]


def in_folder(folder: Path, words: list[str]) -> int:
    os.chdir(folder)
    return main(words)


def run_command(line: str, folder: Path) -> int:
    """Run one line of a page; `phimini` in a forked process, which has its imports already."""
    program, *words = line.split()
    if program == "phimini":
        return run_ranks(in_folder, 1, folder, words, timeout_s=400)[0]
    assert program == "python", line
    return subprocess.run([sys.executable, *words], cwd=folder, timeout=100).returncode


@pytest.mark.parametrize("room", ["stages", "parallel"])
def test_the_commands_of_a_page_run(room: str, tmp_path: Path) -> None:
    """A line that ends with `# gpu` needs GPUs or several machines, and is only checked for its verb."""
    commands = 0
    for kind, name, text in BLOCK.findall((ROOT / room / "README.md").read_text()):
        if name:
            (tmp_path / name).write_text(text)
        elif kind == "bash":
            for line in text.splitlines():
                command, _, mark = line.partition(" #")
                if "gpu" not in mark:
                    assert run_command(command, tmp_path) == 0, line
                    commands += 1
    assert commands >= 3
