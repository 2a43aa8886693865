"""What a checkpoint says of itself, and whether a run may go on from it."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from phimini.parallel.checkpoint import files
from phimini.parallel.checkpoint.sharded_state import optimizer_step
from phimini.parallel.megatron.builder import Model
from phimini.parallel.training.optimizer import Optimizer


def new_manifest(
    step: int, model: Model, optimizer: Optimizer | None, extra: dict[str, Any]
) -> dict[str, Any]:
    """Everything but the list of files. JSON, if `extra` is."""
    saved_optimizer = None
    if optimizer is not None:
        saved_optimizer = {
            "num_updates": optimizer_step(optimizer.megatron),
            "scheduler": optimizer.scheduler.state_dict(),
        }
    return {
        "format": files.FORMAT,
        "step": step,
        "model_config": _model_config(model),
        "layout": dataclasses.asdict(model.world.layout),
        "params_dtype": str(model.transformer_config.params_dtype),
        "optimizer": saved_optimizer,
        "extra": extra,
        "versions": {name: _version(name) for name in ("phimini", "torch", "megatron-core")},
    }


def check_fits(
    checkpoint: Path, manifest: dict[str, Any], model: Model, optimizer: Optimizer | None
) -> None:
    """Raises ValueError naming manifest and field if `model` and `optimizer` are not what was saved.

    The layout may differ; so may the dtype where only weights are read.
    """
    path = checkpoint / files.MANIFEST
    _compare(path, "model_config", manifest["model_config"], _model_config(model))
    if optimizer is None:
        return
    if manifest["optimizer"] is None:
        raise ValueError(f"{path}: optimizer: the checkpoint holds weights only")
    dtype = {"params_dtype": str(model.transformer_config.params_dtype)}
    _compare(path, "", {"params_dtype": manifest["params_dtype"]}, dtype)
    saved, ours = manifest["optimizer"]["scheduler"], optimizer.scheduler.state_dict()
    _compare(path, "optimizer.scheduler", saved, ours, ignore={"num_steps"})


def _compare(
    path: Path,
    section: str,
    saved: dict[str, Any],
    ours: dict[str, Any],
    ignore: frozenset[str] | set[str] = frozenset(),
) -> None:
    for field in sorted((saved.keys() | ours.keys()) - ignore):
        if saved.get(field) != ours.get(field):
            name = f"{section}.{field}" if section else field
            raise ValueError(
                f"{path}: {name} is {saved.get(field)} in the checkpoint, {ours.get(field)} in this run"
            )


def _model_config(model: Model) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(model.config)))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "not installed"
