"""The README: its length, commands, rooms, numbers, and links that exist."""

import re
from pathlib import Path

import pytest
import rooms

from phimini.bench.results_page import LADDER_FIELDS, summary
from phimini.model.io.json_files import read_rows

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(f for p in rooms.LAYERS for f in sorted((ROOT / p).rglob("README.md")))]  # fmt: skip


def links(page: Path) -> list[str]:
    """Return the relative link targets of a page."""
    found = re.findall(r"\]\(([^)#]+)", page.read_text())
    return [target for target in found if "://" not in target]


def test_it_has_at_most_120_lines_and_begins_with_the_two_commands() -> None:
    assert len(README.splitlines()) <= 120
    block = README.split("```")[1].strip().splitlines()
    assert [line.split("#")[0].strip() for line in block[:2]] == ["make demo", "make test"]


def test_its_rooms_are_the_laws() -> None:
    assert rooms.LINES.findall(README) == [rooms.room_lines()], "run `python tests/repo/rooms.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path) -> None:
    assert not [target for target in links(page) if not (page.parent / target).exists()]


@pytest.mark.parametrize(
    ("file", "text"),
    [("kernels/head/triton_kernels.py", "def _head_logits_kernel("),
     ("stages/rl/loss.py", "linear_policy_loss("),
     ("kernels/checksum.py", "def _checksum_kernel("),
     ("parallel/weight_sync/sync.py", "checksum"),
     ("parallel/weight_sync/readback.py", "checksum")],
)  # fmt: skip
def test_kernel_loss_and_proof_are_one_click_away(file: str, text: str) -> None:
    assert file in links(ROOT / "README.md") and text in (ROOT / file).read_text()


def test_its_accuracies_are_those_of_the_committed_runs() -> None:
    rows = read_rows(ROOT / "bench/results/ladder.jsonl", LADDER_FIELDS)
    table = summary(rows)
    assert table in README, "`phimini bench readme RUN...` prints the table"
    assert all(row["commit"] in README and row["date"] in README for row in rows)
    assert not re.findall(r"0\.\d{3} \[", README.replace(table, "")), "an accuracy that is no row"
