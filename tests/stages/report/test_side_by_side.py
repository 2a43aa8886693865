"""Two runs side by side: the settings that differ, paired scores, and a chart of each field with a line for each run."""

import json
import re
from pathlib import Path

import pytest
from browser import needs_chromium, probed

from phimini.model.io.checked_files import write_sealed
from phimini.model.io.json_files import write_rows
from phimini.stages.cli import main
from phimini.stages.report.intervals import mean_interval, paired_gain
from phimini.stages.report.side_by_side import differences
from phimini.stages.run.outputs import write_summary

ACCURACIES = {"a": [0.0, 0.25, 0.5, 0.5, 1.0, 0.25], "b": [0.25, 0.5, 0.5, 1.0, 1.0, 0.25]}


def make_run(folder: Path, steps: int, heldout: str = "What is 1 + 1?") -> Path:
    means = ACCURACIES[folder.name]
    mean, low, high = mean_interval(means, 8)
    write_rows(folder / "distill" / "heldout.jsonl", [{"question": heldout, "answer": "2"}])
    rows = [{"step": n, "loss": 2.0 - n / steps, "tokens": 5, "seconds": 0.1} for n in range(steps)]
    del rows[2]["loss"]
    write_rows(folder / "sft" / "metrics.jsonl", rows)
    for stage in ("distill", "sft"):
        write_summary(folder / stage, {})
    write_sealed(folder / "evaluate" / "sft.json", {"per_problem_mean": means})
    write_sealed(folder / "results.json", {
        "stages": [{"stage": "sft", "mean_at_8": mean, "ci95": [low, high]}], "date": "2026-12-01", "machine": "<m>",
        "wall_seconds": 9.0, "config": {"out": str(folder), "sft": {"epochs": steps, "optimizer": {"lr": 0.1}}},
    })  # fmt: skip
    return folder


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a", 20), make_run(tmp_path / "b", 30)
    page = tmp_path / "both.html"
    assert main(["compare", str(a), str(b), f"page={page}"]) == 0
    said = capsys.readouterr().out.splitlines()
    gain, low, high = (100 * x for x in paired_gain(ACCURACIES["a"], ACCURACIES["b"]))
    means = [sum(values) / 6 for values in ACCURACIES.values()]
    assert said == [
        "other settings: sft.epochs 20 and 30",
        f"sft: mean@8 {means[0]:.3f} -> {means[1]:.3f}: {gain:+.2f} [{low:+.2f}, {high:+.2f}] points, paired by problem, 95 %",
        str(page),
    ]  # fmt: skip
    text = page.read_text()
    assert "<td>sft.epochs</td><td>20</td><td>30</td>" in text and "&lt;m&gt;" in text
    figures = [json.loads(x) for x in re.findall(r'<script type="application/json">(.*?)</script>', text)]  # fmt: skip
    (loss,) = [figure["data"] for figure in figures if figure["data"][0]["name"] == str(a)]
    assert [line["name"] for line in loss] == [str(a), str(b)]


def test_other_held_out_problems_are_not_paired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make_run(tmp_path / "a", 5), make_run(tmp_path / "b", 5, "What is 3 - 1?")
    assert main(["compare", str(a), str(b), f"page={tmp_path / 'c.html'}"]) == 0
    said = capsys.readouterr().out
    assert "other held-out problems: no paired differences" in said and "points" not in said
    assert "The held-out problems are not the same" in (tmp_path / "c.html").read_text()


def test_a_run_and_another_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_run(tmp_path / "a", 5)
    assert main(["compare", str(a), str(tmp_path)]) == 2
    assert "or name two runs' folders, with results.json" in capsys.readouterr().err
    (a / "evaluate" / "sft.json").unlink()
    assert main(["compare", str(a), str(a)]) == 1
    assert "evaluate/sft.json" in capsys.readouterr().err


def test_differences_are_found_at_any_depth() -> None:
    a = {"out": "x", "seed": 0, "sft": {"lr": 1, "out": 1}, "gone": 2}
    b = {"out": "y", "seed": 0, "sft": {"lr": 2, "out": 3}, "new": None}
    assert list(differences(a, b)) == [("sft.lr", 1, 2), ("sft.out", 1, 3), ("gone", 2, None)]


@needs_chromium
def test_a_browser_shows_two_runs(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", 20), make_run(tmp_path / "b", 30)
    page = tmp_path / "both.html"
    assert main(["compare", str(a), str(b), f"page={page}"]) == 0
    probe = """dispatchEvent(new Event("beforeprint"));
    const root = document.documentElement;
    return { lines: document.querySelectorAll(".trace.scatter").length, overflow: root.scrollWidth - root.clientWidth };"""
    found = probed(page, 500, tmp_path, probe, "--virtual-time-budget=20000")
    assert found == {"lines": 2, "overflow": 0, "said": ""}
