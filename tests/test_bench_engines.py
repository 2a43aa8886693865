"""What the README says of both engines is what the committed rows say."""

from pathlib import Path

import pytest

from phimini.bench import engines
from phimini.stages.jsonl import read_rows, write_json

README = (Path(__file__).parent.parent / "README.md").read_text()


def committed() -> list[dict]:
    return read_rows(engines.ROWS, {"kind": str})


def test_the_readme_shows_the_committed_rows() -> None:
    assert engines.table(committed()) in README, "README: paste what `phimini bench engines` prints"


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
