"""Stage 4 with each rollout engine: equal policies of sampler and trainer at every step, and a stop otherwise."""

import dataclasses
import os
from pathlib import Path

import pytest
from forked_ranks import RankFailure, run_ranks
from rl_run import make_run, reinforce, run_config
from rollout_processes import fork_engines
from vllm_process import in_vllm

from phimini.model.io.json_files import read_rows
from phimini.parallel.ranks.layout import Layout
from phimini.stages.rollout.engine import LocalEngine, Sampled, Span

VLLM = "rollout.engine=vllm"
SEPARATE = (VLLM, "rollout.placement=separate")


def assert_trained(rows: list[dict], steps: int = 3) -> None:
    assert [row["step"] for row in rows] == list(range(steps))
    updates = [row for row in rows if "mismatch" in row]
    assert len(updates) >= 2, "this test wants updates"
    for row in updates:
        assert row["mismatch"] <= 1e-5 and row["mismatch_max"] <= 1e-4 and row["mismatch_kl"] < 1e-8


def test_local_engine_agrees_at_every_step(tmp_path: Path) -> None:
    run = run_config(make_run(tmp_path / "run"), "rlvr.importance=token_truncated")
    rows = run_ranks(reinforce, 1, run)[0]
    assert_trained(rows)
    assert all(row["max_age"] == 0 and row["stale_tokens"] == 0 for row in rows if "max_age" in row)


def test_a_sampler_left_behind_stops_the_run_with_the_cause(tmp_path: Path) -> None:
    run = run_config(make_run(tmp_path / "run"))

    def forgets() -> None:
        sync, calls = LocalEngine.sync, []

        def sync_first_only(engine: LocalEngine, model) -> None:
            calls.append(1)
            if len(calls) == 1:
                sync(engine, model)
            engine._version = model.num_updates

        LocalEngine.sync = sync_first_only  # pyright: ignore[reportAttributeAccessIssue]
        reinforce(run)

    with pytest.raises(RankFailure, match="MismatchError.*more than the alarm level") as e:
        run_ranks(forgets, 1)
    page = (Path(run.out) / "rlvr" / "mismatch.txt").read_text()
    assert page.startswith("phimini doctor --mismatch: ") and page.strip() in str(e.value)
    assert not (Path(run.out) / "rlvr" / "model").exists()


@pytest.mark.parametrize("limit", [1, 2])
def test_answers_older_than_the_limit_are_not_trained_on(tmp_path: Path, limit: int) -> None:
    run = run_config(make_run(tmp_path / "run"), f"rollout.max_staleness={limit}")

    def two_updates_old() -> list[dict]:
        generate = LocalEngine.generate

        def tagged(engine: LocalEngine, *args, **options) -> list[Sampled | None]:
            now = engine._version
            return [
                c and dataclasses.replace(c, versions=(Span(now - 2, 0, 1), Span(now, 1, len(c.tokens))))
                for c in generate(engine, *args, **options)
            ]  # fmt: skip

        LocalEngine.generate = tagged  # pyright: ignore[reportAttributeAccessIssue]
        return reinforce(run)

    if limit == 1:
        with pytest.raises(RankFailure, match="no update.* [1-9][0-9]* rollouts were older than rollout.max_staleness=1"):  # fmt: skip
            run_ranks(two_updates_old, 1)
        rows = read_rows(Path(run.out) / "rlvr" / "metrics.jsonl", {})
        assert all(row["too_stale"] > 0 and row["used_rollouts"] == 0 for row in rows)
        assert not any("mismatch" in row for row in rows), "no update was made"
    else:
        rows = run_ranks(two_updates_old, 1)[0]
        assert all(row["too_stale"] == 0 for row in rows)
        assert {row["max_age"] for row in rows if "max_age" in row} == {2}


def test_options_that_need_engines_of_their_own_say_so(tmp_path: Path) -> None:
    run = run_config(make_run(tmp_path / "run"), "rollout.asynchronous=true")
    with pytest.raises(
        RankFailure,
        match=r"rollout\.asynchronous=True: needs rollout\.engine=vllm rollout\.placement",
    ):
        run_ranks(reinforce, 1, run)


@pytest.mark.vllm
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=["1-rank", "2-ranks"])
def test_colocated_vllm_agrees_at_every_step(tmp_path: Path, layout: Layout) -> None:
    run = run_config(make_run(tmp_path / "run"), VLLM)
    for rows in in_vllm(reinforce, run, layout, world_size=layout.model_size):
        assert_trained(rows)


@pytest.mark.vllm
@pytest.mark.parametrize("partial", [False, True], ids=["one-step-off", "partial"])
def test_one_step_ahead_with_an_engine_of_its_own(tmp_path: Path, partial: bool) -> None:
    more = (
        "rollout.asynchronous=true",
        f"rollout.partial={partial}",
        "rlvr.importance=token_truncated",
        "rlvr.steps=4",
    )
    run = run_config(make_run(tmp_path / "run"), *SEPARATE, *more)
    rows = in_vllm(asynchronous, run)[0]
    updates = [row for row in rows if "max_age" in row]
    assert len(rows) == 4 and len(updates) >= 3
    assert updates[0]["max_age"] == 0 and all(row["mismatch_max"] <= 1e-4 for row in updates)
    assert all(row["mismatch_max"] > 0 for row in updates), "other answers tell, where those of this step are old"  # fmt: skip
    # Whether an answer is under way when the weights change, and so partly old, depends on the engine's speed.
    old = [row["max_age"] == 1 and row["stale_tokens"] > 0 for row in updates[1:]]
    assert any(old) if partial else all(old)
    assert all(row["max_age"] <= 1 for row in updates)


def asynchronous(run) -> list[dict]:
    """Start the engine by a fork of the trainer's process, which saves the imports."""
    from phimini.stages.rollout import separate_vllm

    fork_engines()
    rows = reinforce(run)
    assert separate_vllm._engines is not None
    for engine in separate_vllm._engines.service.engines:
        pid = engine.process.process.pid
        assert os.getsid(pid) == pid, "out of reach of a Ctrl-C"
    separate_vllm._engines.close()
    return rows


@pytest.mark.vllm
def test_a_sampler_with_other_weights_stops_a_run_that_is_one_step_ahead(tmp_path: Path) -> None:
    """With prefetch the rollouts are always older than the weights, so their age alone proves no mismatch."""
    run = run_config(
        make_run(tmp_path / "run"), *SEPARATE, "rollout.asynchronous=true", "rlvr.steps=4"
    )
    with pytest.raises(AssertionError, match="MismatchError.*more than the alarm level"):
        in_vllm(misled, run)
    page = (Path(run.out) / "rlvr" / "mismatch.txt").read_text()
    assert page.startswith("phimini doctor --mismatch: ")


def misled(run) -> list[dict]:
    """Send the engine wrong weights from the second update."""
    from phimini.stages.rollout.separate_vllm import SeparateVllm

    send = SeparateVllm._send

    def other(engine: SeparateVllm, tensors, version: int):
        factor = 1.0 if version < 2 else 1.3
        return send(engine, ((name, tensor * factor) for name, tensor in tensors), version)

    SeparateVllm._send = other  # pyright: ignore[reportAttributeAccessIssue]
    return asynchronous(run)
