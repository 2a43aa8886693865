"""The data of a run, looked at: `data trace` follows one row through its steps, `data pages` describes each data set.

Both read the files of distill/ and curate/ row by row.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phimini.model.io.checked_files import check_file, read_sealed, write_sealed
from phimini.model.io.json_files import Row, numbered_rows, read_json, write_text
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.layouts import AUTO
from phimini.stages.data.selection import STEPS
from phimini.stages.report.figures import Chart, counts
from phimini.stages.report.template import render

PAGES = {"midtrain": "curate/midtrain", "sft": "curate/sft", "pairs": "curate/pairs", "prompts": "distill/prompts"}  # fmt: skip
"""the data set of each training stage"""
LENGTHS = "Answers by length, characters"
NUM_SAMPLES, MOST_FAMILIES = 6, 20
_PROVENANCE = ("origin", "source", "licence", "teacher", "sampling", "seed")


def trace(run: RunConfig, id: str) -> list[str]:
    """Return lines on where the row with an id came from, and what each step did with it, `clean` included.

    Raises ValueError if there is no such row.
    """
    folder = Path(run.out) / "distill"
    for name in ("rollouts", "validation", "prompts", "heldout", "dropped"):
        for number, row in _with_id(folder / f"{name}.jsonl", id):
            lines = _from(row) + _cleaned(row)
            if name == "dropped":
                return [*lines, f"distill: left out: {row['reason']}"]
            verdict = ""
            if "correct" in row:
                verdict = f", {'correct' if row['correct'] else 'wrong'} ({row.get('verdict', 'by the verifier')})"
            lines.append(f"distill: line {number + 1} of {name}.jsonl{verdict}")
            return lines + (_curated(run, number, row) if name == "rollouts" else [])
    for path in sorted((Path(run.distill.source).parent / "dropped").rglob("*.parquet")):
        for _, row in numbered_rows(path, {"id": str, "reason": str}, mapped=AUTO):
            if row["id"] == id:
                return [*_from(row), *_cleaned(row), f"clean: left out: {row['reason']}"]
    raise ValueError(f"data trace: {folder}: expected the id of a row, got {id!r:.60}")


def _from(row: Row) -> list[str]:
    known = [f"{key} {row[key]}" for key in _PROVENANCE if row.get(key)]
    return [f"{row['id']}: {', '.join(known) or 'made by this run'}"]


def _cleaned(row: Row) -> list[str]:
    """Return lines on the way of a row through `clean`, if it has been there."""
    lines = []
    if "repetition" in row:
        lines.append(f"clean: repetition {row['repetition']:.2f}")
    if "judge" in row:
        said = " ".join(row["judge"].get(key) or "" for key in ("verdict", "reason")).strip()
        lines.append(f"clean: judge {row['judge']['model']} after {row['judge']['verifier']}: {said or 'invalid reply'}")  # fmt: skip
    if "tried" in row:
        lines.append(
            f"clean: {row['passed']} of the question's {row['tried']} rollouts are correct"
        )
    if "label" in row:
        given = row["label"]
        lines.append(f"clean: {row['family']}, level {row['level']} by {given['model']}, before {given['family'] or 'none'}, level {given['level']}")  # fmt: skip
    return lines


def _curated(run: RunConfig, number: int, row: Row) -> list[str]:
    """Return lines on a rollout's way through curate."""
    folder = Path(run.out) / "curate"
    if not (folder / "steps.npy").exists():
        return ["curate: not run yet"]
    bits = int(np.load(folder / "steps.npy", mmap_mode="r")[number])
    steps = {step for bit, step in enumerate(STEPS) if bits >> bit & 1}
    lines = [f"curate: {step}" for step in ("copy", "loop") if step in steps]
    for name in ("midtrain", "sft"):
        places = [n + 1 for n, _ in _with_id(folder / f"{name}.jsonl", row["id"])] if name in steps else []  # fmt: skip
        lines.append(f"curate: {name}: {f'line {places[0]}' if places else 'not in it'}")
    end = "chosen" if "chosen" in steps else "rejected" if "rejected" in steps else ""
    if not end:
        return [*lines, "curate: pairs: not in them"]
    place = "startswith" if end == "chosen" else "endswith"
    mark = f"{row['id']}|" if end == "chosen" else f"|{row['id']}"
    pairs = (r["id"] for _, r in _rows(folder / "pairs.jsonl", row["problem_id"]))
    return [*lines, f"curate: pairs: {end} in {next(p for p in pairs if getattr(p, place)(mark))}"]


def _with_id(path: Path, id: str) -> Iterator[tuple[int, Row]]:
    return ((number, row) for number, row in _rows(path, id) if row["id"] == id)


def _rows(path: Path, text: str = "") -> Iterator[tuple[int, Row]]:
    """Yield the numbers and rows of those lines of a file that hold a text as JSON. A missing file is empty."""
    mark = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    if path.exists():
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if mark in line:
                    yield number, json.loads(line)


@dataclass(slots=True)
class Tally:
    """Counts and an even sample of a data set's rows."""

    rows: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """answers of up to 2^n characters, by n"""
    levels: Counter[int] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    samples: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Row]]) -> "Tally":
        tally, rng = cls(), random.Random(0)
        for _, row in rows:
            tally.rows += 1
            texts = [row[key] for key in ("response", "chosen", "rejected") if key in row]
            tally.lengths.update(max(len(text) - 1, 0).bit_length() for text in texts)
            tally.levels[row.get("level", 0)] += 1
            tally.families[row.get("family") or "none"] += 1
            tally.sources[", ".join(str(row[key]) for key in ("source", "licence", "teacher") if key in row)] += 1  # fmt: skip
            place = len(tally.samples) if tally.rows <= NUM_SAMPLES else rng.randrange(tally.rows)
            if place < NUM_SAMPLES:
                tally.samples[place : place + 1] = [row]
        return tally


def pages(run: RunConfig) -> list[Path]:
    """Write `data/NAME.html` of each data set into the run's folder, and return the paths. Raises ValueError before `curate`."""
    out = Path(run.out)
    if not (out / "curate" / "summary.json").exists():
        raise ValueError(
            f"data pages: {out / 'curate'} is not complete; run `phimini curate` first"
        )
    return write_pages(out, run.name, described(out))


def write_pages(out: Path, run_name: str, sets: Mapping[str, Row]) -> list[Path]:
    """Write `data/NAME.html` of each data set of `described`, and return the paths."""
    written = []
    for name, found in sets.items():
        written.append(out / "data" / f"{name}.html")
        charts = [
            Chart(title, counts(numbers), title.lower())
            for title, numbers in found["histograms"].items()
            if numbers
        ]
        page = render("data.html.j2", run_name=run_name, name=name, charts=charts, **found)
        write_text(written[-1], page)
    return written


def checked(out: Path, name: str) -> Path:
    """Return the path of a file of a run, e.g. `curate/sft.jsonl`. Raises ValueError if its stage is complete and the file is not what it wrote."""
    stage, _, file = name.partition("/")
    if (out / stage / "summary.json").exists():
        files = read_sealed(out / stage / "summary.json")["files"]
        if file not in files:
            raise ValueError(f"{out / name}: {stage}/summary.json does not describe this file")
        check_file(out / name, files[file])
    return out / name


def described(out: Path) -> dict[str, Row]:
    """Return `facts`, `histograms`, `drops` and `samples` of each data set of a run whose curate is complete.

    They are kept in `data/sets.json`: rows are read again only if the data was made again.
    """
    path, made = out / "data" / "sets.json", {}
    for stage in ("curate", "rollout_dpo", "rlvr"):
        if (out / stage / "summary.json").exists():
            made[stage] = read_sealed(out / stage / "summary.json")["id"]
    if path.exists() and (kept := read_sealed(path))["made"] == made:
        return kept["sets"]
    files, drops = dict(PAGES), _drops(out)
    if (out / "rollout_dpo" / "pairs.jsonl").exists() and "rollout_dpo" in made:
        files["pairs"], drops["pairs"] = "rollout_dpo/pairs", _drops_of_own_pairs(out)
    tallies = {n: Tally.of(_rows(checked(out, f"{file}.jsonl"))) for n, file in files.items()}
    if "rlvr" in made:
        pool = read_json(checked(out, "rlvr/pool.json"))
        drops["prompts"] = _drops_of_pool(pool, tallies["prompts"].rows)
    sets = {name: _set(tally, drops.get(name, {})) for name, tally in tallies.items()}
    write_sealed(path, {"made": made, "sets": sets})
    return sets


def _set(tally: Tally, drops: Mapping[str, int]) -> Row:
    """Return what a page says about a data set, as JSON values."""
    sizes = range(min(tally.lengths), max(tally.lengths) + 1) if tally.lengths else ()
    sources = "; ".join(f"{s}: {n:,}" for s, n in tally.sources.most_common(9))
    return {
        "facts": {
            "Rows": f"{tally.rows:,}",
            "Families": f"{len(tally.families):,}",
            "Sources and licences": sources or "none",
        },
        "histograms": {
            LENGTHS: {f"to {2**n:,}": tally.lengths[n] for n in sizes},
            "Rows by level": {str(level): n for level, n in sorted(tally.levels.items())},
            "Rows by family": dict(tally.families.most_common(MOST_FAMILIES)),
        },
        "drops": {reason: n for reason, n in drops.items() if n},
        "samples": tally.samples,
    }


def _drops_of_own_pairs(out: Path) -> dict[str, int]:
    """Return the number of rollouts of stage 2's model that are in no pair, by verdict."""
    left: Counter[str] = Counter()
    for file in sorted((out / "rollout_dpo" / "rollouts").glob("*.jsonl")):
        left.update("right" if row["correct"] else "wrong" for _, row in _rows(file))
    pairs = sum(1 for _ in _rows(out / "rollout_dpo" / "pairs.jsonl"))
    return {f"{verdict}, in no pair": n - pairs for verdict, n in left.items()}


def _drops_of_pool(pool: Row, prompts: int) -> dict[str, int]:
    """Return the number of prompts that stage 4 does not train on, by reason."""
    varied = pool["probed"] - pool["too_easy"] - pool["unfinished"] - len(pool["kept"])
    return {"not probed": prompts - pool["probed"], "too easy for stage 3's model": pool["too_easy"], "every answer of the probe cut off": pool["unfinished"],
            "lengths of the answers vary": varied}  # fmt: skip


def _drops(out: Path) -> dict[str, dict[str, int]]:
    """Return, for each data set made of rollouts, the number of rollouts that are not in it by reason."""
    steps = np.load(out / "curate" / "steps.npy", mmap_mode="r")
    has = {step: steps >> bit & 1 == 1 for bit, step in enumerate(STEPS)}
    before: Counter[str] = Counter()
    for _, row in _rows(out / "distill" / "dropped.jsonl"):
        before[row["reason"].partition(" question")[0]] += 1
    correct = 0
    for _, row in _rows(out / "distill" / "rollouts.jsonl"):
        correct += row["correct"]
        if not row["correct"]:
            before[f"wrong, {row.get('verdict', 'by the verifier')}"] += 1
    paired = has["chosen"] | has["rejected"]
    number = lambda mask: int(mask.sum())
    found: dict[str, dict[str, int]] = {
        "midtrain": before | {"copy of another answer": correct - number(has["midtrain"])},
        "sft": {"loop": number(has["midtrain"] & has["loop"]), "not chosen": number(has["midtrain"] & ~has["loop"] & ~has["sft"])},
        "pairs": {"loop": number(has["loop"]), "copy": number(has["copy"] & ~has["loop"] & ~paired),
                  "no partner": number(~has["loop"] & ~has["copy"] & ~paired)},
    }  # fmt: skip
    return found
