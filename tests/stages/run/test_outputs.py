"""Descriptions of a stage's files: the next reader refuses damaged ones, and changed sources make a stage stale."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import write_rows
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.curate import curate
from phimini.stages.distill import distill
from phimini.stages.run.stage_folder import Stage


def rows(word: str) -> list[dict]:
    return [
        {
            "question": f"Is {n} odd?",
            "answer": str(n % 2),
            "response": f"{word}: \\boxed{{{n % 2}}}",
        }
        for n in range(1000, 1030)
    ]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """Make a run from a file of rollouts, up to its data."""
    write_rows(tmp_path / "data.jsonl", rows("Look"))
    words = [f"distill.source={tmp_path / 'data.jsonl'}", f"out={tmp_path / 'run'}"]
    config = override(tiny(), [*words, "distill.num_heldout=10", "distill.num_validation=5"])
    distill(config)
    return config


def flip(path: Path, at: int = 20) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped": ("rollouts.jsonl", flip, r"distill/rollouts\.jsonl: its content has changed"),
    "half": ("heldout.jsonl", lambda p: os.truncate(p, p.stat().st_size // 2), r"heldout\.jsonl: has \d+ bytes in [45] rows, expected [\d,]+ bytes in 10 rows"),
    "lost": ("prompts.jsonl", Path.unlink, r"distill/prompts\.jsonl: this file is missing"),
    "summary flipped": ("summary.json", flip, r"distill/summary\.json: .*the file is damaged"),
    "summary empty": ("summary.json", lambda p: p.write_bytes(b""), r"distill/summary\.json: .*the file is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_next_stage_refuses_damaged_inputs(damage: str, run: RunConfig) -> None:
    name, action, said = DAMAGES[damage]
    action(Path(run.out) / "distill" / name)
    with pytest.raises(ValueError, match=said) as error:
        curate(run)
    assert "--redo" not in str(error.value)
    assert not (Path(run.out) / "curate").exists()


def test_a_complete_stage_misses_its_files(run: RunConfig) -> None:
    distill(run)
    out = Path(run.out) / "distill"
    os.truncate(out / "heldout.jsonl", 100)
    with pytest.raises(ValueError, match=r"heldout\.jsonl: has 100 bytes in 0 rows, expected"):
        distill(run)
    (out / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"distill/summary\.json: this file is missing beside dropped\.jsonl"):  # fmt: skip
        distill(run)
    distill(run, redo=True)
    assert read_sealed(out / "summary.json")["files"]["heldout.jsonl"]["rows"] == 10


def test_the_record_of_another_stage_is_refused(run: RunConfig) -> None:
    out = Path(run.out)
    curate(run)
    (out / "distill" / "summary.json").replace(out / "curate" / "summary.json")
    distill(run, redo=True)
    with pytest.raises(ValueError, match="curate: holds the record of stage distill"):
        curate(run)


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_begun_is_no_other_setting(bit: int, run: RunConfig) -> None:
    """It used to be read as another seed, and the advice was --redo, which deletes the stage's checkpoints."""
    stage = Stage.open(run, "curate")
    stage.prepare(redo=False)
    path = stage.path / "begun.json"
    content = bytearray(path.read_bytes())
    content[content.index(b'"seed": ') + 8] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"curate/begun\.json: .*the file is damaged") as error:
        Stage.open(run, "curate").prepare(redo=False)
    assert "--redo" not in str(error.value)


def test_a_file_that_an_interrupted_stage_recorded_is_refused_when_damaged(run: RunConfig) -> None:
    stage = Stage.open(run, "curate")
    stage.prepare(redo=False)
    write_rows(stage.path / "pairs.jsonl", [{"n": 1}])
    stage.record("pairs.jsonl")
    again = Stage.open(run, "curate")
    again.prepare(redo=False)
    assert again.made == stage.made
    flip(stage.path / "pairs.jsonl", 2)
    with pytest.raises(ValueError, match=r"curate/pairs\.jsonl: its content has changed"):
        Stage.open(run, "curate").prepare(redo=False)
    with pytest.raises(ValueError, match=r"curate/pairs\.jsonl: its content has changed"):
        stage.finish({})


def test_changed_data_at_the_same_path_is_named(run: RunConfig) -> None:
    source = Path(run.distill.source)
    os.utime(source, ns=(1, 1))
    distill(run)  # another time, the same content
    write_rows(source, rows("Read"))  # the same size
    with pytest.raises(ValueError, match=r"data\.jsonl has changed since .*distill was made from it; use --redo"):  # fmt: skip
        distill(run)
    assert '"Read:' in (distill(run, redo=True) / "rollouts.jsonl").read_text()
    distill(run)
