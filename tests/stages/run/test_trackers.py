"""Experiment trackers with the real packages, offline: the rows that they got, and failures."""

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phimini.stages.cli import main
from phimini.stages.config.recipes import recipe_config
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.run import trackers
from phimini.stages.run.metrics import MetricsLog
from phimini.stages.run.trackers import Trackers, missing_packages

LOSSES = [2.5, 1.25, 0.625]


def run_config(out: Path, to: str) -> RunConfig:
    return override(recipe_config("tiny"), [f"out={out}", f"log.to={to}", "log.project=trial"])


TRAIN = """
import sys
from pathlib import Path
from phimini.stages.config.recipes import recipe_config
from phimini.stages.config.schema import override
from phimini.stages.run.metrics import MetricsLog
out, to, first, *losses = sys.argv[1:]
run = override(recipe_config("tiny"), [f"out={out}", f"log.to={to}", "log.project=trial"])
with MetricsLog(Path(out) / "sft" / "metrics.jsonl", 3, "sft", True, run) as log:
    for step, loss in enumerate(losses, start=int(first)):
        log.write(step, tokens=10, loss=float(loss))
"""


def train(out: Path, to: str, first: int = 0, losses: list[float] = LOSSES) -> str:
    """Log three steps in another process, because W&B starts threads and a service, and Trackio has global state."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAIN, str(out), to, str(first), *map(str, losses)],
        env=os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(out / "trackio")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stderr


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text().splitlines()]


def tensorboard_scalars(out: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard" / "sft"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_gets_every_row_and_a_resumed_stage_replaces_the_repeated_ones(
    tmp_path: Path,
) -> None:
    train(tmp_path, "tensorboard")
    assert tensorboard_scalars(tmp_path, "loss") == dict(enumerate(LOSSES))
    assert tensorboard_scalars(tmp_path, "tokens") == {0: 10, 1: 10, 2: 10}
    train(tmp_path, "tensorboard", first=1, losses=[7.0])
    assert tensorboard_scalars(tmp_path, "loss") == {0: 2.5, 1: 7.0}


def wandb_records(file: Path) -> Iterator[bytes]:
    """Read an offline run: LevelDB's log format (blocks of 32 KiB, records with a header of 7 bytes) after 7 bytes."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        _crc, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_gets_every_row(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    train(tmp_path, "wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = [Record.FromString(data) for data in wandb_records(file)]
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name, run.run_group) == ("trial", "tiny/sft", "tiny")
    rows = [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["loss"], row["tokens"]) for row in rows] == [
        (i, loss, 10) for i, loss in enumerate(LOSSES)
    ]


def test_trackio_gets_every_row(tmp_path: Path) -> None:
    train(tmp_path, "trackio")
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([S.get_runs('trial'), [(r['step'], r['loss'], r['tokens']) for r in S.get_logs('trial', 'tiny/sft')]]))"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert json.loads(printed) == [["tiny/sft"], [[i, x, 10] for i, x in enumerate(LOSSES)]]


def test_all_three_together_and_the_metrics_file_is_the_same_as_without(tmp_path: Path) -> None:
    train(tmp_path / "with", "tensorboard,wandb,trackio")
    assert tensorboard_scalars(tmp_path / "with", "loss") == dict(enumerate(LOSSES))
    with MetricsLog(tmp_path / "without" / "sft" / "metrics.jsonl", 3, "sft", True) as log:
        for step, loss in enumerate(LOSSES):
            log.write(step, tokens=10, loss=loss)
    timed = ("seconds", "tokens_per_second")
    same = [
        [{k: v for k, v in row.items() if k not in timed} for row in metrics(tmp_path / kind)]
        for kind in ("with", "without")
    ]
    assert same[0] == same[1] and len(same[0]) == 3


def test_no_tracker_is_open_on_other_ranks_or_by_default(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "a" / "metrics.jsonl", 3, "sft", False, run_config(tmp_path, "tensorboard")) as log:  # fmt: skip
        log.write(0, tokens=1, loss=1.0)
    with MetricsLog(tmp_path / "b" / "metrics.jsonl", 3, "sft", True, recipe_config("tiny")) as log:
        log.write(0, tokens=1, loss=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("verb", ["sft", "recipe"])
def test_a_missing_package_is_named_before_anything_runs(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers.importlib.metadata, "distributions", lambda: iter(()))
    status = main([verb, "tiny", f"out={tmp_path / 'run'}", "log.to=trackio"])
    said = capfd.readouterr().err.splitlines()
    sentence = (
        "log.to=trackio: the package trackio is not installed; run `pip install 'phimini[log]'`"
    )
    assert status == (2 if verb == "sft" else 1)
    assert said == [f"{'phimini' if verb == 'sft' else 'NOT READY'}: {sentence}"]
    assert not (tmp_path / "run").exists()


def test_installed_packages_are_found() -> None:
    assert missing_packages(run_config(Path("x"), "tensorboard,wandb,trackio")) == []


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ValueError, match="log.to: expected one of tensorboard, wandb, trackio, got 'mlflow'"):  # fmt: skip
        run_config(Path("x"), "wandb,mlflow")


def test_a_tracker_that_cannot_start_ends_the_stage_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log = MetricsLog(tmp_path / "metrics.jsonl", 3, "sft", True, run_config(tmp_path, "tensorboard"))  # fmt: skip
    with pytest.raises(ValueError, match="log.to=tensorboard: cannot start: .*tensorboard"), log:
        raise AssertionError("training began")


class Failing:
    """A tracker whose connection is lost at step 1."""

    def __init__(self, run: RunConfig, stage: str) -> None:
        self.steps: list[int] = []
        ALL.append(self)

    def log(self, step: int, numbers: object) -> None:
        if step == 1:
            raise RuntimeError("connection lost")
        self.steps.append(step)

    def close(self) -> None:
        raise RuntimeError("closed")


ALL: list[Failing] = []


def test_a_tracker_that_fails_is_named_loudly_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers._START, "wandb", Failing)
    with MetricsLog(tmp_path / "sft" / "metrics.jsonl", 3, "sft", True, run_config(tmp_path, "wandb,tensorboard")) as log:  # fmt: skip
        for step, loss in enumerate(LOSSES):
            log.write(step, tokens=10, loss=loss)
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: wandb failed and gets no more rows of sft; training continues, and metrics.jsonl has every row: "
        "RuntimeError: connection lost"
    ]
    assert ALL[-1].steps == [0]
    assert [row["loss"] for row in metrics(tmp_path)] == LOSSES
    assert tensorboard_scalars(tmp_path, "loss") == dict(enumerate(LOSSES))


def test_ctrl_c_in_a_tracker_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ones = Trackers(run_config(tmp_path, "tensorboard"), "sft")

    def interrupted(step: int, numbers: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(open_ones._open["tensorboard"], "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_ones.log(0, {"loss": 1.0})


def test_a_number_that_is_not_finite_reaches_tensorboard(tmp_path: Path) -> None:
    train(tmp_path, "tensorboard", losses=[1.0, math.nan])
    assert math.isnan(tensorboard_scalars(tmp_path, "loss")[1])
    assert metrics(tmp_path)[1]["loss"] is None
