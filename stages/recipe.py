"""The recipe: data, four stages, an evaluation and a model card after each, results.json and report.html."""

import datetime
import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.model.io.json_files import write_json
from phimini.parallel.ranks.machine import cpu_name
from phimini.parallel.ranks.world import World, on_main
from phimini.stages.base import base
from phimini.stages.config.schema import RunConfig, to_dict
from phimini.stages.curate import curate
from phimini.stages.distill import distill
from phimini.stages.evaluate import evaluate
from phimini.stages.midtrain import midtrain
from phimini.stages.report.intervals import mcnemar, paired_gain
from phimini.stages.rlvr import rlvr
from phimini.stages.rollout_dpo import rollout_dpo
from phimini.stages.sft import sft
from phimini.stages.tokenize import tokenize

# Data stages run on one rank; training stages on all.
DATA: dict[str, Callable] = {
    "distill": distill,
    "curate": curate,
    "base": base,
    "tokenize": tokenize,
}
TRAINING: dict[str, Callable] = {
    "midtrain": midtrain,
    "sft": sft,
    "rollout_dpo": rollout_dpo,
    "rlvr": rlvr,
}
VERSIONS = ("torch", "megatron-core", "triton", "numpy", "tokenizers", "safetensors")


def recipe(run: RunConfig, world: World, *, redo: bool = False) -> None:
    """Run what is not complete yet. With `redo`, everything again. Collective.

    results.json and the pages are written after each stage: one that ends the recipe leaves those of the stages before.
    """
    started = time.perf_counter()
    out = Path(run.out)

    def prepare() -> None:
        write_json(out / "config.json", to_dict(run))
        for stage in DATA.values():
            stage(run, redo=redo)

    on_main(world, prepare)
    evaluations: list[dict] = []
    for name in ("base", *TRAINING):
        if name in TRAINING:
            TRAINING[name](run, world, redo=redo)
        evaluations.append(evaluate(run, world, name))
        peak_rss = sum(
            world.all_gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        )
        if world.is_main and len(evaluations) > 1:
            print(ladder_line(*evaluations[-2:]), flush=True)
        seconds = time.perf_counter() - started
        on_main(world, partial(write_results, run, evaluations, peak_rss, seconds))
        on_main(world, partial(write_model_card, out / name))
    if world.is_main:
        print(f"{out / 'results.json'} and {out / 'report.html'} are of all stages", flush=True)


def ladder_line(before: dict, after: dict) -> str:
    """Return a line about an evaluation, with the gain over the one `before`."""
    gain, low, high = paired_gain(before["per_problem_mean"], after["per_problem_mean"])
    return (
        f"{after['stage']}: mean@8 {after['mean_at_8']:.3f} ({gain:+.3f} [{low:+.3f}, {high:+.3f}]), "
        f"greedy {after['greedy']['accuracy']:.3f}, pass@8 {after['pass_at_8']:.3f}"
    )


def write_results(run: RunConfig, evaluations: list[dict], peak_rss: int, seconds: float) -> None:
    """Write results.json and the run's pages from the stages' files in the run's folder. One rank calls it.

    Results of these models and of later ones stay as they are: those are complete, and their turn comes.
    evaluations: of the start model and each stage, in order. peak_rss: bytes over all ranks. seconds: wall clock.
    """
    out = Path(run.out)
    rows = []
    for index, evaluation in enumerate(evaluations):
        summary = read_sealed(out / evaluation["stage"] / "summary.json")
        row = {
            "stage": evaluation["stage"],
            "mean_at_8": evaluation["mean_at_8"],
            "ci95": evaluation["ci95"],
            "gain": None,
            "gain_ci95": None,
            "greedy": evaluation["greedy"]["accuracy"],
            "greedy_ci95": evaluation["greedy"]["ci95"],
            "greedy_mcnemar_p": None,
            "pass_at_8": evaluation["pass_at_8"],
            "steps": summary.get("steps", 0),
            "tokens": summary.get("tokens", 0),
            "seconds": summary.get("seconds", 0.0),
            "cpu_seconds": summary.get("cpu_seconds", 0.0),
            "evaluation_seconds": evaluation["seconds"],
        }
        if index:
            before = evaluations[index - 1]
            row["gain"], *row["gain_ci95"] = paired_gain(
                before["per_problem_mean"], evaluation["per_problem_mean"]
            )
            row["greedy_mcnemar_p"] = mcnemar(
                before["per_problem_greedy"], evaluation["per_problem_greedy"]
            )
        rows.append(row)
    seconds = max(seconds, sum(row["seconds"] + row["evaluation_seconds"] for row in rows))
    ids = [evaluation["model_id"] for evaluation in evaluations]
    if (out / "results.json").exists():
        earlier = read_sealed(out / "results.json")
        if earlier["model_ids"][: len(ids)] == ids != earlier["model_ids"]:
            return
        if earlier["model_ids"] == ids:
            peak_rss = max(peak_rss, earlier["peak_rss_bytes"])
            seconds = max(seconds, earlier["wall_seconds"])
    results = {
        "model_ids": ids,
        "stages": rows,
        "seed": run.seed,
        "num_problems": evaluations[0]["num_problems"],
        "num_samples": evaluations[0]["num_samples"],
        "peak_rss_bytes": peak_rss,
        "versions": {"python": platform.python_version()}
        | {n: importlib.metadata.version(n) for n in VERSIONS},
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "wall_seconds": seconds,
        "config": to_dict(run),
    }
    write_sealed(out / "results.json", results)
    from phimini.stages.report.viewer.page import write_run_pages  # late: only reports need plotly

    write_run_pages(out)


def write_model_card(stage: Path) -> None:
    from phimini.stages.publish.card import write_card  # late, too, and the Hub's client

    write_card(stage)


def machine() -> str:
    """Return the processor's model and the number of cores."""
    return f"{cpu_name()}, {os.cpu_count()} cores"
