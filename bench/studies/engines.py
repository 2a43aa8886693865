"""`phimini bench engines [--same-model RUN] [--recipe HOW=RUN ...] [local=RUN ...] [vllm=RUN ...]`: do both engines sample and teach the same?

Three questions, each with an interval; their answers are rows of `bench/results/engines.jsonl`.

    same model    both engines sample one model (RUN's stage 3), the same prompts many times: is there a difference
                  in accuracy, length, log-prob or in how many answers of a group differ? The unit is the prompt.
    recipe        whole runs of `phimini recipe`, stages 3 and 4 sampled as HOW says ("local" for the one that others of
                  its seed are held to), evaluated by their own engine. The difference is paired by problem
    after RL      stage 4 from one stage-3 model and one pool, sampled by each engine with several seeds (seed=11,
                  seed=12, ... with rollout.engine=local or vllm), all evaluated by the local engine. The interval is of
                  problems and of runs: it holds for other sampling seeds, which a single run's does not.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from phimini.model.io.chat import encode_prompt
from phimini.model.io.huggingface import load_config
from phimini.model.io.json_files import read_json, read_rows, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import initialize
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.config.seeds import derive
from phimini.stages.data.row_fields import PROBLEM_FIELDS
from phimini.stages.evaluate import judge
from phimini.stages.recipe import machine
from phimini.stages.report.intervals import paired_gain
from phimini.stages.rollout.colocated_vllm import ColocatedVllm
from phimini.stages.rollout.local import LocalEngine, RolloutEngine
from phimini.stages.rollout.vllm_settings import engine_settings, require_vllm

ROWS = Path(__file__).parents[1] / "results" / "engines.jsonl"
SAMPLES = 16
"""of a prompt, by each engine, where both sample the same model"""
DRAWS = 4000
"""of the bootstrap"""
MEASURES = ("accuracy", "length", "logprob", "distinct")
Row = Mapping[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="phimini bench engines", description=__doc__)
    parser.add_argument("--same-model", type=Path, metavar="RUN", help="sample RUN's stage-3 model")
    parser.add_argument(
        "--recipe", action="append", default=[], metavar="HOW=RUN", help="a run of the whole recipe"
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="ENGINE=RUN",
        help="runs whose stage 4 was sampled by local or vllm",
    )
    args = parser.parse_args(argv)
    rows: list[Row] = list(read_rows(ROWS, {"kind": str})) if ROWS.exists() else []
    if args.same_model is not None:
        require_vllm()
        rows = [row for row in rows if row["kind"] != "same model"]
        rows += run_ranks(same_model, 1, args.same_model)[0]
    new = []
    for word in args.recipe:
        how, _, run = word.partition("=")
        if not how or not run:
            raise ValueError(f"--recipe: expected HOW=RUN, got {word!r}")
        new.append(recipe_run(how, Path(run)))
    for word in args.runs:
        engine, _, run = word.partition("=")
        if engine not in ("local", "vllm") or not run:
            raise ValueError(f"expected local=RUN or vllm=RUN, got {word!r}")
        new.append(collect(engine, Path(run)))
    for row in new:
        rows = [other for other in rows if _key(other) != _key(row)] + [row]
    if args.same_model is not None or new:
        write_rows(ROWS, rows)
    print(recipe_table(rows), table(rows), sep="\n\n")
    return 0


# --- same model ------------------------------------------------------------------------------------
def same_model(directory: Path) -> list[Row]:
    """A row per kind of prompts and params; on one rank."""
    run = override(tiny(), ["rollout.engine=vllm", f"out={directory}"])
    model = directory / "rollout_dpo" / "model"
    config, tokenizer = load_config(model), Tokenizer.load(model)
    world = initialize(Layout(), config)
    engines: dict[str, RolloutEngine] = {
        "local": LocalEngine(config, world, run.rollout.max_batch),
        "vllm": ColocatedVllm(config, engine_settings(run, config, "inproc"), world, 600.0),
    }
    for engine in engines.values():
        engine.load(model)
    rows = []
    for what, problems, params in _questions(run, directory, tokenizer):
        found = {
            name: sampled(engine, run, tokenizer, problems, params)
            for name, engine in engines.items()
        }
        differences = {}
        for measure in MEASURES:
            gain, low, high = paired_gain(found["local"][measure], found["vllm"][measure])
            differences[measure] = [gain, low, high]
        means = {e: {m: float(np.mean(found[e][m])) for m in MEASURES} for e in engines}
        rows.append(
            {"kind": "same model", "what": what, "prompts": len(problems), "samples": SAMPLES}
            | {"means": means, "difference": differences}
            | origin()
        )
    return rows


def _questions(
    run: RunConfig, directory: Path, tokenizer: Tokenizer
) -> list[tuple[str, list[dict], SamplingParams]]:
    heldout = read_rows(directory / "distill" / "heldout.jsonl", PROBLEM_FIELDS)
    train = read_rows(directory / "distill" / "prompts.jsonl", PROBLEM_FIELDS)
    stop = tokenizer.stop_ids
    evaluation = SamplingParams(
        temperature=run.evaluate.temperature, top_p=run.evaluate.top_p, stop_ids=stop,
        max_new_tokens=run.evaluate.max_new_tokens,
    )  # fmt: skip
    training = SamplingParams(
        temperature=run.rlvr.start_temperature,
        stop_ids=stop,
        max_new_tokens=run.rlvr.max_new_tokens,
    )
    return [("evaluation", heldout, evaluation), ("training", train[-600:], training)]


def sampled(
    engine: RolloutEngine,
    run: RunConfig,
    tokenizer: Tokenizer,
    problems: list[dict],
    params: SamplingParams,
) -> dict[str, list[float]]:
    """Each measure's mean over the answers to each prompt."""
    prompts = [encode_prompt(tokenizer, p["question"], run.chat_template) for p in problems]
    done = engine.generate(
        [prompt for prompt in prompts for _ in range(SAMPLES)],
        params,
        [derive(run.seed, "engines", p["id"], k) for p in problems for k in range(SAMPLES)],
    )
    groups = [done[i : i + SAMPLES] for i in range(0, len(done), SAMPLES)]
    pairs = list(zip(groups, problems, strict=True))
    return {
        "accuracy": [float(np.mean([judge(tokenizer, c, p) for c in group])) for group, p in pairs],
        "length": [float(np.mean([len(c.tokens) for c in group])) for group in groups],
        "logprob": [float(np.mean([sum(c.logprobs) for c in group])) for group in groups],
        "distinct": [float(len({tuple(c.tokens) for c in group})) for group in groups],
    }


# --- the whole recipe ------------------------------------------------------------------------------
def recipe_run(how: str, run: Path) -> Row:
    """What of a whole run is kept. ValueError for a run that is not complete."""
    if not (run / "results.json").exists():
        raise ValueError(f"{run}: no results.json; `phimini recipe` writes it when all is complete")
    results = read_json(run / "results.json")
    found = read_json(run / "evaluate" / "rlvr.json")
    steps = [row for row in read_rows(run / "rlvr" / "metrics.jsonl", {}) if "mismatch_max" in row]
    dpo, rl = results["stages"][-2:]
    return {
        "kind": "recipe", "engine": how, "seed": results["seed"], "dpo": [dpo["mean_at_8"], *dpo["ci95"]],
        "rl": [rl["mean_at_8"], *rl["ci95"]], "per_problem_mean": found["per_problem_mean"], "steps": len(steps),
        "mismatch_max": max(row["mismatch_max"] for row in steps), "max_age": max(row["max_age"] for row in steps),
        "machine": results["machine"], "date": results["date"],
    }  # fmt: skip


def recipe_table(rows: Sequence[Row]) -> str:
    """Markdown: the runs of each seed, against its local one."""
    lines = ["| seed | stages 3 and 4 sample with | after DPO | after RL | against local | updates | max dlogp | max age |",
             "|" + "---|" * 8]  # fmt: skip
    runs = [row for row in rows if row["kind"] == "recipe"]
    local = {row["seed"]: row["per_problem_mean"] for row in runs if row["engine"] == "local"}
    for row in sorted(runs, key=lambda row: (row["seed"], row["engine"] != "local")):
        against = ""
        if row["engine"] != "local":
            against = _interval(paired_gain(local[row["seed"]], row["per_problem_mean"]))
        dpo, rl = ("{:.3f} [{:.3f}, {:.3f}]".format(*row[stage]) for stage in ("dpo", "rl"))
        lines.append(
            f"| {row['seed']} | {row['engine']} | {dpo} | {rl} | {against} | {row['steps']} "
            f"| {row['mismatch_max']:.0e} | {row['max_age']} |"
        )
    return "\n".join(lines)


# --- after RL --------------------------------------------------------------------------------------
def collect(engine: str, run: Path) -> Row:
    """What of a run with stage 4 is kept. ValueError for a run that is not complete."""
    if not (run / "evaluate" / "rlvr.json").exists():
        raise ValueError(f"{run}: stage 4 is not evaluated; run `phimini evaluate` first")
    settings = read_json(run / "rlvr" / "summary.json")["settings"]
    found = read_json(run / "evaluate" / "rlvr.json")
    samples = found["num_samples"]
    return {
        "kind": "after RL", "engine": engine, "seed": settings["seed"], "steps": settings["rlvr"]["steps"],
        "samples": samples, "correct": [round(samples * mean) for mean in found["per_problem_mean"]],
        "greedy": found["greedy"]["accuracy"],
    } | origin()  # fmt: skip


def after_rl(rows: Sequence[Row]) -> dict[str, Any]:
    """Each engine's mean per run, and vllm - local with a 95 % interval, bootstrapped over problems and over runs.

    A problem is drawn for all runs at once, each engine's runs for themselves. With few runs such an interval is a
    little too narrow (by a factor of sqrt(1 - 1 / runs) in what the runs contribute).
    """
    shares = {
        engine: np.array(
            [
                [c / row["samples"] for c in row["correct"]]
                for row in rows
                if row["kind"] == "after RL" and row["engine"] == engine
            ]
        )
        for engine in ("local", "vllm")
    }
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        problems = rng.integers(0, shares["local"].shape[1], shares["local"].shape[1])
        local, vllm = (
            s[rng.integers(0, len(s), len(s))].mean(0)[problems].mean() for s in shares.values()
        )
        draws.append(vllm - local)
    low, high = np.percentile(draws, [2.5, 97.5])
    gain = shares["vllm"].mean() - shares["local"].mean()
    means = {engine: s.mean(1).tolist() for engine, s in shares.items()}
    return {"means": means, "difference": [float(gain), float(low), float(high)]}


# --- what the README says ---------------------------------------------------------------------------
def table(rows: Sequence[Row]) -> str:
    """Markdown: vllm - local with 95 % intervals."""
    lines = ["| question | unit | local | vLLM | vLLM - local |", "|---|---|---|---|---|"]
    for row in rows:
        if row["kind"] != "same model":
            continue
        for measure in MEASURES:
            a, b = (row["means"][engine][measure] for engine in ("local", "vllm"))
            lines.append(
                f"| same model, {row['what']}: {measure} | {row['prompts']} prompts, {row['samples']} answers each "
                f"| {a:.3f} | {b:.3f} | {_interval(row['difference'][measure])} |"
            )
    found = after_rl(rows)
    local, vllm = found["means"]["local"], found["means"]["vllm"]
    lines.append(
        f"| mean@16 after RL | {len(local)} and {len(vllm)} runs, from {min(local):.3f} to {max(local):.3f} and from "
        f"{min(vllm):.3f} to {max(vllm):.3f} | {np.mean(local):.3f} | {np.mean(vllm):.3f} | "
        f"{_interval(found['difference'])} |"
    )
    return "\n".join(lines)


def _interval(gain: Sequence[float]) -> str:
    middle, low, high = gain
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def _key(row: Row) -> tuple[Any, ...]:
    return row["kind"], row.get("engine"), row.get("seed")


def origin() -> dict[str, str]:
    return {"machine": machine(), "date": datetime.now(UTC).date().isoformat()}


if __name__ == "__main__":
    sys.exit(main())
