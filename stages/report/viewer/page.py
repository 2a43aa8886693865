"""The viewer's pages, `viewer/STAGE.html` of a run: one file each, which needs no network."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from phimini.model.io.json_files import write_text
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.report.datasets import checked
from phimini.stages.report.page import STAGE_NAMES, name_of, results_of, write_report
from phimini.stages.report.template import render
from phimini.stages.report.viewer import sources
from phimini.stages.report.viewer.samples import QUANTITIES, Sample, data_of, json_of, within

MOST_TOKENS = 1_000_000
"""of a page, which then has about 20 MB"""
SOURCES: dict[str, tuple[str, Callable[[Path, Tokenizer], Iterator[Sample]]]] = {
    "midtrain": ("packed rows", lambda out, _: sources.packed_rows(out)),
    "sft": ("examples", lambda out, _: sources.examples(out)),
    "rollout_dpo": ("pairs", sources.pairs),
    "rlvr": ("rollouts", sources.rollouts),
}


def write_run_pages(out: Path, state: str = "") -> None:
    """Write all pages of a run: report.html, the data sets, and the viewer's. Other arguments and errors as in `write_report`."""
    write_report(out, state)
    write_viewers(out, name_of(out, results_of(out)))


def write_viewers(out: Path, run_name: str) -> list[Path]:
    """Write the page of each stage of a run that has made a step, and return the paths.

    Raises ValueError for a damaged file of the run.
    """
    written = []
    for stage, (unit, source) in SOURCES.items():
        if (out / stage / "metrics.jsonl").exists():
            tokenizer = Tokenizer.load(checked(out, "base/model/tokenizer.json").parent)
            samples = within(source(out, tokenizer), MOST_TOKENS)
            path = out / "viewer" / f"{stage}.html"
            write_viewer(path, run_name, stage, unit, samples, tokenizer)
            written.append(path)
    return written


def write_viewer(
    path: Path, run_name: str, stage: str, unit: str, samples: Iterable[Sample], tokenizer: Tokenizer
) -> None:  # fmt: skip
    """Write one page. unit: the kind of its samples, in the plural."""
    data = data_of(list(samples), tokenizer)
    page = render(
        "viewer.html.j2",
        scripts=["viewer.js"],
        styles=["page.css", "viewer.css"],
        run_name=run_name,
        stage=STAGE_NAMES[stage],
        unit=unit,
        quantities={name: QUANTITIES[name] for name in data["columns"]} | {"position": "position"},
        verdicts=sorted(set(data["samples"]["verdict"]) - {""}),
        reasons=sorted(set(data["samples"]["reason"]) - {""}),
        data=json_of(data),
    )
    write_text(path, page)
