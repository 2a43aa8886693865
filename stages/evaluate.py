"""Evaluation of a stage's model: held-out problems, greedy and sampled, with intervals.

The paper's setting (RECIPE: temperature 0.6, top-p 0.95): mean@k is the mean over problems of the
share of k samples that verify; pass@k is the unbiased estimate of Chen et al. (arXiv 2107.03374).
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.model.io.huggingface import load_config
from phimini.model.io.json_files import read_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.world import World
from phimini.stages.config.schema import RunConfig, to_dict
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import PROBLEM_FIELDS, encode_problems
from phimini.stages.report.intervals import mean_interval, pass_at_k, wilson_interval
from phimini.stages.rl.rollouts import Facts, sample_and_score
from phimini.stages.rollout.build import build_engine, expected_on_main
from phimini.stages.rollout.engine import Sampled, Sampler, on_all_ranks, release_memory
from phimini.stages.run.audits import Audited, audit_of, is_audited
from phimini.stages.run.outputs import SUMMARY, check_inputs
from phimini.stages.run.progress import work
from phimini.stages.verify.scorer import Scorer

SHOWN_PER_CELL = 1


def evaluate(run: RunConfig, world: World, stage: str, *, redo: bool = False) -> dict:
    """Evaluate the model of `stage`, write `evaluate/STAGE.json` and return its content on every rank. Collective.

    An existing file of this model and these settings is returned as it is, unless `redo`.
    Raises ValueError if the stage is not complete, a file is damaged, or the held-out set has bad rows.
    """
    path = Path(run.out) / "evaluate" / f"{stage}.json"
    directory = Path(run.out) / stage / "model"
    if not (summary := Path(run.out) / stage / SUMMARY).exists():
        raise ValueError(f"evaluate: {summary.parent} is not complete; run `phimini {stage}` first")
    made, settings = read_sealed(summary)["id"], to_dict(run.evaluate)
    if path.exists() and not redo:
        old = read_sealed(path)
        if old["model_id"] == made and old.get("settings", settings) == settings:
            return old
    check_inputs(run, world, "distill", stage)
    problems = read_rows(Path(run.out) / "distill" / "heldout.jsonl", PROBLEM_FIELDS)
    tokenizer = Tokenizer.load(directory)
    engine = build_engine(run, load_config(directory), world)
    engine.load(directory)
    result = evaluate_problems(run, world, engine, tokenizer, problems, f"evaluate {stage}")
    release_memory(engine)
    result = {"stage": stage, "model_id": made, "settings": settings} | result
    if world.is_main:
        write_sealed(path, result)
    return result


def evaluate_problems(
    run: RunConfig, world: World, engine: Sampler, tokenizer: Tokenizer, problems: list[dict],
    label: str = "evaluate",
) -> dict:  # fmt: skip
    """Sample answers, judge each once, and return the result on every rank. Collective.

    label: for the progress. Raises ValueError for fewer than 8 `evaluate.samples`.
    """
    config, started = run.evaluate, time.perf_counter()
    judge = Scorer("evaluate.judge", config.judge, run.rollout.judges, tokenizer.decode)
    prompts = list(encode_problems(tokenizer, problems, tokenizer.chat_template).values())
    greedy_params = SamplingParams(
        temperature=0.0, max_new_tokens=config.max_new_tokens, stop_ids=tokenizer.stop_ids
    )
    k = config.samples
    if k < 8:
        raise ValueError(f"evaluate.samples: mean@8 and pass@8 need at least 8, got {k}")
    params = replace(greedy_params, temperature=config.temperature, top_p=config.top_p)
    seeds = [derive(config.seed, p["id"], j) for p in problems for j in range(k)]
    repeated = [prompt for prompt in prompts for _ in range(k)]
    asked = [problem | {"id": f"{problem['id']}/{j}"} for problem in problems for j in range(k)]
    audited = [is_audited(run.seed, run.audit, "evaluate", row["id"]) for row in asked]
    total = sum(expected_on_main(run, world, n) for n in (len(prompts), len(repeated)))
    with work(label, total, run.out, world.is_main) as progress:
        answers, greedy = sample_and_score(
            lambda arrived: engine.generate(prompts, greedy_params, [0] * len(prompts), arrived),
            problems, judge, world, progress=progress,
        )  # fmt: skip
        held, sampled = sample_and_score(
            lambda arrived: engine.generate(repeated, params, seeds, arrived),
            asked, judge, world, progress=progress, audited=audited,
        )  # fmt: skip
    audit = audit_of(audited_rows(tokenizer, asked, held, sampled, config.judge is None, world))
    greedy, sampled = (
        [answer for answer in all_of if answer is not None] for all_of in (greedy, sampled)
    )
    greedy_ok = np.array([answer.score > 0 for answer in greedy])
    sampled_ok = np.array([answer.score > 0 for answer in sampled]).reshape(len(problems), k)
    return summarize(problems, greedy_ok, sampled_ok) | {
        "truncated": float(np.mean([answer.finish_reason == "length" for answer in sampled])),
        "response_length": float(np.mean([answer.length for answer in sampled])),
        "samples": shown_samples(tokenizer, problems, answers, greedy_ok, world),
        "audit": audit,
        "tokens": sum(answer.length for answer in (*greedy, *sampled)),
        "seconds": time.perf_counter() - started,
    }


def audited_rows(
    tokenizer: Tokenizer,
    asked: list[dict],
    here: Sequence[Sampled | None],
    facts: Sequence[Facts | None],
    is_verdict: bool,
    world: World,
) -> list[tuple[dict, Audited]]:
    """Return the rows that were audited, with their responses where both verdicts disagree. Collective.

    here: the answers that this rank has. is_verdict: False for scores of the user's function.
    """
    pairs = [
        (i, Audited(of_one.score > 0 if is_verdict else None, of_one.second))
        for i, of_one in enumerate(facts)
        if of_one is not None and of_one.second is not None
    ]
    listed = [i for i, both in pairs if both.disagree]
    texts = on_all_ranks(
        world, [None if (c := here[i]) is None else tokenizer.decode(c.tokens) for i in listed]
    )
    responses = dict(zip(listed, texts, strict=True))
    return [(asked[i] | {"response": responses.get(i, "")}, both) for i, both in pairs]


def shown_samples(
    tokenizer: Tokenizer,
    problems: list[dict],
    here: Sequence[Sampled | None],
    greedy_ok: np.ndarray,
    world: World,
) -> list[dict]:
    """Return the greedy answers to the first problems of each family and level, for the report. Collective.

    here: the answers that this rank has. greedy_ok: (P,) bool, a verdict per problem.
    """
    cells: dict[tuple, list[int]] = defaultdict(list)
    for i, problem in enumerate(problems):
        cells[problem.get("family", ""), problem.get("level", 0)].append(i)
    shown = [i for cell in cells.values() for i in cell[:SHOWN_PER_CELL]]
    held = [here[i] for i in shown]
    texts = on_all_ranks(world, [None if c is None else tokenizer.decode(c.tokens) for c in held])
    return [
        {
            "question": problems[i]["question"],
            "answer": problems[i]["answer"],
            "response": text,
            "correct": bool(greedy_ok[i]),
            "family": problems[i].get("family", ""),
            "level": problems[i].get("level", 0),
        }
        for i, text in zip(shown, texts, strict=True)
    ]


def summarize(problems: list[dict], greedy_ok: np.ndarray, sampled_ok: np.ndarray) -> dict:
    """Return accuracies with their 95 % intervals: over all problems, by family and by level.

    greedy_ok: (P,) bool. sampled_ok: (P, k) bool, the verdicts of k samples per problem.
    """
    k = sampled_ok.shape[1]
    per_problem = sampled_ok.mean(1)
    per_problem_mean = [float(x) for x in per_problem]
    groups: dict[str, dict[str, list[int]]] = {
        "families": defaultdict(list),
        "levels": defaultdict(list),
    }
    for i, problem in enumerate(problems):
        groups["families"][str(problem.get("family", ""))].append(i)
        groups["levels"][str(problem.get("level", 0))].append(i)
    mean, low, high = mean_interval(per_problem_mean, k)
    return {
        "num_problems": len(problems),
        "num_samples": k,
        "greedy": {
            "accuracy": float(greedy_ok.mean()),
            "ci95": list(wilson_interval(int(greedy_ok.sum()), len(greedy_ok))),
        },
        "mean_at_8": mean,
        "ci95": [low, high],
        "pass_at_8": float(np.mean([pass_at_k(k, int(c), 8) for c in sampled_ok.sum(1)])),
        "per_problem_mean": per_problem_mean,
        "per_problem_greedy": greedy_ok.astype(int).tolist(),
    } | {
        kind: {
            name: {
                "mean_at_8": float(per_problem[members].mean()),
                "greedy": float(greedy_ok[members].mean()),
                "n": len(members),
            }
            for name, members in sorted(by_name.items())
        }
        for kind, by_name in groups.items()
    }
