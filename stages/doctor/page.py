"""The command `phimini doctor RECIPE`: all lines, the exit status, and the JSON."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from phimini.model.config import preset
from phimini.model.io.huggingface import load_config
from phimini.model.io.json_files import write_json
from phimini.stages.config.options import DoctorOptions
from phimini.stages.config.schema import RunConfig
from phimini.stages.doctor.machine import Line, disk_lines, gpu_lines, version_lines


def doctor(verb: str, settings: DoctorOptions) -> int:
    """Print the page; return 0 if no line says fail, else 1. Raises ValueError for `--parity` without a base model."""
    run = settings.run
    if settings.parity and run.base == "random":
        raise ValueError(f"{verb}: --parity: expected base=FOLDER, a Hugging Face folder, got base=random")  # fmt: skip
    lines = []
    for line in lines_of(run, settings.parity):
        lines.append(line)
        if settings.json != "-":
            print(f"{line.status:<4} {line.name}: {line.text}", flush=True)
    counts = {status: sum(line.status == status for line in lines) for status in ("ok", "warn", "fail")}  # fmt: skip
    document = {"counts": counts, "lines": [line._asdict() for line in lines]}
    if settings.json == "-":
        json.dump(document, sys.stdout, indent=1)
        print()
    else:
        print(", ".join(f"{number} {status}" for status, number in counts.items()))
        if settings.json is not None:
            write_json(Path(settings.json), document)
    return 1 if counts["fail"] else 0


def lines_of(run: RunConfig, parity: bool) -> Iterator[Line]:
    """Yield the lines of the page, those that need a model's memory last."""
    yield from version_lines(run)
    yield from gpu_lines()
    if run.base == "random":
        yield from disk_lines(run, preset(run.model))
        yield Line("ok", "base", "random: model and tokenizer are made from the data")
        return
    folder = Path(run.base)
    try:
        config = load_config(folder)
    except (ValueError, OSError) as error:
        yield Line("fail", "base", str(error))
        return
    yield from disk_lines(run, config)
    from phimini.stages.doctor.base_model import (  # late: it loads Megatron
        parity_lines,
        tokenizer_lines,
    )

    yield from tokenizer_lines(run, folder)
    if parity:
        yield from parity_lines(run, folder)
