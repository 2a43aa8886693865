"""Checkpoints that cannot be written or must not load: the previous one survives, and errors name file or field."""

import dataclasses
import gc
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import ADAM, CONFIG, build, fake_steps
from forked_ranks import RankFailure, run_ranks
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from phimini.model.io.checked_files import describe_file, write_sealed
from phimini.parallel.checkpoint import files as checkpoint_files
from phimini.parallel.checkpoint import save_load
from phimini.parallel.checkpoint.save_load import (
    begin_checkpoint,
    latest_step,
    load_checkpoint,
    save_checkpoint,
)
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.ranks.layout import Layout


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


# --- interrupted and failing saves ---------------------------------------------------------------
def previous_loads(directory: Path, step: int) -> None:
    """Assert that the checkpoint of `step` is the latest, and that another layout can load it."""

    def run() -> None:
        model, optimizer = build(Layout(pipeline=2), seed=5)
        assert load_checkpoint(directory, model, optimizer)[0] == step

    assert latest_step(directory) == step
    run_ranks(run, 2)


@pytest.mark.parametrize(
    "when", ["first write", "second write", "publish", "rename", "pointer", "pointer's rename"]
)
def test_kill_in_the_middle_of_a_save(when: str, tmp_path: Path) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        model, optimizer = build(Layout(tensor=2))
        save_checkpoint(tmp_path, 1, model, optimizer)
        write, calls = FileSystemWriterAsync.write_preloaded_data, []

        def write_or_die(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == (1 if when == "first write" else 2):
                die()
            return write(*args, **kwargs)

        if "write" in when and dist.get_rank() == 1:
            FileSystemWriterAsync.write_preloaded_data = write_or_die
        elif when == "publish":
            checkpoint_files.write_manifest = die
        elif when == "rename":
            Path.rename = die  # pyright: ignore[reportAttributeAccessIssue]
        elif when == "pointer":
            checkpoint_files.move_pointer = die
        elif when == "pointer's rename":
            replace = os.replace
            os.replace = lambda a, b: die() if str(b).endswith("latest.json") else replace(a, b)
        save_checkpoint(tmp_path, 2, model, optimizer)

    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(run, 2)
    previous_loads(tmp_path, 1)

    def save_again() -> None:
        model, optimizer = build(Layout(tensor=2))
        save_checkpoint(tmp_path, 2, model, optimizer)

    run_ranks(save_again, 2)
    assert not list(tmp_path.glob("*.tmp")), "what the killed save left is gone"
    previous_loads(tmp_path, 2)


@pytest.mark.parametrize("background", [False, True], ids=["save", "begin-finish"])
def test_a_disk_that_fills_up_while_writing(background: bool, tmp_path: Path) -> None:
    """A limit on the size of a file makes the same write fail as a full disk, for any user."""

    def run() -> str:
        model, optimizer = build(Layout(tensor=2))
        save_checkpoint(tmp_path, 1, model, optimizer)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError) as e:
            if background:
                begin_checkpoint(tmp_path, 2, model, optimizer).finish()
            else:
                save_checkpoint(tmp_path, 2, model, optimizer)
        return str(e.value)

    messages = run_ranks(run, 2)
    assert messages[0] == messages[1] and "step-00000002.tmp/__1_0.distcp: cannot" in messages[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step-00000001"]
    previous_loads(tmp_path, 1)


@pytest.mark.parametrize(
    ("taken", "message"),
    [(2_200_000, "step-00000002.tmp: cannot be written"), (1_200_000, "too full for a checkpoint")],
    ids=["no room at all", "no room for tensors"],
)
def test_a_disk_that_is_too_small(taken: int, message: str, tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "none", tmp_path], capture_output=True
    )
    if mounted.returncode:
        # right: the test after this one fails a write in the same way without that right
        pytest.skip("needs the right to mount a small file system")

    def run() -> str:
        model, optimizer = build(Layout(tensor=2))
        save_checkpoint(tmp_path, 1, model, optimizer)
        if dist.get_rank() == 0:
            (tmp_path / "other").write_bytes(bytes(taken))
        dist.barrier()
        with pytest.raises(OSError) as e:
            save_checkpoint(tmp_path, 2, model, optimizer)
        return str(e.value)

    try:
        messages = run_ranks(run, 2)
        assert messages[0] == messages[1] and message in messages[0], messages
        previous_loads(tmp_path, 1)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_no_permission_to_write(tmp_path: Path) -> None:
    def run() -> str:
        model, optimizer = build(Layout(tensor=2))
        save_checkpoint(tmp_path / "run", 1, model, optimizer)
        dist.barrier()
        (tmp_path / "run").chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(OSError) as e:
            save_checkpoint(tmp_path / "run", 2, model, optimizer)
        return str(e.value)

    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    messages = run_ranks(run, 2)
    (tmp_path / "run").chmod(0o755)
    assert messages[0] == messages[1]
    assert "Permission denied" in messages[0] and "step-00000002.tmp: cannot" in messages[0]
    previous_loads(tmp_path / "run", 1)


def test_a_killed_background_writer_is_an_error_on_every_rank(tmp_path: Path) -> None:
    def run() -> str:
        model, optimizer = build(Layout(tensor=2))
        save_checkpoint(tmp_path, 1, model, optimizer)
        if dist.get_rank() == 1:
            FileSystemWriterAsync.write_preloaded_data = lambda *_, **__: os.kill(
                os.getpid(), signal.SIGKILL
            )
        pending = begin_checkpoint(tmp_path, 2, model, optimizer)
        with pytest.raises(OSError) as e:
            pending.finish()
        return str(e.value)

    messages = run_ranks(run, 2)
    assert messages[0] == messages[1] and "exit code -9" in messages[0]
    previous_loads(tmp_path, 1)


def test_a_writer_ends_with_its_trainer(tmp_path: Path) -> None:
    """The writer does not collect the trainer's garbage either, which on a GPU would call CUDA."""
    started, went_on, collects = (tmp_path / name for name in ("started", "went_on", "collects"))

    def slow_write(*_: Any, **__: Any) -> None:
        collects.write_text(str(gc.isenabled()))
        started.touch()
        time.sleep(2)
        went_on.touch()
        os._exit(0)

    def run() -> None:
        model, optimizer = build(Layout())
        FileSystemWriterAsync.write_preloaded_data = slow_write
        begin_checkpoint(tmp_path / "run", 1, model, optimizer)
        end = time.monotonic() + 30
        while not started.exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(run, 1)  # returns when the writer has ended too: it holds the rank's pipe
    assert not went_on.exists() and collects.read_text() == "False"


# --- what must not load --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save steps 1 and 2 of a run on TP2, and step 3 with weights only in another directory."""
    directory = tmp_path_factory.mktemp("saved")

    def run() -> None:
        model, optimizer = build(Layout(tensor=2))
        fake_steps(model, optimizer, range(1))
        for step in (1, 2):
            save_checkpoint(directory / "run", step, model, optimizer)
        save_checkpoint(directory / "weights", 3, model, None)

    run_ranks(run, 2)
    return directory


def load_error(directory: Path, step: int | None = None, **options: Any) -> str:
    """Return the errors of both ranks of a PP2 job that loads a checkpoint."""

    def run() -> str:
        model, optimizer = build(Layout(pipeline=2), **options)
        before = {name: t.clone() for name, t in to_hf(model)}
        with pytest.raises(ValueError) as e:
            load_checkpoint(directory, model, optimizer, step)
        assert all(torch.equal(before[name], t) for name, t in to_hf(model)), "nothing was changed"
        return str(e.value)

    messages = run_ranks(run, 2)
    assert messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (dict(num_layers=8), "num_layers is 4 in the checkpoint, 8 in this run"),
        (dict(mlp_dim=128), "mlp_dim is 96 in the checkpoint, 128 in this run"),
        (dict(tie_embeddings=False), "tie_embeddings is True"),
        (dict(rope_factors="short"), "rope_factors is long in the checkpoint, short"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_another_model(saved: Path, change: dict[str, Any], field: str) -> None:
    message = load_error(saved / "run", config=dataclasses.replace(CONFIG, **change))
    assert "step-00000002/manifest.json: model_config." + field in message


def test_another_schedule_dtype_or_no_optimizer(saved: Path) -> None:
    other = load_error(saved / "run", adam=dataclasses.replace(ADAM, lr=2e-2))
    assert "optimizer.scheduler.max_lr is 0.01 in the checkpoint, 0.02 in this run" in other
    other = load_error(saved / "run", dtype=torch.bfloat16)
    assert "params_dtype is torch.float32 in the checkpoint, torch.bfloat16 in this run" in other
    assert "optimizer: the checkpoint holds weights only" in load_error(saved / "weights")
    assert "has no checkpoint of step 9; it holds steps [1, 2]" in load_error(saved / "run", 9)
    assert "latest.json is missing" in load_error(saved)


def test_damaged_files_are_named_and_the_previous_checkpoint_loads(
    saved: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    latest = directory / "step-00000002"
    damages = {
        "__1_0.distcp: its content has changed": lambda: flip_a_bit(latest / "__1_0.distcp"),
        "__0_1.distcp: this file is missing": (latest / "__0_1.distcp").unlink,
        "__0_0.distcp: has 100 bytes": lambda: os.truncate(latest / "__0_0.distcp", 100),
        ".metadata: its content has changed": lambda: flip_a_bit(latest / ".metadata", 0.9),
        "manifest.json: ": lambda: flip_a_bit(latest / "manifest.json"),
        "latest.json: names 'step-00000002'": (latest / "manifest.json").unlink,
        "latest.json: malformed JSON": lambda: (directory / "latest.json").write_text("{"),
        "latest.json: its content does not match": lambda: flip_a_bit(directory / "latest.json"),
        "latest.json is missing, but the folder holds steps [1, 2]": (
            directory / "latest.json"
        ).unlink,
    }

    def run() -> list[str]:
        model, optimizer = build(Layout(pipeline=2))
        before = fake_steps(model, optimizer, range(2))
        messages = []
        for damage in damages.values():
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(directory, ignore_errors=True)
                shutil.copytree(saved / "run", directory)
                damage()
            dist.barrier()
            with pytest.raises(ValueError) as e:
                load_checkpoint(directory, model, optimizer)
            messages.append(str(e.value))
        assert all(torch.equal(before[name], t) for name, t in to_hf(model)), "nothing was changed"
        assert load_checkpoint(directory, model, optimizer, step=1)[0] == 1
        return messages

    of_ranks = run_ranks(run, 2)
    assert of_ranks[0] == of_ranks[1]
    for expected, message in zip(damages, of_ranks[0], strict=True):
        assert expected in message, expected


def test_a_manifest_that_was_signed_again_without_a_field(saved: Path, tmp_path: Path) -> None:
    latest = shutil.copytree(saved / "run" / "step-00000002", tmp_path / "step-00000002")
    whole = checkpoint_files.read_manifest(latest)
    for field in ("step", "model_config", "params_dtype", "optimizer", "extra", "files"):
        checkpoint_files.write_manifest(latest, {k: v for k, v in whole.items() if k != field})
        with pytest.raises(ValueError, match=f"manifest.json: {field} is missing"):
            checkpoint_files.read_manifest(latest)
    optimizer = whole["optimizer"]
    broken = {
        "step is 3": {"step": 3},
        "optimizer: expected num_updates": {"optimizer": {"scheduler": optimizer["scheduler"]}},
        "and a scheduler's num_steps": {"optimizer": optimizer | {"scheduler": {}}},
        "files: expected bytes": {"files": whole["files"] | {"__0_0.distcp": {}}},
        "files: expected .*.metadata too": {"files": {}},
    }
    for message, change in broken.items():
        checkpoint_files.write_manifest(latest, whole | change)
        with pytest.raises(ValueError, match=f"manifest.json: .*{message}"):
            checkpoint_files.read_manifest(latest)


def test_a_pointer_whose_step_is_another_than_its_directorys(saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved / "run", tmp_path / "run")
    for step in (1, "2", None):
        pointer = {"step": step, "directory": "step-00000002"}
        write_sealed(directory / "latest.json", pointer)
        with pytest.raises(ValueError, match="latest.json: expected"):
            latest_step(directory)


@pytest.mark.parametrize("module", ["metadata", "planner"])
def test_what_torchs_metadata_modules_import_is_not_theirs(module: str, tmp_path: Path) -> None:
    """`dataclass` would make a class of the pickle's annotations, which are code to it."""
    path = f"torch.distributed.checkpoint.{module}"
    (tmp_path / ".metadata").write_bytes(f"c{path}\nMetadata\n.".encode())
    if module == "metadata":
        checkpoint_files.check_metadata_is_plain(tmp_path)
    for name in ("dataclass", "reduce" if module == "planner" else "field"):
        (tmp_path / ".metadata").write_bytes(f"c{path}\n{name}\n.".encode())
        with pytest.raises(ValueError, match=f"it names {path}.{name}"):
            checkpoint_files.check_metadata_is_plain(tmp_path)


@pytest.mark.parametrize("background", [False, True], ids=["save", "begin-finish"])
def test_a_file_that_cannot_be_read_back_is_an_error_on_every_rank(
    background: bool, tmp_path: Path
) -> None:
    def run() -> str:
        model, optimizer = build(Layout(tensor=2))
        if dist.get_rank() == 1:

            def fail(path: Path) -> None:
                raise OSError(f"no reading of {path.name}")

            save_load.describe_file = fail
        begin = begin_checkpoint if background else save_checkpoint
        with pytest.raises(OSError) as e:
            pending = begin(tmp_path, 1, model, optimizer)
            if pending is not None:
                pending.finish()
        return str(e.value)

    messages = run_ranks(run, 2)
    assert messages[0] == messages[1] and "no reading of __1_0.distcp" in messages[0]


def test_nothing_but_torch_metadata_is_unpickled(saved: Path, tmp_path: Path) -> None:
    """A checkpoint by an attacker, with right checksums, cannot run its code."""
    directory = tmp_path / "run"
    shutil.copytree(saved / "run", directory)
    latest = directory / "step-00000002"

    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "attacked"),)

    (latest / ".metadata").write_bytes(pickle.dumps(Attack()))
    manifest = checkpoint_files.read_manifest(latest)
    manifest["files"][".metadata"] = describe_file(latest / ".metadata")
    checkpoint_files.write_manifest(latest, manifest)
    assert ".metadata: not the metadata of a checkpoint: it names" in load_error(directory)
    assert not (tmp_path / "attacked").exists()
    pickle.loads((latest / ".metadata").read_bytes())
    assert (tmp_path / "attacked").exists(), "the control: it would have"
