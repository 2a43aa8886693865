"""The README's speeds are the committed rows, and whoever types one over is found out."""

from pathlib import Path

import pytest
from gate_cases import CPU, row

from phimini.bench.gate import readme_table as readme
from phimini.bench.gate.bless import bless

ROOT = Path(__file__).parents[3]


def test_the_readme_shows_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text()
    expected = readme.replaced(text, readme.tables(ROOT / readme.BASELINES))
    assert text == expected, "README: run `phimini bench readme --write`"


def test_the_table_and_where_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bless([row(environment=CPU), row(bench="train", case={"stage": "sft"}, unit="tokens/cpu_s", environment=CPU)],
          "first", tmp_path / "b")  # fmt: skip
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.START}\n| stale |\n{readme.END}\nafter\n")
    arguments = ["--readme", str(path), "--baselines", str(tmp_path / "b")]
    assert readme.main([*arguments, "--write"]) == 0
    text = path.read_text()
    assert text.startswith(
        f"before\n{readme.START}\n\nSome CPU, threads 1, 2026-11-25, commit aaaaaaa, torch 2.13.0"
    )
    assert text.endswith(f"{readme.END}\nafter\n") and "stale" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[1:] == [
        "| train | stage sft | 1.000 (0.990 to 1.010) tokens/cpu_s | 0.5 of eager | 100.0 MiB |",
        "| kernels | op rope | 1.000 (0.990 to 1.010) ms | 0.5 of eager | 100.0 MiB |",
    ]
    assert (
        readme.main([*arguments, "--write"]) == 0 and path.read_text() == text
    )  # nothing more to do
    path.write_text("no comments")
    assert readme.main([*arguments, "--write"]) == 2 and path.read_text() == "no comments"
    assert "expected the lines" in capsys.readouterr().err
