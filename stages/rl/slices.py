"""Long sampling in slices: the rows of each are on disk before the next begins."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from phimini.model.io.json_files import Row, write_rows
from phimini.parallel.ranks.world import World, on_main
from phimini.stages.data.packing import chunks
from phimini.stages.rollout.build import expected_on_main
from phimini.stages.run.progress import StepProgress, work
from phimini.stages.run.stage_folder import Stage

T = TypeVar("T")
SLICE = 2048
"""answers in a slice, about: 0.4 GB of tokens and log-probs if all are on one rank and 25k tokens long"""


def in_slices(
    stage: Stage,
    folder: str,
    items: Sequence[T],
    answers: int,
    world: World,
    make: Callable[[list[T], StepProgress], list[Row]],
) -> list[Path]:
    """Write the rows of all items into files of the stage's `folder`, one per slice, and return their paths. Collective.

    answers: to each item. make: returns the rows of a slice, and tells the progress of each answer; collective, rank 0's rows
    are written. A resumed run goes on after the last slice that is whole.
    """
    paths = []
    total = expected_on_main(stage.run, world, answers * len(items))
    label = f"{stage.name} {folder.partition('/')[0]}"
    progress = work(label, total, stage.run.out, world.is_main)
    for number, part in enumerate(chunks(items, max(1, SLICE // answers)), 1):
        name = f"{folder}/{number:06d}.jsonl"
        paths.append(stage.path / name)
        if on_main(world, lambda name=name: name in stage.made):
            progress.total -= expected_on_main(stage.run, world, answers * len(part))
            continue
        rows = make(part, progress)

        def write(name: str = name, rows: list[Row] = rows) -> None:
            write_rows(stage.path / name, rows)
            stage.record(name)

        on_main(world, write)
    progress.close()
    return paths
