"""What the README says of both engines is what the committed rows say."""

from pathlib import Path

import pytest

from phimini.bench.studies import engines
from phimini.model.io.json_files import read_rows, write_json, write_rows
from phimini.stages.report.intervals import paired_gain

README = (Path(__file__).parents[3] / "README.md").read_text()


def committed() -> list[dict]:
    return read_rows(engines.ROWS, {"kind": str})


def test_the_readme_shows_the_committed_rows() -> None:
    for table in (engines.recipe_table(committed()), engines.table(committed())):
        assert table in README, "README: paste what `phimini bench engines` prints"


def test_the_recipe_gets_as_far_with_vllm() -> None:
    """With an engine in each rank and one step ahead: no run is separated from the local one of its seed."""
    runs = [row for row in committed() if row["kind"] == "recipe"]
    local = {row["seed"]: row["per_problem_mean"] for row in runs if row["engine"] == "local"}
    vllm = [row for row in runs if row["engine"] != "local"]
    assert len({row["engine"] for row in vllm}) >= 3 and len(local) >= 3
    assert max(row["max_age"] for row in vllm) == 1
    for row in vllm:
        _, low, high = paired_gain(local[row["seed"]], row["per_problem_mean"])
        assert low <= 0 <= high and high - low < 0.05, (row["seed"], row["engine"])
        assert row["steps"] >= 20 and 0 < row["mismatch_max"] < 1e-3


def test_no_difference_between_the_engines_is_separated_from_nothing() -> None:
    rows = committed()
    same = [row for row in rows if row["kind"] == "same model"]
    assert {row["what"] for row in same} == {"evaluation", "training"}
    for row in same:
        assert row["prompts"] * row["samples"] >= 8000
        for measure, (_, low, high) in row["difference"].items():
            assert low <= 0 <= high, (row["what"], measure)
        _, low, high = row["difference"]["accuracy"]
        assert high - low < 0.04, "an interval so wide would hide the 0.02 that was asked about"
    found = engines.after_rl(rows)
    _, low, high = found["difference"]
    assert all(len(runs) >= 3 for runs in found["means"].values()) and low <= 0 <= high


def test_runs_are_collected_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(engines, "ROWS", tmp_path / "rows.jsonl")
    shares = {("local", 1): 0.5, ("local", 2): 0.75, ("vllm", 1): 0.5, ("vllm", 2): 0.25}
    for (engine, seed), share in shares.items():
        run = tmp_path / f"{engine}{seed}"
        for folder in ("rlvr", "evaluate"):
            (run / folder).mkdir(parents=True)
        write_json(run / "rlvr/summary.json", {"settings": {"seed": seed, "rlvr": {"steps": 20}}})
        found = {"num_samples": 4, "per_problem_mean": [share, share], "greedy": {"accuracy": 1.0}}
        write_json(run / "evaluate/rlvr.json", found)
    words = [f"{engine}={tmp_path / f'{engine}{seed}'}" for engine, seed in shares]
    assert engines.main(words) == 0 and engines.main(words[:1]) == 0
    found = engines.after_rl(read_rows(engines.ROWS, {"kind": str}))
    assert found["means"] == {"local": [0.75, 0.5], "vllm": [0.5, 0.25]}, (
        "collected last, stands last"
    )
    gain, low, high = found["difference"]
    assert gain == -0.25 and low < gain < high
    printed = "| 2 and 2 runs, from 0.500 to 0.750 and from 0.250 to 0.500 | 0.625 | 0.375 |"
    assert printed in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected local=RUN or vllm=RUN, got 'hf=x'"):
        engines.main(["hf=x"])


def test_a_whole_run_is_held_to_the_local_one_of_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    after_rl = [row for row in committed() if row["kind"] == "after RL"]
    monkeypatch.setattr(engines, "ROWS", tmp_path / "rows.jsonl")
    for how, shares in (("local", [0.5, 0.25]), ("its own engine", [0.5, 0.75])):
        run = tmp_path / how
        (run / "evaluate").mkdir(parents=True)
        stages = [{"mean_at_8": m, "ci95": [0.0, 1.0]} for m in (0.125, sum(shares) / 2)]
        write_json(run / "results.json", {"seed": 3, "stages": stages, "machine": "m", "date": "d"})
        write_json(run / "evaluate/rlvr.json", {"per_problem_mean": shares})
        metrics = [{"step": 0}, {"mismatch_max": 1e-5, "max_age": 0}, {"mismatch_max": 2e-5, "max_age": 1}]  # fmt: skip
        write_rows(run / "rlvr/metrics.jsonl", metrics)
    words = [f"--recipe={how}={tmp_path / how}" for how in ("its own engine", "local")]
    write_rows(engines.ROWS, after_rl)
    assert engines.main(words) == 0 and engines.main(words[:1]) == 0
    printed = capsys.readouterr().out
    assert (
        "| 3 | local | 0.125 [0.000, 1.000] | 0.375 [0.000, 1.000] |  | 2 | 2e-05 | 1 |" in printed
    )
    assert (
        "| 3 | its own engine | 0.125 [0.000, 1.000] | 0.625 [0.000, 1.000] | +0.250 [" in printed
    )
    rows = read_rows(engines.ROWS, {"kind": str})
    assert sum(row["kind"] == "recipe" for row in rows) == 2, "collected anew, it stands once"
    with pytest.raises(ValueError, match="no results.json"):
        engines.main([f"--recipe=local={tmp_path}"])
