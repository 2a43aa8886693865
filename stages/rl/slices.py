"""Long sampling in slices: the rows of each are on disk before the next begins."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from phimini.model.io.json_files import Row, write_rows
from phimini.parallel.ranks.world import World, on_main
from phimini.stages.data.packing import chunks
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
    make: Callable[[list[T]], list[Row]],
) -> list[Path]:
    """Write the rows of all items into files of the stage's `folder`, one per slice, and return their paths. Collective.

    answers: to each item. make: returns the rows of a slice; collective, rank 0's are written. A resumed run goes on
    after the last slice that is whole.
    """
    paths = []
    for number, part in enumerate(chunks(items, max(1, SLICE // answers)), 1):
        name = f"{folder}/{number:06d}.jsonl"
        paths.append(stage.path / name)
        if on_main(world, lambda name=name: name in stage.made):
            continue
        rows = make(part)

        def write(name: str = name, rows: list[Row] = rows) -> None:
            write_rows(stage.path / name, rows)
            stage.record(name)

        on_main(world, write)
    return paths
