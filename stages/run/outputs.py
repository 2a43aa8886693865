"""The files that a stage wrote, and those from outside that it was made from: their descriptions, and the checks of both."""

import os
from pathlib import Path
from typing import Any

from phimini.model.io.checked_files import check_file, describe_file, read_sealed, write_sealed
from phimini.parallel.ranks.world import World, on_every
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.own_rows import files_of, sets_in

BEGUN, SUMMARY = "begun.json", "summary.json"
METRICS = "metrics.jsonl"
TOKENIZED = {
    "midtrain": "curate/midtrain.jsonl",
    "sft": "curate/sft.jsonl",
    "validation": "distill/validation.jsonl",
}
"""the rows of each token set"""
ON_READING = (".bin", ".parquet")
"""suffixes of files that may exceed the memory; they have checksums of each part, which their reader compares"""


def output_names(folder: Path) -> list[str]:
    """Return the names, relative to a stage's folder, of the files that make up its result; sorted.

    Hidden files are temporary, and checkpoints go when the stage is complete.
    """
    found = []
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "checkpoints"]
        found += [os.path.relpath(Path(path, f), folder) for f in files if not f.startswith(".")]
    return sorted(set(found) - {BEGUN, SUMMARY})


def write_summary(
    folder: Path, summary: dict[str, Any], known: dict[str, Any] | None = None
) -> None:
    """Write a stage's summary.json, with a description of every file of its result.

    known: descriptions by name of files that need not be read again.
    """
    known = known or {}
    files = {n: known[n] if n in known else describe_file(folder / n) for n in output_names(folder)}
    write_sealed(folder / SUMMARY, summary | {"files": files})


def check_outputs(folder: Path, *, content: bool = True, share: slice = slice(None)) -> None:
    """Compare a complete stage's files with its summary.json.

    content: False compares sizes alone, as for the files of tokens, whose documents are checked when they are read.
    share: the part of the files that this rank reads, so that ranks divide them.
    Raises ValueError that names the first file that is missing or altered.
    """
    files = sorted(read_sealed(folder / SUMMARY)["files"].items())
    for name, described in files[share]:
        check_file(folder / name, described, content=content and not name.endswith(ON_READING))


def check_inputs(run: RunConfig, world: World, *stages: str) -> None:
    """Compare the files of complete stages with their summaries, divided over the ranks. Collective. Raises as `check_outputs`."""
    share = slice(world.rank, None, world.world_size)
    for stage in stages:
        on_every(world, lambda stage=stage: check_outputs(Path(run.out) / stage, share=share))


def sources_of(run: RunConfig, stage: str) -> dict[str, Path]:
    """Return, by name, the files that must not change once a stage is complete.

    Those are the user's data, base model, config.json and chat template, and the rows and the tokenizer that tokens were
    made with.
    """
    if stage == "tokenize":
        names = (*TOKENIZED.values(), "base/model/tokenizer.json")
        return {name: Path(run.out) / name for name in names}
    files: list[Path] = []
    if stage == "distill" and run.distill.source != "generator":
        path = Path(run.distill.source)
        sources = sets_in(path).values() or [path]
        files = [file for source in sources for file in files_of(source)]
    elif stage == "base":
        globs = () if run.base == "random" else ("*.json", "*.safetensors")
        files = [p for glob in globs for p in Path(run.base).glob(glob)]
        files += [Path(name) for name in (run.model, run.chat_template)]  # a name is no file
    return {str(p): p for p in sorted(files) if p.is_file()}


def describe_sources(run: RunConfig, stage: str) -> dict[str, dict[str, Any]]:
    """Return the time of change, in ns, and the description of each file of `sources_of`."""
    return {
        name: {"mtime_ns": path.stat().st_mtime_ns} | describe_file(path)
        for name, path in sources_of(run, stage).items()
    }


def check_sources(
    run: RunConfig, stage: str, folder: Path, then: dict[str, dict[str, Any]]
) -> None:
    """Raise ValueError if a file that a complete stage was made from has changed. Of equal size and time, it is not read."""
    if stage == "tokenize":  # files of the run itself: one that has changed is damaged
        for name, described in then.items():
            path = Path(run.out) / name
            if not path.is_file() or path.stat().st_mtime_ns != described["mtime_ns"]:
                check_file(path, described)
        return
    now = sources_of(run, stage)
    for name in sorted(then.keys() | now.keys()):
        changed = name not in then or name not in now
        if not changed:
            old, status = then[name], now[name].stat()
            same_size = old["bytes"] == status.st_size
            if not (same_size and old["mtime_ns"] == status.st_mtime_ns):
                changed = not same_size or describe_file(now[name])["sha256"] != old["sha256"]
        if changed:
            how = "is gone" if name not in now else "is new" if name not in then else "has changed"
            raise ValueError(
                f"{name} {how} since {folder} was made from it; use --redo, or another out="
            )
