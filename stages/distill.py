"""Distillation data: questions, the teacher's rollouts, and a verdict on each rollout.

Writes `distill/`: `rollouts.jsonl` (every rollout, right or wrong), `prompts.jsonl` (questions for
stages 3 and 4), `validation.jsonl` (verified rollouts that no stage trains on) and `heldout.jsonl`
(the evaluation). No held-out question occurs in any other set, not even in other words (`data/decontaminate.py`).
"""

import random
from pathlib import Path

from phimini.model.io.json_files import write_rows
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.arithmetic_problems import Problem, generate_problems, teach
from phimini.stages.data.decontaminate import Questions, paraphrase_groups
from phimini.stages.data.gym_prompts import gym_prompts
from phimini.stages.data.layouts import mapping_of
from phimini.stages.data.own_rows import SETS, own_problems, own_rollouts, sets_in
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import is_correct
from phimini.stages.run.stage_folder import Stage
from phimini.stages.verify.verdict import verify


def distill(run: RunConfig, *, redo: bool = False) -> Path:
    """Write the data sets into distill/ and return the folder. Not collective: one process calls it.

    The source is the demo's generator, a folder, or a file of rollouts (`distill.source`).
    Raises ValueError that names file and line of bad rows or a set that is too small, ImportError without a package that `gym_tasks` needs.
    """
    stage = Stage.open(run, "distill", redo=redo)
    if stage.complete:
        return stage.path
    stage.prepare(redo=redo)
    if run.distill.source == "generator":
        rollouts, prompts, validation, heldout = _generate(run)
    else:
        rollouts, prompts, validation, heldout = _read(run)
    if run.distill.gym_tasks:
        prompts = _without(heldout, gym_prompts(run.distill.gym_tasks, run.distill.num_prompts, run.seed))  # fmt: skip
    _check_sets(rollouts, validation, prompts=prompts, heldout=heldout)
    write_rows(stage.path / "rollouts.jsonl", rollouts)
    write_rows(stage.path / "prompts.jsonl", prompts)
    write_rows(stage.path / "validation.jsonl", validation)
    write_rows(stage.path / "heldout.jsonl", heldout)
    stage.finish(
        {
            "questions": len({row["problem_id"] for row in rollouts}),
            "rollouts": len(rollouts),
            "correct": sum(row["correct"] for row in rollouts),
            "prompts": len(prompts),
            "validation": len(validation),
            "heldout": len(heldout),
        }
    )
    return stage.path


def _check_sets(rollouts: list[dict], validation: list[dict], **problems: list[dict]) -> None:
    """Raise ValueError for a set that is too small for the stage that reads it."""
    if not any(row["correct"] for row in rollouts):
        raise ValueError(f"distill: rollouts: none of the {len(rollouts)} that are left is correct")
    if not validation:
        raise ValueError("distill: validation: no correct rollout is left to measure the loss on")
    for name, rows in problems.items():
        least = 2 if name == "heldout" else 1  # no interval has one question
        if len(rows) < least:
            raise ValueError(
                f"distill: {name}: expected at least {least} questions, {len(rows)} are left"
            )


def _without(heldout: list[dict], rows: list[dict]) -> list[dict]:
    """Return the rows whose question is not held out, in the same or other words."""
    held = Questions(row["question"] for row in heldout)
    found = {question: question in held for question in {row["question"] for row in rows}}
    return [row for row in rows if not found[row["question"]]]


def _generate(run: RunConfig) -> tuple[list[dict], list[dict], list[dict], list[dict]]:
    config = run.distill
    heldout = generate_problems(config.heldout_seed, config.num_heldout, balanced=True)
    taken = frozenset(p.key for p in heldout)
    validation = generate_problems(
        derive(run.seed, "validation"), config.num_validation, exclude_keys=taken, balanced=True
    )
    taken |= {p.key for p in validation}
    prompts = generate_problems(derive(run.seed, "prompts"), config.num_prompts, exclude_keys=taken)
    taken |= {p.key for p in prompts}
    training = generate_problems(
        derive(run.seed, "training"),
        config.num_problems,
        level_weights=config.level_weights,
        exclude_keys=taken,
    )
    return (
        [_rollout_row(run, p, k) for p in training for k in range(config.rollouts_per_problem)],
        [_problem_row(p) for p in prompts],
        [row for p in validation if (row := _rollout_row(run, p, 0))["correct"]],
        [_problem_row(p) for p in heldout],
    )


def _problem_row(problem: Problem) -> dict:
    return {
        "id": problem.id,
        "family": problem.family,
        "level": problem.level,
        "question": problem.question,
        "answer": problem.answer,
    }


def _rollout_row(run: RunConfig, problem: Problem, k: int) -> dict:
    seed = derive(run.seed, "teacher", problem.id, k)
    response = teach(problem, seed, quick=run.distill.quick, slip=run.distill.slip)
    row = _problem_row(problem)
    problem_id = row.pop("id")
    return (
        {"id": f"{problem_id}/{k}", "problem_id": problem_id}
        | row
        | {
            "response": response,
            "correct": verify(response, problem.answer),
            "source": "teacher",
            "seed": seed,
        }
    )


def _read(run: RunConfig) -> tuple[list[dict], list[dict], list[dict], list[dict]]:
    """Read the user's own rollouts: a file or a folder of them, or a folder with rollouts, prompts, validation and heldout."""
    source = Path(run.distill.source)
    if not source.exists():
        raise ValueError(
            f"distill.source: expected `generator`, a folder or a file of rollouts, got {source}"
        )
    sets = sets_in(source)
    if not sets:
        return _divide(run, _read_rollouts(run, source, str(source)))
    if missing := [name for name in SETS if name not in sets]:
        raise ValueError(f"distill.source={source}: the folder has no set {', '.join(missing)}")
    rollouts, validation = (
        _read_rollouts(run, sets[name], sets[name].name) for name in ("rollouts", "validation")
    )
    mapped = mapping_of(run.distill.layout, run.distill.fields)
    prompts, heldout = (
        list(own_problems(sets[name], mapped=mapped)) for name in ("prompts", "heldout")
    )
    kept = [_without(heldout, rows) for rows in (rollouts, prompts, validation)]
    dropped = len(rollouts) + len(prompts) + len(validation) - sum(map(len, kept))
    if dropped:
        print(
            f"distill: left out {dropped} rows whose question is a held-out one, in its or other words"
        )
    return kept[0], kept[1], [row for row in kept[2] if row["correct"]], heldout


def _divide(
    run: RunConfig, rollouts: list[dict]
) -> tuple[list[dict], list[dict], list[dict], list[dict]]:
    """Divide the rollouts of one file by question into training, prompts, validation and held-out sets.

    Prompts are among the training questions. The held-out questions are the same for every seed of the run; paraphrases
    are in one set.
    """
    config = run.distill
    questions: dict[str, list[dict]] = {}
    groups = paraphrase_groups(row["question"] for row in rollouts)
    first = {question: min(group) for group in groups for question in group}
    for row in rollouts:
        questions.setdefault(first[row["question"]], []).append(row)
    order = sorted(questions)
    random.Random(f"held out {config.heldout_seed}").shuffle(order)
    aside = config.num_heldout + config.num_validation
    if len(order) <= aside:
        raise ValueError(
            f"distill.source={config.source}: {len(order)} different questions; num_heldout={config.num_heldout} and "
            f"num_validation={config.num_validation} leave none to train on"
        )
    firsts = [questions[key][0] for key in order]
    problems = [
        {name: r[name] for name in ("family", "level", "question", "answer")}
        | {"id": r["problem_id"]}
        for r in firsts
    ]
    trained = [row for key in order[aside:] for row in questions[key]]
    validation = [row for key in order[config.num_heldout : aside] for row in questions[key]]
    return (
        trained,
        problems[aside:][: config.num_prompts],
        [row for row in validation if row["correct"]],
        problems[: config.num_heldout],
    )


def _read_rollouts(run: RunConfig, path: Path, name: str) -> list[dict]:
    """Read and verify rollouts; ids and errors name the line of the file `name`."""
    mapped = mapping_of(run.distill.layout, run.distill.fields)
    return [
        row | {"correct": is_correct(row)}
        for row in own_rollouts(path, name, len(run.curate.level_weights), mapped=mapped)
    ]
