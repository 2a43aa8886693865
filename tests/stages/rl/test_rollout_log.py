"""Stage 4's rollouts on disk: the table of each step, and the journal of a step's answers."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked_ranks import RankFailure, run_ranks
from rl_run import make_run, reinforce, run_config
from rollout_cases import LONG
from rollout_processes import fork_engines
from vllm_process import in_vllm

from phimini.model.io.checked_files import read_sealed
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import digest
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.rl.rollout_log import TABLE
from phimini.stages.rl.rollouts import ANSWER, Journal
from phimini.stages.rollout.engine import Arrived, First, Sampled, Span, unnoticed

A_STEP = 16
WORDS = ("rlvr.max_new_tokens=12", "rlvr.checkpoint_every=2", "rlvr.uniform_length=false")
ALONE = (*WORDS, "rollout.max_batch=1")
"""answers are sampled one by one, so that their last bits do not depend on company"""


def counted(run: RunConfig, die_at: int | None = None, torn: bool = False) -> int:
    """Run stage 4; return the number of answers that this rank's engine sampled for steps.

    die_at: SIGKILL as soon as this rank has noted so many of them. torn: and the half of one more.
    """
    append, asked = Journal._append, []

    def then_killed(self: Journal, request: int, completion: Sampled) -> None:
        append(self, request, completion)
        asked.append(request)
        if die_at is not None and len(asked) == die_at + torn:
            if torn:
                self._file.write_bytes(self._file.read_bytes()[:-100])
            os.kill(os.getpid(), signal.SIGKILL)

    Journal._append = then_killed
    if run.rollout.engine == "vllm":
        fork_engines()
    reinforce(run)
    return len(asked)


def killed(run: RunConfig, *args: Any, ranks: int = 1, start: Any = run_ranks) -> set[int]:
    """Run stage 4 until a kill; return the requests whose answers are on disk."""
    with pytest.raises((RankFailure, AssertionError), match="SIGKILL"):
        start(counted, ranks, run, *args)
    folder, found = Path(run.out) / "rlvr", set()
    for path in folder.glob("rollouts/*.parquet"):
        found.update(pq.read_table(path)["request"].to_pylist())
    for path in folder.glob("checkpoints/rollouts/*"):
        found.update(whole_rows(path))
    return found


def whole_rows(path: Path) -> list[int]:
    """Return the requests of a file of checkpoints/rollouts/."""
    if path.suffix == ".parquet":
        return pq.read_table(path)["request"].to_pylist()
    found, reader = [], pa.ipc.open_stream(path.read_bytes())
    try:
        for batch in reader:
            found += batch["request"].to_pylist()
    except OSError:  # half of one
        pass
    return found


def outcome(run: RunConfig) -> dict[str, bytes]:
    """Return the files of the stage whose bytes two runs share."""
    folder = Path(run.out) / "rlvr"
    names = [*sorted(folder.glob("rollouts/*")), folder / "model" / "model.safetensors"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("start") / "run")


@pytest.fixture(scope="module")
def whole(start: Path) -> RunConfig:
    """An undisturbed run."""
    run = run_config(shutil.copytree(start, start.with_name("whole")), *ALONE)
    assert run_ranks(counted, 1, run) == [3 * A_STEP]
    return run


def test_the_table_of_a_step_has_what_was_sampled_and_trained_on(whole: RunConfig) -> None:
    folder = Path(whole.out) / "rlvr"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    described = read_sealed(folder / "summary.json")["files"]
    assert len(metrics) == 3
    for step, row in enumerate(metrics):
        name = f"rollouts/{step + 1:06d}.parquet"
        table = pq.read_table(folder / name, page_checksum_verification=True)
        assert table.schema == TABLE and described[name]["rows"] == len(table) == A_STEP
        rows = table.to_pylist()
        assert {r["step"] for r in rows} == {step} and len({r["request"] for r in rows}) == A_STEP
        assert np.mean([r["reward"] for r in rows]) == pytest.approx(row["reward"])
        assert sum(r["advantage"] is not None for r in rows) == row["used_rollouts"] > 0
        assert np.mean([len(r["tokens"]) for r in rows]) == pytest.approx(row["response_length"])
        for r in rows:
            assert len(r["tokens"]) == len(r["logprobs"]) and max(r["logprobs"]) <= 0
            assert (r["reward"] > 0) == (len(r["text"]) % 2 == 0), "the reward of `rl_run`"
            assert (r["reason"] == "equal") == (r["reward"] > 0)
            (span,) = r["versions"]
            assert (span["version"], span["start"], span["end"]) == (step, 0, len(r["tokens"]))
        assert len({r["versions"][0]["weights"] for r in rows}) == 1
    assert not (folder / "checkpoints").exists(), "nor the journals there"


@pytest.mark.parametrize(
    ("die_at", "torn"),
    [(1, False), (7, True), (A_STEP, False), (A_STEP + 5, False), (2 * A_STEP + 3, True)],
    ids=["after-one", "in-a-record", "after-the-last-of-a-step", "without-a-checkpoint", "after-a-checkpoint"],
)  # fmt: skip
def test_a_killed_step_asks_no_finished_answer_again(
    start: Path, whole: RunConfig, tmp_path: Path, die_at: int, torn: bool
) -> None:
    """The table of step 1 serves where the kill was in step 2, before the checkpoint after it."""
    run = run_config(shutil.copytree(start, tmp_path / "run"), *ALONE)
    assert len(killed(run, die_at, torn)) == die_at
    assert run_ranks(counted, 1, run) == [3 * A_STEP - die_at]
    assert outcome(run) == outcome(whole)


def test_two_ranks_ask_for_the_rest_together(start: Path, tmp_path: Path) -> None:
    """One of them is killed, when the answers of both are on disk."""
    undisturbed, run, other = (
        run_config(shutil.copytree(start, tmp_path / name), *ALONE) for name in ("a", "b", "c")
    )
    assert sum(run_ranks(counted, 2, undisturbed)) == 3 * A_STEP
    finished = killed(run, A_STEP // 2 + 3, ranks=2)
    assert A_STEP < len(finished) < 2 * A_STEP
    assert sum(run_ranks(counted, 2, run)) == 3 * A_STEP - len(finished)
    assert outcome(run) == outcome(undisturbed)


def test_without_a_log_the_tables_since_the_checkpoint_serve(start: Path, tmp_path: Path) -> None:
    words = ("rollout.log=false", "rlvr.steps=4", "background_checkpoints=false")
    run = run_config(shutil.copytree(start, tmp_path / "run"), *ALONE, *words)
    folder = Path(run.out) / "rlvr"
    assert len(killed(run, A_STEP + 5)) == A_STEP + 5
    assert [p.name for p in folder.glob("checkpoints/rollouts/*.parquet")] == ["000001.parquet"]
    assert len(killed(run, 2 * A_STEP - 5 + 4)) == A_STEP + 4, "steps 1 and 2 are in a checkpoint"
    assert [p.name for p in folder.glob("checkpoints/rollouts/*.parquet")] == ["000003.parquet"]
    assert run_ranks(counted, 1, run) == [A_STEP - 4]
    assert not (folder / "rollouts").exists()


@pytest.mark.vllm
@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_a_killed_step_of_vllm_asks_no_finished_answer_again(
    placement: str, start: Path, tmp_path: Path
) -> None:
    words = ("rollout.engine=vllm", f"rollout.placement={placement}")
    run = run_config(shutil.copytree(start, tmp_path / "run"), *WORDS, *words)
    in_process: Callable[..., Any] = lambda fn, _, *args: in_vllm(fn, *args)
    finished = killed(run, A_STEP + 5, start=in_process)
    before = pq.read_table(Path(run.out) / "rlvr" / "rollouts" / "000001.parquet")
    assert len(finished) == A_STEP + 5
    assert in_vllm(counted, run) == [3 * A_STEP - len(finished)]
    assert before == pq.read_table(Path(run.out) / "rlvr" / "rollouts" / "000001.parquet")


# --- the journal alone -----------------------------------------------------------------------------
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=9, stop_ids=(7,))


class Told:
    """An engine that answers with its seeds; half of each answer is of version 3, the other half of 4."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(
        self, prompts: list, params: Any, seeds: list[int], arrived: Arrived = unnoticed,
        first: First | None = None,
    ) -> list[Sampled | None]:  # fmt: skip
        done: list[Sampled | None] = []
        for number, seed in enumerate(seeds):
            tokens = np.array([seed, 8, 7], np.int32)
            spans = (Span(3, 0, 2), Span(4, 2, 3))
            one = Sampled(tokens=tokens, logprobs=-tokens.astype(np.float32), finish_reason="stop", versions=spans)  # fmt: skip
            done.append(one)
            arrived(number, one)
        self.asked += seeds
        return done


def asked_again(
    folder: Path, damage: Callable[[Path], None], noted: dict[int, int], weights: dict[int, int], words: list[str],
    params: SamplingParams, step: int, first: First | None,
) -> list[int]:  # fmt: skip
    """Return the seeds that a second process asks for, of 1, 2, 3 and 4, after a first one noted all four."""
    world = initialize(Layout(), LONG)
    for begun in (True, False):
        run = override(tiny(), ["rollout.engine=vllm", *([] if begun else words)])
        journal, engine, arrived = Journal(folder, run, world), Told(), {}
        journal.weights = noted if begun else weights
        sampling = SAMPLING if begun else params
        seeds = [1, 2, 3, 4]
        how = (*journal.engine, *dataclasses.astuple(sampling))
        requests = [digest(how, seed) for seed in seeds]
        with journal.opened(2 if begun else step):
            done = journal.generate(
                engine, [[5, s] for s in seeds], sampling, seeds, requests, None if begun else first, True,
                arrived.__setitem__,
            )  # fmt: skip
        assert {i: c for i, c in enumerate(done) if c is not None} == arrived
        for i, c in arrived.items():
            assert c.tokens.tolist() == [i + 1, 8, 7] and c.logprobs.tolist() == [-i - 1, -8, -7]
            assert c.versions == (Span(3, 0, 2), Span(4, 2, 3)) and c.finish_reason == "stop"
        if begun:
            (file,) = (folder / "checkpoints" / "rollouts").iterdir()
            damage(file)
    return engine.asked


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])


def flipped(path: Path) -> None:
    """Change a token of the third answer."""
    data = path.read_bytes()
    token = np.array([3, 8, 7], np.int32).tobytes()
    assert data.count(token) == 1
    path.write_bytes(data.replace(token, np.array([3, 9, 7], np.int32).tobytes()))


SAME: dict[str, Any] = {
    "damage": lambda path: None, "noted": {3: 30, 4: 40}, "weights": {3: 30, 4: 40}, "words": [], "params": SAMPLING, "step": 2, "first": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ({}, []),
        ({"damage": cut}, [3, 4]),
        ({"damage": flipped}, [3]),
        ({"damage": lambda path: path.write_bytes(b"")}, [1, 2, 3, 4]),
        ({"weights": {3: 30, 4: 41}}, [1, 2, 3, 4]),
        ({"weights": {3: 30}}, [1, 2, 3, 4]),
        ({"noted": {3: 30}, "weights": {3: 30}}, [1, 2, 3, 4]),
        ({"words": ["rollout.dtype=bfloat16"]}, [1, 2, 3, 4]),
        ({"words": ["rollout.engine=local"]}, [1, 2, 3, 4]),
        ({"words": ["rollout.max_batch=3"]}, []),
        ({"params": dataclasses.replace(SAMPLING, temperature=0.9)}, [1, 2, 3, 4]),
        ({"params": dataclasses.replace(SAMPLING, max_new_tokens=8)}, [1, 2, 3, 4]),
        ({"step": 3}, [1, 2, 3, 4]),
        ({"damage": cut, "first": First("abab", {"a": 1, "b": 2})}, [4]),
    ],
    ids=["same", "cut", "flipped", "empty", "other-weights", "weights-not-there-yet", "weights-never-known", "other-dtype", "other-engine",
         "other-batch", "other-temperature", "other-length", "other-step", "group-already-full"],
)  # fmt: skip
def test_an_answer_is_taken_for_the_same_request_and_weights_alone(
    change: dict[str, Any], asked: list[int], tmp_path: Path
) -> None:
    assert run_ranks(asked_again, 1, tmp_path, *(SAME | change).values()) == [asked]


def test_the_columns_of_an_answer_are_in_the_table() -> None:
    assert all(TABLE.field(field.name) == field for field in ANSWER)
