"""`phimini clean`: a corpus of rollouts verified, annotated and cleaned by datatrove, in tasks here or in Slurm's job arrays.

    check      held-out questions out, verdicts, repetition, the judge's second look    a task for each shard
    sign       MinHash signatures of the correct rows                                   a task for each shard
    buckets    rows that agree in a bucket                                              a task for each bucket
    cluster    one row of each group stays                                              one task
    questions  pass rates and labels of the questions                                   one task
    write      rows without near-duplicates, with all annotations                       a task for each shard
    report     counts and examples of what went; only then OUT/rows is there            one task

datatrove marks each finished task in OUT/logs, so the same command goes on where it was ended; a task that was under way is
repeated, and what a model has answered is not asked again (OUT/answers). OUT/work may be deleted afterwards.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.model.io.json_files import Span, write_rows
from phimini.stages.benchmarks.questions import bare_questions
from phimini.stages.config.cleaning import CleanOptions
from phimini.stages.config.schema import to_dict
from phimini.stages.corpus.report import lines
from phimini.stages.corpus.shards import Shard, shards_of
from phimini.stages.data.own_rows import files_of
from phimini.stages.run.lock import RunLock
from phimini.stages.run.stage_folder import check_same_settings

PLAN, REPORT = "plan.json", "report.json"
EXTRA = "pip install 'phimini[data]'"


def main(verb: str, options: CleanOptions) -> int:
    """Clean a corpus, or submit the jobs that do.

    Raises ValueError that names a bad row, setting or changed file, ImportError without the extra `data`, ConnectionError if an
    endpoint is lost, OSError if the folder is in use.
    """
    for name in ("source", "out"):
        if not getattr(options, name):
            raise ValueError(f"{verb}: expected SOURCE OUT, got no {name}")
    source, out = Path(options.source), Path(options.out)
    if not source.exists():
        raise ValueError(
            f"{verb}: source={source}: expected a file or folder of rollouts, found none"
        )
    try:
        from phimini.stages.corpus import jobs
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{verb}: {str(error.name).partition('.')[0]} is not installed; {EXTRA}"
        ) from error
    if options.executor == "slurm":
        jobs.check_slurm(options)
    with RunLock(out, make=True):
        shards = begin(options, source, out)
        if not (out / REPORT).exists():
            jobs.run(options, shards, out)
        if (out / REPORT).exists():
            print(*lines(read_sealed(out / REPORT), out), sep="\n", flush=True)
    return 0


def begin(options: CleanOptions, source: Path, out: Path) -> list[Shard]:
    """Write the plan, or compare with that of an earlier command, and return the shards. ValueError for a change."""
    plan = {"settings": _settings(options), "files": _files(source, *map(Path, options.heldout))}
    if options.redo:
        for name in (PLAN, REPORT):
            (out / name).unlink(missing_ok=True)
        for name in ("logs", "work", "answers", "rows", "dropped"):
            shutil.rmtree(out / name, ignore_errors=True)
    if (out / PLAN).exists():
        then = read_sealed(out / PLAN)
        check_same_settings(then["settings"], plan["settings"], out)
        for name in sorted(then["files"].keys() | plan["files"].keys()):
            if then["files"].get(name) != plan["files"].get(name):
                raise ValueError(f"{name} has changed since {out} was begun from it; use --redo, or another out=")  # fmt: skip
    else:
        heldout = [row for path in options.heldout for row in bare_questions(Path(path))]
        write_rows(out / "work" / "heldout.jsonl", heldout)
        shards = shards_of(source, int(options.shard_mb * 1e6))
        write_sealed(out / PLAN, plan | {"shards": shards})
    return [Shard(path, name, span and Span(*span)) for path, name, span in read_sealed(out / PLAN)["shards"]]  # fmt: skip


def _settings(options: CleanOptions) -> dict[str, Any]:
    """Return the settings that decide the result."""
    free = ("source", "out", "heldout", "executor", "workers", "slurm", "redo")
    settings = {name: value for name, value in to_dict(options).items() if name not in free}
    return json.loads(json.dumps(settings))  # lists for tuples, as they are read back


def _files(*sources: Path) -> dict[str, list[int]]:
    """Return size, in bytes, and time of change, in ns, of each file."""
    stats = {str(path): path.stat() for source in sources for path in files_of(source)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
