"""Experiment trackers that receive the rows of metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

`log.to=tensorboard,wandb,trackio` chooses them; the packages are the extra `log`. TensorBoard writes to
OUT/tensorboard/STAGE. Weights & Biases and Trackio make a run for each stage, in a group named after the run, and read
their own environment variables (WANDB_MODE, WANDB_API_KEY, TRACKIO_DIR, TRACKIO_SPACE_ID, ...).

A tracker that cannot start is an error before the first step. A tracker that fails later is closed with one line on
standard error, and training continues: a lost connection must not cost a run, and metrics.jsonl has every row.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from phimini.stages.config.schema import RunConfig, to_dict


def missing_packages(run: RunConfig) -> list[str]:
    """Return a sentence for each tracker of `log.to` whose package is not installed."""
    installed = {d.name.lower() for d in importlib.metadata.distributions() if d.name}
    return [
        f"log.to={name}: the package {name} is not installed; run `pip install 'phimini[log]'`"
        for name in run.log.to
        if name not in installed
    ]


class Tracker(Protocol):
    """One stage's record in one tracking system."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a stage. Raises ValueError, naming the tracker, when one cannot start."""

    def __init__(self, run: RunConfig, stage: str) -> None:
        self._stage = stage
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(run.log.to):
            try:
                self._open[name] = _START[name](run, stage)
            # Each package has its own errors, and their base classes are not documented.
            except Exception as error:
                self.close()
                raise ValueError(f"log.to={name}: cannot start: {error}") from error

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step, counted from 0, to every tracker that is still open."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: tracker.log(step, numbers))

    def close(self) -> None:
        """Flush and close every tracker."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.close)
        self._open = {}

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            del self._open[name]
            print(
                f"WARNING: {name} failed and gets no more rows of {self._stage}; training continues, and "
                f"metrics.jsonl has every row: {type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )


class _TensorBoard:
    def __init__(self, run: RunConfig, stage: str) -> None:
        # Imported here, so that a run without a tracker needs no package for it.
        from torch.utils.tensorboard import SummaryWriter

        self._folder = Path(run.out) / "tensorboard" / stage
        self._folder.mkdir(parents=True, exist_ok=True)
        self._make_writer = SummaryWriter
        self._writer: SummaryWriter | None = None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None:
            # A resumed stage repeats steps: TensorBoard drops the earlier rows from this step on.
            self._writer = self._make_writer(str(self._folder), purge_step=step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Run:
    """A run of Weights & Biases or of Trackio, which has the same interface."""

    def __init__(self, package: ModuleType, run: RunConfig, stage: str, **options: Any) -> None:
        self._package = package
        self._run = package.init(
            project=run.log.project,
            name=f"{run.name}/{stage}",
            group=run.name,
            config=to_dict(run),
            **options,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        # Not the run's own `finish`: Trackio would finish it once more at exit.
        self._package.finish()


def _wandb(run: RunConfig, stage: str) -> Tracker:
    import wandb

    # The captured console would hold every redrawing of the progress bar.
    return _Run(wandb, run, stage, dir=run.out, settings=wandb.Settings(console="off"))


def _trackio(run: RunConfig, stage: str) -> Tracker:
    import trackio

    return _Run(trackio, run, stage, embed=False)


_START: dict[str, Callable[[RunConfig, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}
