"""The audit of a run: the choice of verdicts, and its counts in metrics, files and page, on planted faults."""

import json
from pathlib import Path

import pytest
from forked_ranks import run_ranks
from rl_run import make_run, reinforce, run_config

from phimini.stages.report.page import audits
from phimini.stages.run.audits import Audited, audit_counts, audit_of, is_audited

COUNTS = ("audited", "audit_undecided", "audit_disagree", "audited_accuracy", "accuracy")


def test_the_choice_is_a_share_and_a_function_of_seed_and_name() -> None:
    chosen = [is_audited(0, 0.1, "rlvr", i) for i in range(4000)]
    assert 320 < sum(chosen) < 480
    assert chosen == [is_audited(0, 0.1, "rlvr", i) for i in range(4000)]
    assert chosen != [is_audited(1, 0.1, "rlvr", i) for i in range(4000)]
    assert all(is_audited(0, 1.0, i) for i in range(100))
    assert not any(is_audited(0, 0.0, i) for i in range(100))


def test_counts_and_the_list_of_disagreements() -> None:
    pairs = [Audited(True, "right"), Audited(True, "wrong"), Audited(False, "right"), Audited(False, "wrong"), Audited(True, "undecided"), Audited(None, "right")]  # fmt: skip
    assert audit_counts(pairs) == {"audited": 6, "decided": 5, "right": 3, "disagree": 2, "accuracy": 0.6}  # fmt: skip
    assert audit_counts(pairs[4:5])["accuracy"] is None
    row = {"id": "a", "question": "q", "answer": "1", "response": "x" * 700 + "end", "level": 3}
    found = audit_of([(row | {"id": str(i)}, both) for i, both in enumerate(pairs)])
    assert [(r["id"], r["verdict"], r["second"]) for r in found["disagreements"]] == [("1", True, "wrong"), ("2", False, "right")]  # fmt: skip
    (end,) = {r["response_end"] for r in found["disagreements"]}
    assert len(end) == 600 and end.endswith("xend")


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.0), (2, 0.5)])
def test_a_step_counts_what_a_verifier_of_coins_gets_wrong(
    tmp_path: Path, ranks: int, share: float
) -> None:
    """The verdict of `rl_run` is a coin. The second check sees no box in the answers of a model with random weights."""
    run = run_config(make_run(tmp_path / "run"), f"audit={share}")
    rows, *others = [
        [{name: row.get(name) for name in COUNTS} for row in of_rank]
        for of_rank in run_ranks(reinforce, ranks, run)
    ]
    assert all(of_rank == rows for of_rank in others)
    for row in rows:
        assert row["audit_undecided"] == 0 and row["audited_accuracy"] == 0.0
        if share == 1:
            assert row["audited"] == 16 and row["audit_disagree"] == 16 * row["accuracy"]
        else:
            assert 0 < row["audited"] < 16
    listed = audits(tmp_path / "run", {"rlvr": {}})["RL, rollouts"]
    assert listed["audited"] == sum(row["audited"] for row in rows)
    assert len(listed["disagreements"]) == sum(row["audit_disagree"] for row in rows) > 0
    for row in listed["disagreements"]:
        assert row["question"].startswith("What is ") and row["verdict"] and row["second"] == "wrong"  # fmt: skip
        assert len(row["response_end"]) % 2 == 0, "the coin"
    files = json.loads((tmp_path / "run" / "rlvr" / "summary.json").read_text())
    assert "audits/000001.json" in json.dumps(files)
