"""A benchmark through a real `vllm serve`, which outlives evaluations that are killed."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from benchmark_cases import evaluation_words, journalled, killed_at, log_of_seeds, rows, write_model
from fault_runs import command
from vllm_process import ForkedServer, find_metadata, in_vllm

from phimini.model.io.json_files import write_rows
from phimini.stages.benchmarks.plan import planned
from phimini.stages.cli import main
from phimini.stages.config.dialect import build, read_words
from phimini.stages.config.options import BenchmarkOptions
from phimini.stages.rollout import launch
from phimini.stages.rollout.separate_vllm import SeparateVllm
from phimini.stages.rollout.vllm_settings import engine_settings

pytestmark = pytest.mark.vllm
VLLM = ["k=2", "max_new_tokens=24", "rollout.engine=vllm", "rollout.placement=separate", "rollout.max_batch=8", "rollout.transport=shm"]  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_model(folder / "model")
    (folder / "data").mkdir()
    questions = [{"prompt": f"What is {n} + {n}?", "answer": 2 * n} for n in range(30)]
    write_rows(folder / "data" / "aime24.jsonl", questions)
    return folder


@pytest.fixture(scope="module")
def address(given: Path) -> Iterator[str]:
    os.environ.setdefault(launch.KEY, "sesame")
    find_metadata()
    own = evaluation_words(given, given / "out", *VLLM, names="aime24")[1:]
    given_words = read_words([f"model={own[0]}", *own[1:]], BenchmarkOptions, "evaluate")
    plan = planned(build(BenchmarkOptions, given_words))
    settings = engine_settings(plan.run, plan.model.config, "shm")
    with patch.object(launch, "start", ForkedServer):
        server = launch.EngineProcess(plan.model.config, settings, os.environ[launch.KEY])
    try:
        server.wait()
        yield server.url
    finally:
        server.process.kill()
        server.close()


def test_thirty_questions_killed_twice(given: Path, address: str, tmp_path: Path) -> None:
    log, seeds, out = tmp_path / "log", tmp_path / "seeds", tmp_path / "out"
    own = evaluation_words(given, out, *VLLM, f"rollout.addresses={address}", names="aime24")
    assert command(own, log, killed_at(20, False, seeds, SeparateVllm)) == -signal.SIGKILL
    of_all = json.loads(seeds.read_text())
    first = journalled(out)
    assert len(first) == 20 and len(of_all) == len(set(of_all)) == 60
    assert command(own, log, killed_at(15, True, seeds, SeparateVllm)) == -signal.SIGKILL
    asked = json.loads(seeds.read_text())
    assert len(asked) == 40 and set(asked) < set(of_all)
    second = journalled(out)
    assert second[:20] == first and len(second) == 35
    assert command(own, log, lambda: log_of_seeds(seeds, SeparateVllm)) == 0, log.read_text()
    assert len(json.loads(seeds.read_text())) == 25
    assert len(rows(out, "aime24")) == 60 and journalled(out)[:35] == second


def test_the_colocated_engine_answers_as_the_local_one(given: Path, tmp_path: Path) -> None:
    greedy = ["temperature=0", "k=1", "max_new_tokens=24"]
    own = lambda out, *more: evaluation_words(given, tmp_path / out, *greedy, *more, names="aime24")
    assert command(own("local"), tmp_path / "log") == 0
    assert in_vllm(main, own("colocated", "rollout.engine=vllm", "rollout.max_batch=8")) == [0]
    local, colocated = (rows(tmp_path / out, "aime24") for out in ("local", "colocated"))
    assert len(local) == 30 and local == colocated
