"""Distillation data: questions, the teacher's rollouts, and a verdict on each rollout.

Writes `distill/`: `rollouts.jsonl` (every rollout, right or wrong), `prompts.jsonl` (questions for
stages 3 and 4), `validation.jsonl` (verified rollouts that no stage trains on) and `heldout.jsonl`
(the evaluation). No held-out question occurs in any other set, not even in other words (`data/decontaminate.py`):
`dropped.jsonl` names the rows of a source that are left out. Rows pass one by one, so a source may exceed the memory.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from phimini.model.io.json_files import Row, atomic_file, count_rows, dump, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.config.schema import RunConfig
from phimini.stages.corpus.steps import Named, routed, verified
from phimini.stages.data.arithmetic_problems import Problem, generate_problems, teach
from phimini.stages.data.gym_prompts import gym_prompts
from phimini.stages.data.layouts import mapping_of
from phimini.stages.data.own_rows import SETS, files_of, own_problems, own_rollouts, sets_in
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import check_texts
from phimini.stages.data.set_aside import Aside, AskedQuestions
from phimini.stages.run.progress import tracked, work
from phimini.stages.run.stage_folder import Stage
from phimini.stages.verify.scorer import Scorer
from phimini.stages.verify.verdict import verify

TAUGHT = "teacher"
"""the folder of the answers of `distill.teacher`"""


class Source(NamedTuple):
    """The sets of a source; `rows` pass once, and `prompts` are chosen after them."""

    rows: Iterable[tuple[str, Row]]
    """pairs of a set, `rollouts`, `validation` or `dropped`, and a row"""
    prompts: Callable[[], list[Row]]
    heldout: list[Row]


def distill(run: RunConfig, *, redo: bool = False) -> Path:
    """Write the data sets into distill/ and return the folder. Not collective: one process calls it.

    The source is the demo's generator, a folder, or a file of rollouts (`distill.source`), or of questions for a teacher
    (`distill.teacher`). Raises ValueError that names file and line of bad rows, a set that is too small or a request that the
    teacher refuses, ConnectionError if the teacher is lost, ImportError without a package that is asked for.
    """
    stage = Stage.open(run, "distill", redo=redo)
    if stage.complete:
        return stage.path
    if not redo and (stage.path / TAUGHT).exists():
        stage.check_begun()
    stage.prepare(redo=redo)
    source = _generate(run) if run.distill.source == "generator" else _read(run, stage)
    counts: Counter[str] = Counter()
    names = ["rollouts", "validation"] + ["dropped"] * (run.distill.source != "generator")
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(atomic_file(stage.path / f"{name}.jsonl")) for name in names
        }
        for name, row in source.rows:
            counts.update([name, *(["correct"] if name == "rollouts" and row["correct"] else [])])
            line = dump(row, f"{stage.path / name}.jsonl: row {counts[name]}")
            files[name].write(f"{line}\n".encode())
        heldout, prompts = source.heldout, source.prompts()
        if run.distill.gym_tasks:
            asked = gym_prompts(run.distill.gym_tasks, run.distill.num_prompts, run.seed)
            prompts = _without(Aside(heldout), asked)
        _check_sets(counts, prompts=prompts, heldout=heldout)
    write_rows(stage.path / "prompts.jsonl", prompts)
    write_rows(stage.path / "heldout.jsonl", heldout)
    if counts["dropped"]:
        print(f"distill: left out {counts['dropped']:,} rows, most of held-out questions: {stage.path / 'dropped.jsonl'}")  # fmt: skip
    stage.finish(
        {name: counts[name] for name in ("rollouts", "correct", "validation", "dropped")}
        | {"prompts": len(prompts), "heldout": len(heldout)}
    )
    return stage.path


def _check_sets(counts: Counter[str], **problems: list[Row]) -> None:
    """Raise ValueError for a set that is too small for the stage that reads it."""
    if not counts["correct"]:
        raise ValueError(
            f"distill: rollouts: none of the {counts['rollouts']} that are left is correct"
        )
    if not counts["validation"]:
        raise ValueError("distill: validation: no correct rollout is left to measure the loss on")
    for name, rows in problems.items():
        least = 2 if name == "heldout" else 1  # no interval has one question
        if len(rows) < least:
            raise ValueError(
                f"distill: {name}: expected at least {least} questions, {len(rows)} are left"
            )


def _without(aside: Aside, rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose question is not set aside, in the same or other words."""
    return [row for row in rows if aside.of(row["question"]) is None]


def _generate(run: RunConfig) -> Source:
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

    def rows() -> Iterator[tuple[str, Row]]:
        total = len(training) + len(validation)
        problems = tracked((*training, *validation), work("distill", total, run.out))
        for p in islice(problems, len(training)):
            for k in range(config.rollouts_per_problem):
                yield "rollouts", _rollout_row(run, p, k)
        for p in problems:
            if (row := _rollout_row(run, p, 0))["correct"]:
                yield "validation", row

    return Source(rows(), lambda: list(map(_problem_row, prompts)), list(map(_problem_row, heldout)))  # fmt: skip


def _problem_row(problem: Problem) -> Row:
    return {
        "id": problem.id,
        "family": problem.family,
        "level": problem.level,
        "question": problem.question,
        "answer": problem.answer,
    }


def _rollout_row(run: RunConfig, problem: Problem, k: int) -> Row:
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


def _read(run: RunConfig, stage: Stage) -> Source:
    """Read the user's own rollouts: a file or a folder of them, or a folder with rollouts, prompts, validation and heldout."""
    config, source = run.distill, Path(run.distill.source)
    if not source.exists():
        raise ValueError(
            f"distill.source: expected `generator`, a folder or a file of rollouts, got {source}"
        )
    sets = sets_in(source)
    if not sets:
        return _divide(run, stage, source)
    if missing := [name for name in SETS if name not in sets]:
        raise ValueError(f"distill.source={source}: the folder has no set {', '.join(missing)}")
    mapped = mapping_of(config.layout, config.fields)
    check = partial(check_texts, _base_tokenizer(run), ("question",))
    heldout = list(own_problems(sets["heldout"], "", check, mapped))
    aside = Aside(heldout)
    given = (
        (name, row)
        for name in ("rollouts", "validation")
        for row in _answered(run, stage, name, partial(_given, run, sets[name], sets[name].name), aside)
    )  # fmt: skip
    prompts = lambda: _without(aside, own_problems(sets["prompts"], "", check, mapped))
    return Source(_checked(run, given, aside), prompts, heldout)


def _divide(run: RunConfig, stage: Stage, source: Path) -> Source:
    """Divide the rollouts of one source by question into training, prompts, validation and held-out sets; they are read twice.

    Prompts are among the training questions. The held-out questions are the same for every seed of the run; paraphrases
    are in one set.
    """
    read = partial(_given, run, source, str(source))
    asked = AskedQuestions(read("questions"), run.distill)
    heldout, validation = asked.divide()
    aside = Aside(heldout, validation)
    given = (("rollouts", row) for row in _answered(run, stage, "rollouts", read, aside))

    def rows() -> Iterator[tuple[str, Row]]:
        for name, row in _checked(run, given, aside):
            if name == "rollouts":
                asked.note(row)
            yield name, row

    return Source(rows(), asked.prompts, heldout)


def _given(run: RunConfig, path: Path, name: str, what: str = "rows") -> Iterator[Row]:
    """Yield the rollouts of a source, or its questions for the teacher; ids and errors name the line of the file `name`.

    what: is read, for the progress.
    """
    config, num_levels = run.distill, len(run.curate.level_weights)
    mapped = mapping_of(config.layout, config.fields)
    read = own_rollouts if config.teacher.model is None else own_problems
    fields = ("question", "response") if config.teacher.model is None else ("question",)
    check = partial(check_texts, _base_tokenizer(run), fields)
    read = partial(read, path, name, mapped=mapped, num_levels=num_levels, check=check)
    for row in _with_progress(run, path, what, read):
        yield row if config.licence is None else {"licence": config.licence} | row


def _base_tokenizer(run: RunConfig) -> Tokenizer | None:
    """Return the base model's tokenizer, or None if `base` will train one on the rows."""
    return None if run.base == "random" else Tokenizer.load(Path(run.base))


def _with_progress(
    run: RunConfig, path: Path, what: str, read: Callable[..., Iterator[Row]]
) -> Iterator[Row]:
    """Yield the rows of a source, and show how much of its files is read."""
    total = sum(map(count_rows, files_of(path)))
    with work(f"distill {path.name} {what}", total, run.out) as progress:
        yield from read(note=progress.advance)


def _answered(
    run: RunConfig, stage: Stage, name: str, read: Callable[[], Iterator[Row]], aside: Aside
) -> Iterator[Row]:
    """Return the rollouts of a set: those of `read`, or the teacher's, after asking for those that are missing.

    The teacher is not asked held-out questions.
    """
    if run.distill.teacher.model is None:
        return read()
    try:
        from phimini.stages.data.teacher import ask
    except ModuleNotFoundError as error:
        raise ImportError(
            f"distill.teacher.model: {error.name} is not installed; pip install aiohttp msgspec"
        ) from error

    def questions() -> Iterator[Row]:
        for row in read():
            found = aside.of(row["question"])
            if found is None or found[0] != "heldout":
                yield row

    file = f"{TAUGHT}/{name}.jsonl"
    path = stage.path / file
    if file not in stage.made:
        config, copies = run.distill.teacher, run.distill.rollouts_per_problem
        ask(config, run.seed, questions, path, copies=copies, field="distill.teacher")
        stage.record(file)
    path.with_suffix(".journal").unlink(missing_ok=True)
    levels, mapped = len(run.curate.level_weights), mapping_of("plain", ())
    read = partial(own_rollouts, path, file, levels, mapped=mapped)
    return _with_progress(run, path, "verdicts", read)


def _checked(run: RunConfig, given: Iterable[Named], aside: Aside) -> Iterator[Named]:
    """Yield the rows with their sets and verdicts; of those that are dropped, only where they came from and why."""
    accept = run.distill.accept_judged
    scorer = Scorer("distill", workers=run.distill.workers)
    for name, row in verified(
        routed(given, aside), scorer, run.distill.workers, accept_judged=accept
    ):
        yield name, row if name != "dropped" else {key: row[key] for key in ("id", "origin", "reason")}  # fmt: skip
