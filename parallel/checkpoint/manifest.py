"""The manifest of a checkpoint: model, layout and versions, and the check that a run can continue from it."""

import copy
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
    """Return the manifest of a save, without its list of files. It is JSON if `extra` is."""
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
        # Written later: the caller goes on changing its own.
        "extra": copy.deepcopy(extra),
        "versions": {name: _version(name) for name in ("phimini", "torch", "megatron-core")},
    }


def check_fits(
    checkpoint: Path, manifest: dict[str, Any], model: Model, optimizer: Optimizer | None
) -> None:
    """Raise ValueError that names manifest and field if `model` or `optimizer` differs from the saved one.

    The layout may differ, and so may the dtype if only weights are read.
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
    """Return the model's config as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(model.config)))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "not installed"
