"""The loop of `phimini evaluate MODEL`: for each benchmark the missing samples, their verdicts, and the scores."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.model.io.json_files import Row, atomic_file
from phimini.parallel.ranks.machine import cpu_name
from phimini.parallel.ranks.world import World, on_main
from phimini.stages.benchmarks.journal import Journal, Key, Sample, finished, journals
from phimini.stages.benchmarks.page import write_page
from phimini.stages.benchmarks.plan import Asked, Plan
from phimini.stages.benchmarks.scores import RESULTS, RULES, scores
from phimini.stages.config.schema import to_dict
from phimini.stages.data.packing import derive
from phimini.stages.rollout.build import build_engine, expected_on_main
from phimini.stages.rollout.dispatch import RolloutError
from phimini.stages.rollout.engine import RolloutEngine, Sampled, release_memory
from phimini.stages.run.audits import is_audited
from phimini.stages.run.progress import StepProgress
from phimini.stages.verify.benchmark import judged
from phimini.stages.verify.scorer import Answered, Scorer

_TEXT, _INTEGER, _BOOLEAN = pyarrow.string(), pyarrow.int64(), pyarrow.bool_()
COLUMNS = [
    ("problem", _TEXT), ("sample", _INTEGER), ("question", _TEXT), ("answer", _TEXT), ("subject", _TEXT), ("level", _INTEGER),
    ("response", _TEXT), ("finish_reason", _TEXT), ("tokens", _INTEGER), ("extracted", _TEXT), ("vote", _TEXT),
    ("strict", _BOOLEAN), ("reason", _TEXT), ("lenient", _BOOLEAN), ("second", _TEXT),
]  # fmt: skip
"""of the Parquet file of a benchmark's samples"""


def evaluate_benchmarks(plan: Plan, world: World) -> None:
    """Run the benchmarks of the plan. Collective.

    Samples that are finished are in the journals and are not asked again. After each benchmark its samples with verdicts
    (NAME.parquet), benchmarks.json and the page are written. Raises ValueError for journals of something else, RolloutError if
    all engines are lost.
    """
    out, engine = Path(plan.run.out), None
    judge = Scorer("benchmarks", workers=plan.run.rollout.judges, rule=judged)
    for asked in plan.asked:
        missing = on_main(world, lambda asked=asked: missing_samples(plan, asked))
        if missing:
            if engine is None:
                engine = build_engine(plan.run, plan.model.config, world)
                engine.load(plan.model.folder)
            sample(plan, world, engine, asked, missing)

        def finish(asked: Asked = asked) -> None:
            rows = judged_rows(
                plan, asked, finished(out / "samples", asked.name, asked.made), judge
            )
            write_parquet(out / f"{asked.name}.parquet", rows)
            found = {"data": asked.data, "made": asked.made} | scores(rows, asked.pass_at)
            results = results_with(plan, asked, found)
            write_sealed(out / RESULTS, results)
            write_page(out, results)
            print(line(asked.name, found), flush=True)

        on_main(world, finish)
    if engine is not None:
        release_memory(engine)


def missing_samples(plan: Plan, asked: Asked) -> list[Key]:
    """Return the samples that no journal has. With `redo` the journals are removed first. One rank calls it."""
    folder = Path(plan.run.out) / "samples"
    if plan.settings.redo:
        for path in journals(folder, asked.name):
            path.unlink()
    there = finished(folder, asked.name, asked.made)
    missing = [key for key, _ in asked.wanted if key not in there]
    print(f"{asked.name}: {len(asked.problems)} questions, {asked.k} samples of each, {len(missing)} to sample", flush=True)  # fmt: skip
    return missing


def sample(
    plan: Plan, world: World, engine: RolloutEngine, asked: Asked, keys: Sequence[Key]
) -> None:
    """Ask for these samples; each goes into this rank's journal as it arrives. Collective."""
    prompts = [asked.prompts[key.problem] for key in keys]
    seeds = [derive(plan.settings.seed, asked.name, *key) for key in keys]
    progress = StepProgress(
        expected_on_main(plan.run, world, len(keys)), asked.name, world.is_main, out=plan.run.out
    )
    with Journal(Path(plan.run.out) / "samples", asked.name, world.rank, asked.made) as journal:
        num_arrived = 0

        def arrived(number: int, completion: Sampled) -> None:
            nonlocal num_arrived
            text = plan.model.tokenizer.decode(completion.tokens, skip_special=True)
            num_tokens = len(completion.tokens)
            journal.write(keys[number], Sample(text, completion.finish_reason, num_tokens))
            num_arrived += 1
            progress.update(num_arrived, {"tokens": num_tokens})

        try:
            engine.generate(prompts, plan.params, seeds, arrived)
        except RolloutError as error:
            raise RolloutError(f"{error}; the others are in {journal.path}, and the same command goes on") from error  # fmt: skip
        finally:
            progress.close()
    world.barrier()


def judged_rows(plan: Plan, asked: Asked, samples: dict[Key, Sample], judge: Scorer) -> list[Row]:
    """Return the rows of all wanted samples with their verdicts; more samples than k, of an earlier run, are left out."""
    wanted = [(key, problem, samples[key]) for key, problem in asked.wanted]
    items = [
        Answered(p["question"], p["answer"], one.response, one.finish_reason)
        for _, p, one in wanted
    ]
    verdicts = [judge.start(item) for item in items]
    seconds = [
        judge.second(item) if is_audited(plan.run.seed, plan.run.audit, asked.name, *key) else None
        for item, (key, _, _) in zip(items, wanted, strict=True)
    ]
    return [
        {"problem": key.problem, "sample": key.number, "question": problem["question"], "answer": problem["answer"],
         "subject": problem["family"], "level": problem["level"], **one._asdict(), **verdict()._asdict(), "second": second and second()}
        for (key, problem, one), verdict, second in zip(wanted, verdicts, seconds, strict=True)
    ]  # fmt: skip


def results_with(plan: Plan, asked: Asked, found: dict[str, Any]) -> dict[str, Any]:
    """Return the content of benchmarks.json with a benchmark added to those of the same model and settings."""
    path = Path(plan.run.out) / RESULTS
    there = read_sealed(path)["benchmarks"] if path.exists() else {}
    own = {"num_questions": asked.made["num_questions"], "token_ids": asked.made["token_ids"]}
    kept = {name: each for name, each in there.items() if each["made"] | own == asked.made}
    return {
        "model": plan.model.name, "files": plan.model.files, "template": plan.model.template,
        "settings": to_dict(plan.settings), "date": datetime.date.today().isoformat(), "machine": cpu_name(),
        "benchmarks": kept | {asked.name: found},
    }  # fmt: skip


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows of samples as a Parquet file, atomically."""
    table = pyarrow.Table.from_pylist(list(rows), pyarrow.schema(COLUMNS))
    with atomic_file(path) as file:
        pyarrow.parquet.write_table(table, file)


def line(name: str, of_one: dict[str, Any]) -> str:
    """Return a benchmark's means and their intervals as a line."""
    means = (f"{rule} {100 * of_one[rule][0]:.2f} [{', '.join(f'{100 * end:.2f}' for end in of_one[rule][1:])}]" for rule in RULES)  # fmt: skip
    return f"{name}: mean@{of_one['k']} of {of_one['num_questions']} questions: {', '.join(means)}"
