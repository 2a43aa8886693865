"""The files of a checkpoint directory: names, the manifest, checksums, the pointer, retention. No process groups.

    DIR/latest.json                 {"step": 40, "directory": "step-00000040"}, with its sha256: moves last, atomically;
                                    both are null before the first checkpoint is complete
    DIR/step-00000040/
        manifest.json               step, model config, layout, versions, extra, sha256 of every file
        __0_0.distcp, ...           tensors, written by torch.distributed.checkpoint
        .metadata, metadata.json    where each tensor lies, in which format
    DIR/step-00000050.tmp/          a save under way, or one that was cut off; never read

A step that is saved again gets a new name (step-00000040-2), so that the checkpoint that the pointer names is never
touched.
"""

import os
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phimini.model.io import json_files
from phimini.model.io.checked_files import check_file, read_sealed, write_sealed

POINTER = "latest.json"
MANIFEST = "manifest.json"
FORMAT = 1
TEMPORARY = ".tmp"
# Fields of a manifest and their types.
_FIELDS = {
    "step": int, "model_config": dict, "params_dtype": str, "optimizer": dict | None, "extra": dict, "files": dict
}  # fmt: skip
_DIRECTORY = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_TORCH_METADATA = ".metadata"
# The contents of torch's metadata file. It is a pickle, and torch would call any function that it names.
_METADATA_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_METADATA_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch._utils", "_get_layout"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.state_dict_saver", "_StoragePrefix"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def step_directories(directory: Path) -> list[Path]:
    """Return the complete checkpoints, oldest write first."""
    found = [
        d for d in directory.iterdir() if _DIRECTORY.fullmatch(d.name) and (d / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda d: ((d / MANIFEST).stat().st_mtime_ns, d.name))


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = _DIRECTORY.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is not a checkpoint's name"
    return int(match[1])


def new_directory(directory: Path, step: int) -> Path:
    """Return an unused path for a checkpoint of `step`."""
    name = f"step-{step:08d}"
    path, n = directory / name, 1
    while path.exists():
        n += 1
        path = directory / f"{name}-{n}"
    return path


def read_pointer(directory: Path) -> Path | None:
    """Return the latest complete checkpoint, or None before the first.

    Raises ValueError if the pointer is damaged, names a missing checkpoint, or is missing beside checkpoints.
    """
    pointer = directory / POINTER
    if not pointer.exists():
        if directory.is_dir() and step_directories(directory):
            raise ValueError(f"{pointer} is missing, but the folder {_inventory(directory)}")
        return None
    content = read_sealed(pointer)
    step, name = content.get("step"), content.get("directory")
    if step is None and name is None:
        return None
    match = _DIRECTORY.fullmatch(name) if isinstance(name, str) else None
    if match is None or step != int(match[1]):
        raise ValueError(
            f"{pointer}: expected {{'step': .., 'directory': 'step-..'}}, got {content!r}"
        )
    if not (directory / match[0] / MANIFEST).is_file():
        raise ValueError(f"{pointer}: names {name!r}, which {_inventory(directory)}")
    return directory / match[0]


def find_step(directory: Path, step: int) -> Path:
    """Return the newest complete checkpoint of `step`. Raises ValueError if it is missing."""
    found = (
        [d for d in step_directories(directory) if step_of(d) == step] if directory.is_dir() else []
    )
    if not found:
        raise ValueError(
            f"{directory}: has no checkpoint of step {step}; it {_inventory(directory)}"
        )
    return found[-1]


def move_pointer(directory: Path, checkpoint: Path) -> None:
    """Let the pointer name `checkpoint`, atomically: a reader sees the old or the new pointer."""
    write_sealed(directory / POINTER, {"step": step_of(checkpoint), "directory": checkpoint.name})


def begin_pointer(directory: Path) -> None:
    """Write a pointer to no checkpoint before the first save, so that a lost one is told from one not written yet.

    Raises as `read_pointer`.
    """
    if read_pointer(directory) is None:
        write_sealed(directory / POINTER, {"step": None, "directory": None})


def remove_old(directory: Path, latest: Path, keep: int) -> None:
    """Delete all checkpoints but `latest` and the `keep` - 1 written before it."""
    others = [d for d in step_directories(directory) if d != latest]
    for old in others[: max(0, len(others) - (keep - 1))]:
        # Without its manifest a folder is no longer a checkpoint, even if the removal is cut off.
        (old / MANIFEST).unlink()
        shutil.rmtree(old)


def remove_cut_off(directory: Path) -> None:
    """Delete the remains of saves and removals that were cut off."""
    for path in directory.iterdir():
        is_save = path.name.endswith(TEMPORARY) and _DIRECTORY.fullmatch(
            path.name.removesuffix(TEMPORARY)
        )
        is_half_removed = _DIRECTORY.fullmatch(path.name) and not (path / MANIFEST).is_file()
        if path.is_dir() and (is_save or is_half_removed):
            shutil.rmtree(path)
        elif path.name.startswith(f".{POINTER}.") and json_files.TEMPORARY.fullmatch(path.name):
            path.unlink()


def write_manifest(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write a checkpoint's manifest, with a checksum of its own content."""
    write_sealed(checkpoint / MANIFEST, manifest)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises ValueError that names the file if it was changed since it was written."""
    path = checkpoint / MANIFEST
    manifest = read_sealed(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a manifest of format {FORMAT}")
    _check_fields(path, manifest)
    if manifest["step"] != step_of(checkpoint):
        raise ValueError(
            f"{path}: step is {manifest['step']}, but the directory is that of step {step_of(checkpoint)}"
        )
    return manifest


def _check_fields(path: Path, manifest: dict[str, Any]) -> None:
    for field, kind in _FIELDS.items():
        if field not in manifest or not isinstance(manifest[field], kind):
            expected = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{path}: {field} is missing or of another type; expected {expected}")
    optimizer, described = manifest["optimizer"], manifest["files"]
    if optimizer is not None:
        scheduler = optimizer.get("scheduler")
        numbers = (
            optimizer.get("num_updates"),
            isinstance(scheduler, dict) and scheduler.get("num_steps"),
        )
        if not all(type(n) is int for n in numbers):
            raise ValueError(f"{path}: optimizer: expected num_updates and a scheduler's num_steps")
    whole = all(isinstance(d, dict) and {"bytes", "sha256"} <= d.keys() for d in described.values())
    if not whole or _TORCH_METADATA not in described:
        raise ValueError(f"{path}: files: expected bytes and sha256 of each, {_TORCH_METADATA} too")


def check_files(checkpoint: Path, files: dict[str, dict[str, Any]], names: Iterable[str]) -> None:
    """Compare files with their descriptions. Raises ValueError that names the first missing or altered one."""
    for name in names:
        check_file(checkpoint / name, files[name])


def check_metadata_is_plain(checkpoint: Path) -> None:
    """Raise ValueError if torch's metadata pickle names anything but torch's own metadata classes."""
    path = checkpoint / _TORCH_METADATA
    try:
        with path.open("rb") as f:
            _MetadataUnpickler(f).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: not the metadata of a checkpoint: {e}") from e


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and global_name.isidentifier() and _is_dtype(global_name)
        of_module = module_name in _METADATA_MODULES
        allowed = of_module or (module_name, global_name) in _METADATA_NAMES
        found = None
        if (allowed or is_dtype) and "." not in global_name:
            found = super().find_class(module_name, global_name)
        # Refuse names that these modules import: `dataclass` compiles text that the pickle gives it.
        if found is None or of_module and getattr(found, "__module__", None) != module_name:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return found


def _is_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)


def free_bytes(directory: Path) -> int:
    """Return the free bytes on a directory's file system."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def _inventory(directory: Path) -> str:
    if not directory.is_dir():
        return "does not exist"
    steps = [step_of(d) for d in step_directories(directory)]
    return f"holds steps {steps}" if steps else "holds no complete checkpoint"
