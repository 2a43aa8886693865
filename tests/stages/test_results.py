"""results.json describes the whole run, also after an interruption or a second call."""

from pathlib import Path

import pytest

from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.stages import recipe
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.report.viewer import page


def test_a_second_call_does_not_make_the_run_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "write_run_pages", lambda out: None)
    evaluations = []
    for stage in ("base", "midtrain"):
        write_sealed(
            tmp_path / stage / "summary.json",
            {"steps": 3, "tokens": 9, "seconds": 40.0, "cpu_seconds": 50.0},
        )
        evaluations.append(
            {
                "stage": stage,
                "model_id": f"{stage} 1",
                "mean_at_8": 0.5,
                "ci95": [0.4, 0.6],
                "pass_at_8": 0.9,
                "seconds": 10.0,
                "greedy": {"accuracy": 0.5, "ci95": [0.4, 0.6]},
                "per_problem_mean": [0.5, 0.5],
                "per_problem_greedy": [1, 0],
                "num_problems": 2,
                "num_samples": 8,
            }
        )
    run = override(tiny(), [f"out={tmp_path}"])
    written = []
    for peak, seconds, model in (
        (5_000, 30.0, "1"),
        (9_000, 130.0, "1"),
        (1_000, 2.0, "1"),
        (1_000, 2.0, "2"),
    ):
        evaluations[1]["model_id"] = f"midtrain {model}"
        recipe.write_results(run, evaluations, peak, seconds)
        results = read_sealed(tmp_path / "results.json")
        written.append((results["peak_rss_bytes"], results["wall_seconds"]))
    # Two stages and two evaluations took 100 s, whatever the call that wrote it took; another model is another run.
    assert written == [(5_000, 100.0), (9_000, 130.0), (9_000, 130.0), (1_000, 100.0)]
