"""bench/results/README.md is what its rows and its text give, and a new run replaces its seed."""

import shutil
from pathlib import Path

import pytest
from gate_cases import CPU, row

from phimini.bench import results_page
from phimini.bench.gate.bless import bless
from phimini.bench.results_page import LADDER_FIELDS, RESULTS, fp8, ladder, main, markdown, speeds
from phimini.model.io.checked_files import write_sealed
from phimini.model.io.json_files import read_rows


def test_the_page_shows_the_committed_rows() -> None:
    assert (RESULTS / "README.md").read_text() == results_page.page(), "run `phimini bench readme`"


def test_a_changed_row_changes_the_page(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    bless([row(environment=CPU)], "first", tmp_path / "b")
    assert main(["--results", str(results), "--baselines", str(tmp_path / "b")]) == 0
    text = (results / "README.md").read_text()
    assert "Some CPU, threads 1, 2026-11-25, commit aaaaaaa, torch 2.13.0" in text
    assert "| kernels | op rope | 1.000 (0.990 to 1.010) ms | 0.5 of eager | 100.0 MiB |" in text
    path = results / "peers.jsonl"
    path.write_text(path.read_text().replace('"ratio": 2.98', '"ratio": 1.98', 1))
    assert "| 1.98 | 1.8 |" in results_page.page(results, tmp_path / "b")


def test_cells() -> None:
    assert markdown("a | b", [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |"
    first = row(environment=CPU)
    assert speeds([first, row(provider="eager", environment=CPU)]).count("| kernels |") == 1
    arm = {"steps": 1, "tenths": [1.0], "validation_loss": 1.0, "commit": "c", "same_weights": {}}
    rows = [arm | {"seed": s, "arm": "fp32"} for s in (0, 1)]
    rows += [arm | {"seed": s, "arm": "fp32 again", "tenths": [1.01 + s / 100]} for s in (0, 1)]
    # +1 % and +2 %: the mean is 1.5 %, Student's t of one degree of freedom 12.7062, the error 0.5 %
    assert "| 1 | fp32 again | 2 | +1.50 % [-4.85, +7.85] |" in fp8(rows)


def test_three_seeds_reach_the_claims_of_the_page() -> None:
    rows = read_rows(RESULTS / "ladder.jsonl", LADDER_FIELDS)
    assert len({row["seed"] for row in rows}) >= 3
    for run in rows:
        assert run["num_problems"] >= 500 and run["num_samples"] == 8
        assert all(stage["gain_ci95"][0] > 0 for stage in run["stages"][1:])
        assert run["stages"][-1]["mean_at_8"] >= 0.6
        dpo, rl = run["stages"][-2:]  # greedy may be flat, never significantly lower
        assert rl["greedy"] >= dpo["greedy"] or rl["greedy_mcnemar_p"] > 0.05
        assert run["peak_rss_bytes"] < 3e9
        tokens = {stage["stage"]: stage["tokens"] for stage in run["stages"]}
        assert tokens["midtrain"] == max(tokens.values())
    # Other work may have shared the cores with a run; the quickest was least disturbed.
    assert min(row["wall_seconds"] for row in rows) <= 12 * 60
    assert sum(row["stages"][-1]["mean_at_8"] for row in rows) / len(rows) >= 0.65


def test_a_new_run_replaces_its_seed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results_folder, run = tmp_path / "results", tmp_path / "run"
    shutil.copytree(RESULTS, results_folder)
    stage = {"stage": "rlvr", "mean_at_8": 0.5, "ci95": [0.4, 0.6], "gain": 0.1, "gain_ci95": [0.05, 0.15],
             "greedy": 0.6, "pass_at_8": 0.8, "steps": 10, "tokens": 1000, "seconds": 2.0, "cpu_seconds": 3.0}  # fmt: skip
    results = {"seed": 2, "stages": [{}, stage], "machine": "m", "date": "d", "wall_seconds": 1.0, "num_problems": 1,
               "num_samples": 8, "peak_rss_bytes": 1, "versions": {}}  # fmt: skip
    write_sealed(run / "results.json", results)
    assert main([str(run), "--results", str(results_folder)]) == 0
    page = (results_folder / "README.md").read_text()
    assert "| 2 | RL | 0.500 [0.400, 0.600] | +0.100 [+0.050, +0.150] |" in page
    rows = read_rows(results_folder / "ladder.jsonl", LADDER_FIELDS)
    assert [r["seed"] for r in rows] == [0, 1, 2] and ladder(rows).count("\n| 2 |") == 1
    with pytest.raises(ValueError, match="no results.json"):
        main([str(tmp_path)])
    write_sealed(run / "results.json", results | {"stages": [stage | {"stage": "sft"}]})
    with pytest.raises(ValueError, match="expected all stages up to rlvr, the last is sft"):
        main([str(run)])
    capsys.readouterr()
