"""The function of each verb: takes the verb's name and its settings, returns the exit status."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phimini.model.io.huggingface import config_of
from phimini.parallel.cluster.job_scripts import LaunchSettings, render_slurm, render_torchrun
from phimini.parallel.cluster.preflight import examine_ranks
from phimini.parallel.plan.command import print_plans
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.lost_ranks import closing_or_naming_lost_ranks
from phimini.parallel.ranks.world import World, initialize
from phimini.stages.base import base_config
from phimini.stages.benchmarks.evaluate import evaluate_benchmarks
from phimini.stages.benchmarks.plan import Plan, planned
from phimini.stages.config import options
from phimini.stages.config.dialect import build, read_words
from phimini.stages.config.recipes import RECIPES
from phimini.stages.config.schema import RunConfig
from phimini.stages.controls import controls
from phimini.stages.dry_run import dry_run, is_ready, number_of_steps
from phimini.stages.evaluate import evaluate
from phimini.stages.recipe import DATA, TRAINING, recipe
from phimini.stages.rl.mismatch_diagnosis import doctor
from phimini.stages.rollout.launch import serve
from phimini.stages.run.limits import check_open_files
from phimini.stages.run.lock import RunLock, held_by_main
from phimini.stages.run.status import read_status, recorded, watch
from phimini.stages.run.trackers import missing_packages
from phimini.stages.run.training import layout_of
from phimini.stages.run.workloads import workloads


def run_recipe(verb: str, settings: options.RecipeOptions) -> int:
    """Run the whole recipe, after the checks of a dry run; with `--dry-run` only those."""
    run = settings.run
    if settings.dry_run:
        return dry_run(run, settings.gpu or "h100", settings.gpus or 8)
    if settings.gpus is not None:
        raise ValueError(f"recipe: gpus={settings.gpus} goes with --dry-run")
    ranks = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else run.processes
    if not is_ready(run, settings.gpu, ranks):
        return 1
    return train(verb, settings)


def prepare(verb: str, settings: options.StageOptions) -> int:
    """Run a stage of the data, on one rank."""
    with RunLock(settings.run.out, make=verb == "distill"), recorded(settings.run.out, verb):
        DATA[verb](settings.run, redo=settings.redo)
    return 0


def train(verb: str, settings: options.StageOptions) -> int:
    """Run a training stage, or the control arms, on every rank."""
    start(settings.run, verb, None, settings.redo)
    return 0


def run_evaluate(verb: str, settings: options.EvaluateOptions) -> int:
    if settings.stage is None:
        raise ValueError(f"{verb}: expected stage=NAME, one of base, {', '.join(TRAINING)}")
    start(settings.run, verb, settings.stage, settings.redo)
    return 0


def run_benchmarks(verb: str, settings: options.BenchmarkOptions) -> int:
    plan = planned(settings)
    in_ranks(settings.processes, benchmark_rank, plan)
    return 0


def run_report(verb: str, words: list[str]) -> int:
    """Write all pages of a run as it is, also while a command uses the run."""
    from phimini.stages.report.viewer.page import write_run_pages  # late: only reports need plotly

    out = folder_of(verb, words)
    status = read_status(out)
    write_run_pages(out, "" if status.state == "complete" else status.line)
    print(f"{out / 'report.html'}: {status.line}")
    return 0


def run_watch(verb: str, words: list[str]) -> int:
    watch(folder_of(verb, words))
    return 0


def folder_of(verb: str, words: list[str]) -> Path:
    """Return the run's folder that the words name: by itself, or by a recipe and its settings."""
    read = read_words(words, options.RunOptions, verb, names=1)
    name = Path("" if read.help or read.given or not read.names else read.names[0])
    is_recipe = str(name) in RECIPES or name.suffix.startswith(".py")
    if name == Path() or is_recipe or not (name.parent.name or name.is_dir()):
        return Path(options.of_recipe(options.RunOptions, read).run.out)
    return name


def trace_row(verb: str, words: list[str]) -> int:
    """Print what became of a row: `data trace ID RECIPE`."""
    from phimini.stages.report.datasets import trace  # late: only pages need plotly

    read = read_words(words, options.RunOptions, verb, names=2)
    if len(read.names) != 2 and not read.help:
        raise ValueError(f"{verb}: expected ID RECIPE, e.g. `phimini {verb} u1/0 tiny`")
    names = read.names[1:]
    settings = options.of_recipe(options.RunOptions, dataclasses.replace(read, names=names, command=f"{verb} ID"))  # fmt: skip
    print(*trace(settings.run, read.names[0]), sep="\n")
    return 0


def write_pages(verb: str, settings: options.RunOptions) -> int:
    from phimini.stages.report.datasets import pages  # late: only pages need plotly

    with RunLock(settings.run.out):
        print(*pages(settings.run), sep="\n")
    return 0


def run_serve(verb: str, settings: options.ServeOptions) -> int:
    serve(settings.run, base_config(settings.run), settings.address)
    return 0


def run_plan(verb: str, settings: options.PlanOptions) -> int:
    """Print the plan of one stage or of all; a base model that is not there is planned by `model`."""
    run = settings.run
    there = run.base == "random" or Path(run.base).exists()
    config = base_config(run) if there else config_of(run.model)
    stages = workloads(run)
    if settings.stage is not None:
        chosen = {settings.stage: stages[settings.stage]}
        return print_plans(config, chosen, settings.gpu, settings.gpus, settings.json)
    steps = {stage: number_of_steps(run, stage)[0] for stage in stages}
    return print_plans(config, stages, settings.gpu, settings.gpus, settings.json, steps)


def launch(verb: str, words: list[str]) -> int:
    """Print the script of a job whose command stands behind `--`."""
    read = read_words(words, LaunchSettings, verb)
    default = LaunchSettings(command=tuple(read.tail)) if read.tail else None
    settings = build(LaunchSettings, read, default)
    render = {"launch torchrun": render_torchrun, "launch slurm": render_slurm}[verb]
    sys.stdout.write(render(settings, _doctor_words(settings.command)))
    return 0


def _doctor_words(command: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words by which `doctor --dist` examines the layout and the folder of a training command.

    Raises ValueError for a word that the command would refuse.
    """
    verb, *words = command
    if verb not in ("recipe", *TRAINING):
        return ()
    run = options.of_recipe(options.RecipeOptions, read_words(words, options.RecipeOptions, verb, names=1)).run  # fmt: skip
    axes = {"tensor": run.tensor_parallel, "pipeline": run.pipeline_parallel, "context": run.context_parallel}  # fmt: skip
    return (*(f"{axis}={size}" for axis, size in axes.items() if size > 1), f"out={run.out}")


def examine_job(verb: str, settings: options.DistOptions) -> int:
    axes = {axis: size for axis, size in asdict(settings).items() if size is not None}
    out = axes.pop("out", None)
    return examine_ranks(Layout(**axes) if axes else None, out and Path(out))


def explain_mismatch(verb: str, settings: options.RunOptions) -> int:
    start(settings.run, verb, None, redo=False)
    return 0


def start(run: RunConfig, verb: str, stage: str | None, redo: bool) -> None:
    """Run the verb in this rank of torchrun's, or in `run.processes` ranks of our own."""
    for problem in missing_packages(run):
        raise ImportError(problem)
    in_ranks(run.processes, run_rank, run, verb, stage, redo)


def in_ranks(processes: int, function: Callable[..., None], *args: Any) -> None:
    """Call the function in this rank of torchrun's, or in so many ranks of our own."""
    if "RANK" in os.environ or processes == 1:
        function(*args)
    else:
        check_open_files()
        run_ranks(function, processes, *args)


def benchmark_rank(plan: Plan) -> None:
    """Run one rank's part of the benchmarks."""
    run = plan.run
    world = initialize(layout_of(run), plan.model.config, timeout_s=run.collective_deadline_s)
    with closing_or_naming_lost_ranks(world), held_by_main(world, run.out, make=True):
        evaluate_benchmarks(plan, world)


def run_rank(run: RunConfig, verb: str, stage: str | None, redo: bool) -> None:
    """Run one rank's part of a verb."""
    world: World = initialize(
        layout_of(run), base_config(run), timeout_s=run.collective_deadline_s, seed=run.seed
    )
    reads_only = verb == "doctor --mismatch"
    lock = contextlib.nullcontext() if reads_only else held_by_main(world, run.out, make=verb == "recipe")  # fmt: skip
    note = contextlib.nullcontext() if reads_only else recorded(run.out, verb, is_main=world.is_main)  # fmt: skip
    with closing_or_naming_lost_ranks(world), lock, note:
        if verb == "recipe":
            recipe(run, world, redo=redo)
        elif verb == "controls":
            controls(run, world, redo=redo)
        elif verb == "doctor --mismatch":
            doctor(run, world)
        elif stage is not None:
            evaluate(run, world, stage, redo=redo)
        else:
            TRAINING[verb](run, world, redo=redo)
