"""`phimini bench fp8 [--seeds N,N] [--arms NAME,NAME] [--steps N] [--json PATH]`: what stage 1 of the tiny recipe loses to emulated FP8

Two runs of a stage that differ in rounding alone part after some hundred steps, and single points of their curves differ
by several per cent, so two curves' ends say nothing. Three questions have answers:

    in training   the training loss averaged over the whole stage, each arm against fp32 of the same seed: same data, same
                  order, same first weights. Two floors: `fp32 again` (other micro-batches, so other rounding), and `fp32
                  nudged`, whose first weights are rounded to FP8 once: a change of FP8's size, and no FP8 after it.
    in forward    at every 10th step of the fp32 arm, the same weights and the same batch once more with the linears
                  in emulated FP8, nothing trained on it; and in the FP8 arms the other way round, in fp32.
    20 steps      from the fp32 arm's weights and optimizer at every 200th step, the next 20 steps once more, trained in
                  emulated FP8: too few for the two to part. Once more in fp32 gives the same losses to the last bit.

All are ratios per seed; their mean over the seeds has Student's 95 % interval. With arguments or without, the rows of
`bench/results/fp8_stage1.jsonl` that were not run again stay, and the README's table is printed from all of them.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from phimini.model.config import preset
from phimini.model.io.json_files import read_rows, write_rows
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.fp8 import is_fp8_layer
from phimini.parallel.megatron.fp8_emulated import (
    Fp8ColumnParallelLinear,
    Fp8Recipe,
    Fp8RowParallelLinear,
    emulated,
    round_weight,
)
from phimini.parallel.megatron.layers import ColumnParallelLinear, RowParallelLinear
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.step import forward_only
from phimini.stages import midtrain
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.recipe import DATA

ROWS = Path(__file__).parents[1] / "results" / "fp8_stage1.jsonl"
FIELDS = {
    "seed": int,
    "arm": str,
    "steps": int,
    "tenths": list,
    "same_weights": dict,
    "commit": str,
}
RECIPES: tuple[Fp8Recipe, ...] = get_args(Fp8Recipe)
ARMS: dict[str, list[str]] = {
    "fp32": [],
    "fp32 again": ["midtrain.micro_rows=1"],
    "fp32 nudged": [],
    **{recipe: ["fp8=emulate", f"fp8_recipe={recipe}"] for recipe in RECIPES},
}
EVERY = 10
"""steps between two comparisons on the same weights"""
WINDOW, WINDOWS_APART = 20, 200
"""steps that are trained once more, and from one beginning to the next"""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""the 97.5 % point for so many seeds"""

Row = Mapping[str, Any]


# --- running -------------------------------------------------------------------------------------
def train(run: RunConfig, modes: Sequence[str], nudged: bool, again: bool) -> dict[str, Any]:
    """Stage 1 of `run` in this process; its losses, and at every 10th step those of `modes` on the same weights.

    again: and of the windows those of every recipe, trained from the same state.
    """
    losses: list[float] = []
    same: dict[str, list[float]] = {mode: [] for mode in ("own", *modes)}
    step, start = midtrain.forward_backward, midtrain.start_optimizer
    windows: list[Windows] = []

    def start_optimizer(run: RunConfig, model: Model, *arguments: Any) -> Any:
        optimizer = start(run, model, *arguments)
        windows.append(Windows(model, optimizer))
        return optimizer

    def compare_and_step(model: Model, microbatches: Any, head: Any) -> Any:
        others = {}
        if nudged and not losses:
            nudge(model)
        if again:
            windows[0].before_step(losses, lambda: step(model, microbatches, head).loss)
        if len(losses) % EVERY == 0:
            for mode in modes:
                with computing_in(model, mode):
                    parts = forward_only(model, microbatches, head)
                others[mode] = sum(float(p[0]) for p in parts) / sum(float(p[1]) for p in parts)
        metrics = step(model, microbatches, head)
        losses.append(metrics.loss)
        if others:
            for mode, loss in {"own": metrics.loss, **others}.items():
                same[mode].append(loss)
        return metrics

    midtrain.forward_backward = compare_and_step  # this process is the arm's alone
    midtrain.start_optimizer = start_optimizer
    world = initialize(Layout(), preset(run.model), seed=run.seed)
    midtrain.midtrain(run, world)
    world.close()
    tenth = len(losses) // 10
    return {
        "steps": len(losses),
        "tenths": [statistics.fmean(losses[i * tenth : (i + 1) * tenth]) for i in range(10)],
        "same_weights": {mode: statistics.fmean(values) for mode, values in same.items() if values},
        "same_state": {
            mode: statistics.fmean(values) for mode, values in windows[0].losses.items() if values
        },
        "cpu_seconds": round(time.process_time()),
    }


class Windows:
    """Of every 200 steps 20 that are trained once more in each recipe, and in fp32, which must give the same again."""

    def __init__(self, model: Model, optimizer: Any) -> None:
        self.losses: dict[str, list[float]] = {mode: [] for mode in ("fp32", *RECIPES)}
        self._model, self._optimizer = model, optimizer
        self._steps: list[Callable[[], float]] = []
        self._beginning: list[Tensor] = []

    def before_step(self, losses: Sequence[float], step: Callable[[], float]) -> None:
        """losses: so far; `step`: what is about to be done."""
        if len(self._steps) == WINDOW:
            self._train_again(losses[-WINDOW:])
            self._steps = []
        if len(losses) % WINDOWS_APART == WINDOWS_APART // 2:
            self._beginning = [tensor.clone() for tensor in self._state()]
            self._steps = [step]
        elif self._steps:
            self._steps.append(step)

    def _train_again(self, trained: Sequence[float]) -> None:
        now = [tensor.clone() for tensor in self._state()]
        for mode, losses in self.losses.items():
            self._restore(self._beginning, -WINDOW)
            with computing_in(self._model, mode):
                for step in self._steps:
                    self._optimizer.zero_grad()
                    losses.append(step())
                    self._optimizer.step()
        if self.losses["fp32"][-WINDOW:] != list(trained):
            raise RuntimeError("the steps in fp32 did not give the same losses again")
        self._restore(now, 0)
        self._optimizer.zero_grad()

    def _state(self) -> list[Tensor]:
        """The weights, and Adam's moments and counts."""
        of_parts = [part.optimizer.state for part in self._optimizer.megatron.chained_optimizers]
        moments = [
            t for of_part in of_parts for of_one in of_part.values() for t in of_one.values()
        ]
        return [p.data for chunk in self._model.chunks for p in chunk.parameters()] + moments

    def _restore(self, tensors: Sequence[Tensor], steps: int) -> None:
        """steps: from where the scheduler stands, which is where it will stand again after the window."""
        for tensor, copy in zip(self._state(), tensors, strict=True):
            tensor.copy_(copy)
        self._optimizer.scheduler.step(steps)
        self._model.num_updates += steps


@contextlib.contextmanager
def computing_in(model: Model, mode: str) -> Iterator[None]:
    """The linears of the layers that FP8 takes compute in `mode`: a recipe's name, or fp32."""
    kinds: tuple[Any, Any] = ColumnParallelLinear, RowParallelLinear
    if mode in RECIPES:
        recipe: Any = mode
        kinds = emulated(Fp8ColumnParallelLinear, recipe), emulated(Fp8RowParallelLinear, recipe)
    linears = fp8_linears(model)
    before = [type(linear) for linear, _ in linears]
    for linear, is_row in linears:
        linear.__class__ = kinds[is_row]
    yield
    for (linear, _), kind in zip(linears, before, strict=True):
        linear.__class__ = kind


@torch.no_grad()
def nudge(model: Model) -> None:
    """Rounds the weights that FP8 takes to its values, once: a change of FP8's size in a run that is fp32's."""
    for linear, _ in fp8_linears(model):
        linear.weight.copy_(round_weight(linear.weight, "blockwise", None))


def fp8_linears(model: Model) -> list[tuple[Any, bool]]:
    """(linear, whether it is row-parallel) of the layers that FP8 takes."""
    layers: Any = model.gpts[0].decoder.layers
    return [
        (linear, is_row)
        for i, layer in enumerate(layers)
        if is_fp8_layer(i, model.config.num_layers)
        for linear, is_row in (
            (layer.self_attention.linear_qkv, False),
            (layer.self_attention.linear_proj, True),
            (layer.mlp.linear_fc1, False),
            (layer.mlp.linear_fc2, True),
        )
    ]


def make_data(run: RunConfig) -> None:
    for stage in DATA.values():
        stage(run)


def run_seed(seed: int, arms: Sequence[str], steps: int) -> Iterator[dict[str, Any]]:
    """One row per arm. Each arm is a process of one rank; the data are made once."""
    with tempfile.TemporaryDirectory() as name:
        words = [f"seed={seed}", "processes=1", f"midtrain.steps={steps}", f"midtrain.validate_every={steps}",
                 f"midtrain.checkpoint_every={steps + 1}"]  # fmt: skip
        data = override(tiny(), [*words, f"out={name}/data"])
        run_ranks(make_data, 1, data)
        for arm in arms:
            out = Path(name) / arm.replace(" ", "_")
            out.mkdir()
            for stage in DATA:
                (out / stage).symlink_to(Path(name) / "data" / stage)
            modes = RECIPES if arm == "fp32" else ("fp32",) if arm in RECIPES else ()
            of_arm = override(data, [f"out={out}", *ARMS[arm]])
            found = run_ranks(train, 1, of_arm, modes, arm == "fp32 nudged", arm == "fp32")[0]
            (validation,) = [
                row["validation_loss"]
                for row in read_rows(out / "midtrain" / "metrics.jsonl", {"step": int})
                if "validation_loss" in row
            ]
            yield {
                "seed": seed,
                "arm": arm,
                "validation_loss": validation,
                "commit": commit(),
            } | found


def commit() -> str:
    done = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.strip()


# --- reading -------------------------------------------------------------------------------------
def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval. ValueError for fewer than two values."""
    if len(values) not in STUDENT:
        raise ValueError(f"expected {min(STUDENT)} to {max(STUDENT)} seeds, got {len(values)}")
    mean = statistics.fmean(values)
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def differences(rows: Sequence[Row]) -> dict[tuple[int, str], dict[str, list[float]]]:
    """(Steps, arm) -> question -> of each seed, by how much (1 is all of it) the loss is above fp32's."""
    by = {key(row): row for row in rows}
    mean = lambda row: statistics.fmean(row["tenths"])
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for steps, arm in sorted({(row["steps"], row["arm"]) for row in rows}, key=place):
        of_arm = [row for row in rows if (row["steps"], row["arm"]) == (steps, arm)]
        pairs = [(row, by[steps, row["seed"], "fp32"]) for row in of_arm if (steps, row["seed"], "fp32") in by]  # fmt: skip
        if arm == "fp32" or not pairs:
            continue
        found[steps, arm] = of_pairs = {
            "training": [mean(row) / mean(base) - 1 for row, base in pairs],
            "last tenth": [row["tenths"][-1] / base["tenths"][-1] - 1 for row, base in pairs],
            "validation": [row["validation_loss"] / base["validation_loss"] - 1 for row, base in pairs],
        }  # fmt: skip
        if arm in RECIPES:
            if all(b.get("same_state") for _, b in pairs):
                of_pairs["20 steps"] = [b["same_state"][arm] / b["same_state"]["fp32"] - 1 for _, b in pairs]  # fmt: skip
            of_pairs["forward"] = [b["same_weights"][arm] / b["same_weights"]["own"] - 1 for _, b in pairs]  # fmt: skip
            of_pairs["forward, trained in FP8"] = [
                row["same_weights"]["own"] / row["same_weights"]["fp32"] - 1 for row, _ in pairs
            ]
    return found


def key(row: Row) -> tuple[int, int, str]:
    return row["steps"], row["seed"], row["arm"]


def place(of: tuple[int, str]) -> tuple[int, int]:
    steps, arm = of
    return steps, list(ARMS).index(arm)


COLUMNS = ("training", "last tenth", "validation", "20 steps", "forward", "forward, trained in FP8")


def table(rows: Sequence[Row]) -> str:
    """Markdown: per arm the differences from fp32, in per cent, with their intervals."""
    found = differences(rows)
    lines = [
        "| steps | arm | seeds | mean over the stage | last tenth | validation at the end | 20 steps from the same state | same weights | same weights, trained in FP8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (steps, arm), questions in found.items():
        cells = [cell(questions[name]) if name in questions else "" for name in COLUMNS]
        lines.append(f"| {steps:,} | {arm} | {len(questions['training'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    mean, low, high = (100 * value for value in interval(values))
    return f"{mean:+.2f} % [{low:+.2f}, {high:+.2f}]"


def main(argv: list[str]) -> int:
    """Returns the exit status: 0."""
    parser = argparse.ArgumentParser(
        prog="phimini bench fp8", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--seeds", default="", help="run these again, e.g. 0,1,2,3; none: only print"
    )
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=tiny().midtrain.steps, help="of stage 1")
    parser.add_argument("--json", type=Path, default=ROWS, help="the rows")
    args = parser.parse_args(argv)
    arms = args.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"unknown arm {unknown[0]!r}; expected {', '.join(ARMS)}")
    rows = list(read_rows(args.json, FIELDS)) if args.json.exists() else []
    for seed in (int(word) for word in args.seeds.split(",") if word):
        for row in run_seed(seed, arms, args.steps):
            rows = [r for r in rows if key(r) != key(row)] + [row]
            rows.sort(key=lambda r: (r["steps"], r["seed"], list(ARMS).index(r["arm"])))
            write_rows(args.json, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
