"""`phimini watch RUN`: the state of a run, drawn again every second on a terminal until its command ends."""

import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from phimini.stages.run.status import StageStatus, Status, read_status

REFRESH_S = 1.0
_SHOWN = ("loss", "validation_loss", "reward", "accuracy", "response_length", "entropy")
"""metrics of a stage's newest step, in this order"""


def watch(out: Path) -> None:
    """Print the state of the run in `out`; on a terminal again and again, until no command uses it. Raises as `read_status`."""
    console = Console(highlight=False)
    status = read_status(out)
    if not console.is_interactive:
        # A file has no width: no line is cut.
        Console(highlight=False, width=200).print(page(out, status))
        return
    with Live(page(out, status), console=console, auto_refresh=False) as live:
        while status.state == "running":
            time.sleep(REFRESH_S)
            status = read_status(out)
            live.update(page(out, status), refresh=True)


def page(out: Path, status: Status) -> RenderableType:
    """Return the state, a row for each stage, and the alarms."""
    table = Table.grid(padding=(0, 2))
    for stage in status.stages:
        table.add_row(stage.name, *_cells(stage, status))
    alarms = [
        f"alarm: {stage.name}: {name} in {len(steps)} steps, last in step {steps[-1]}"
        for stage in status.stages
        for name, steps in stage.alarms.items()
    ]
    return Group(Text(f"{out}: {status.line}"), table, *map(Text, alarms))


def _cells(stage: StageStatus, status: Status) -> tuple[str, str]:
    """Return the state of a stage, and the newest of its numbers."""
    label = status.progress.get("label")
    numbers = [f"{name} {stage.last[name]:.4g}" for name in _SHOWN if isinstance(stage.last.get(name), int | float)]  # fmt: skip
    if stage.complete:
        seconds = stage.summary.get("seconds")
        steps = stage.summary.get("steps")
        state = f"complete, {steps:,} steps, {seconds:.0f} s" if steps and seconds else "complete"
    elif label == stage.name:
        state = f"step {status.progress['done']:,} of {status.progress['total']:,}"
    elif stage.last:
        state = f"step {stage.last['step'] + 1:,}"
    else:
        state = "begun" if status.state == "running" else "not complete"
    return state, "  ".join(numbers)
