"""The report: one well-formed page that needs no network, with every number, whose charts are Plotly figures."""

import base64
import copy
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browse, needs_chromium, probed, sha256
from plotly.offline import get_plotlyjs

from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.model.io.json_files import write_rows
from phimini.stages.report.alarms import alarms, num_updates
from phimini.stages.report.figures import Series, curves, smoothed
from phimini.stages.report.intervals import mean_interval, paired_gain, wilson_interval
from phimini.stages.report.page import PAPER, STAGE_NAMES, stage_curves, write_report
from phimini.stages.run.outputs import write_summary

STAGES = ["base", "midtrain", "sft", "rollout_dpo", "rlvr"]
FAMILIES = ["chain_sum", "equation", "gcd", "product", "quotient", "sequence", "word"]
NO_UPDATE = (5, 7, 8, 50)
"""steps of stage 4, from 0"""
SKILLS = [0.0, 0.20, 0.42, 0.55, 0.65]
HOSTILE = '</pre><script>alert("1")</script><img src="http://example.com/x.png" onerror=\'alert(2)\'>&amp; \x00\x07\ud800\uffff]]>'


def make_run(run: Path, *, response: str = "", steps: int = 120, problems: int = 84) -> Path:
    """A run directory as `phimini recipe` leaves it, with made-up numbers."""
    rng = random.Random(0)
    hardness = [rng.random() for _ in range(problems)]
    rows, before = [], None
    for index, stage in enumerate(STAGES):
        means = [
            sum(rng.random() < min(1.0, 2 * SKILLS[index] * (1 - h)) for _ in range(8)) / 8
            for h in hardness
        ]
        mean, low, high = mean_interval(means, 8)
        greedy = sum(rng.random() < m for m in means)
        group = {"mean_at_8": mean, "greedy": greedy / problems, "n": problems // 7}
        write_sealed(run / "evaluate" / f"{stage}.json", {
            "stage": stage, "mean_at_8": mean, "ci95": [low, high], "pass_at_8": min(1.0, mean + 0.2),
            "greedy": {"accuracy": greedy / problems, "ci95": list(wilson_interval(greedy, problems))},
            "per_problem_mean": means,
            "families": {f: group | {"mean_at_8": min(1.0, mean * (0.6 + 0.1 * i))} for i, f in enumerate(FAMILIES)},
            "levels": {str(i): group | {"mean_at_8": mean * (1.2 - 0.3 * i)} for i in range(3)},
            "samples": [
                {"question": f"What is {17 + i} + {25 * i}?", "answer": str(17 + 26 * i), "family": "chain_sum",
                 "level": i % 3, "correct": index + i >= 4,
                 "response": response or f"{17 + i}+{25 * i}:7+5=12,1+2+1=4;={17 + 26 * i}</think>\\boxed{{{17 + 26 * i}}}"}
                for i in range(5)
            ],
        })  # fmt: skip
        gain = None if before is None else paired_gain(before, means)
        rows.append({
            "stage": stage, "mean_at_8": mean, "ci95": [low, high], "gain": gain and gain[0],
            "gain_ci95": gain and list(gain[1:]), "greedy": greedy / problems, "pass_at_8": min(1.0, mean + 0.2),
            "steps": steps if index else 0, "tokens": 1_234_567 * index, "seconds": 100.0 * index, "evaluation_seconds": 12.5,
        })  # fmt: skip
        before = means
        if index:
            write_rows(
                run / stage / "metrics.jsonl",
                (metrics_row(stage, s, steps, rng) for s in range(steps)),
            )
    summarise(run)
    write_sealed(run / "results.json", {
        "stages": rows, "seed": 7, "num_problems": problems, "num_samples": 8, "peak_rss_bytes": 1_900_000_000,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "megatron-core": "0.16.1"},
        "machine": "AMD EPYC 7B13, 2 cores", "date": "2025-05-04", "wall_seconds": 702.0,
        "config": {"name": "tiny", "seed": 7, "midtrain": {"steps": steps, "optimizer": {"lr": 0.004, "clip": 1.0}}},
    })  # fmt: skip
    return run


def summarise(run: Path) -> None:
    """Write the stages' summaries, as if each had ended with the files that are there."""
    for stage in STAGES:
        write_summary(run / stage, {})


def metrics_row(stage: str, step: int, steps: int, rng: random.Random) -> dict:
    done = step / steps
    row = {"step": step, "loss": 0.3 + 3 * 2.7 ** (-9 * done) + rng.gauss(0, 0.03), "lr": 4e-3 * (1 - done),
           "grad_norm": 0.3 + abs(rng.gauss(0, 0.1)), "tokens": 1500, "tokens_per_second": 9000 + rng.gauss(0, 400),
           "seconds": 0.16, "entropy": 0.2 * (1 - done) + rng.gauss(0, 0.01), "accuracy": 0.9}  # fmt: skip
    if stage in ("midtrain", "sft") and step % 10 == 9:
        row["validation_loss"] = 0.25 + 0.4 * 2.7 ** (-6 * done)
    if stage == "rollout_dpo":
        row |= {"chosen_reward": 0.4 * done, "rejected_reward": -0.9 * done, "margin": 1e-9 + 1.3 * done,
                "preference_accuracy": 0.5 + 0.3 * done}  # fmt: skip
    if stage == "rlvr":
        row |= {"reward": -0.1 + 0.5 * done + rng.gauss(0, 0.05), "response_length": 60 + 12 * done,
                "temperature": max(0.6, 1 - 0.8 * done), "zero_groups": 0.2 + 0.3 * done, "truncated": 0.01,
                "rollout_seconds": 0.1, "verify_seconds": 0.01, "kl": None if step == 3 else 0.01 * done}  # fmt: skip
        if step in NO_UPDATE:
            row = {
                name: value
                for name, value in row.items()
                if name not in ("loss", "lr", "grad_norm", "entropy", "kl")
            }
    return row


def elements(page: str) -> ElementTree.Element:
    """Return the page's tree without its scripts; raises if a tag is not closed or a character is not escaped."""
    assert page.startswith("<!DOCTYPE html>\n")
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def charts(page: ElementTree.Element) -> dict[str, dict]:
    """Return the page's figures by their titles; of several with one title, the last."""
    return {
        figure.findtext("figcaption") or "": json.loads(figure.findtext("script") or "")
        for figure in page.iter("figure")
    }


def values(encoded: list | dict) -> list[float]:
    """Return the numbers of a trace, which Plotly writes as base64 for arrays."""
    if isinstance(encoded, list):
        return encoded
    return np.frombuffer(base64.b64decode(encoded["bdata"]), encoded["dtype"]).tolist()


def page_text(page: ElementTree.Element) -> str:
    """Return the text of the page, without the data of its charts."""
    page = copy.deepcopy(page)
    for script in page.iter("script"):
        script.text = ""
    return re.sub(r"\s+", " ", " ".join(page.itertext()))


class Tags(HTMLParser):
    """Parser of the page as a browser reads it: tags in order, attributes, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("run"))
    write_report(run)
    return run


def test_the_page_is_whole_and_holds_every_number(run: Path) -> None:
    text = page_text(elements((run / "report.html").read_text()))
    results = read_sealed(run / "results.json")
    for row in results["stages"]:
        assert STAGE_NAMES[row["stage"]] in text
        assert f"{100 * row['mean_at_8']:.1f}\xa0%".replace("\xa0", " ") in text.replace(
            "\xa0", " "
        )
        low, high = row["ci95"]
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in text
        if row["gain_ci95"]:
            low, high = row["gain_ci95"]
            assert f"[{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−") in text
        assert " / ".join(map(str, PAPER[row["stage"]])) in text
    for fact in ("AMD EPYC 7B13, 2 cores", "2025-05-04", "11.7 min", "1.77 GiB", "Seed 7", "2.13.0+cpu",
                 "midtrain.optimizer lr 0.004", "What is 17 + 0?", "chain sum", "Level 2"):  # fmt: skip
        assert fact in text, fact


def test_each_stage_shows_its_curves(run: Path) -> None:
    page = elements((run / "report.html").read_text())
    section = next(s for s in page.iter("section") if s.findtext("h2") == "How each stage went")
    shown: dict[str, list[str]] = {}
    for node in section:
        if node.tag == "h3":
            shown[node.text or ""] = []
        elif shown:
            shown[list(shown)[-1]] += [
                (f.findtext("figcaption") or "") for f in node.iter("figure")
            ]
    captions = {
        stage: [caption.split("  ")[0] for caption in figures] for stage, figures in shown.items()
    }
    assert captions["SFT"][:3] == ["Loss", "Validation loss", "Entropy, nats"]
    assert "Implicit rewards" in captions["Rollout DPO"]
    assert {
        "Reward",
        "Response length, tokens",
        "Entropy, nats",
        "Sampling temperature",
        "Kl",
    } <= set(captions["RL"])
    assert "0 → 1.29" in page_text(section), "the first margin is rounding, not a number to read"
    assert "Reward" not in captions["SFT"], "a curve that the stage has no rows for"
    assert "Base" not in captions


def test_the_paper_stands_beside_the_run(run: Path) -> None:
    shown = charts(elements((run / "report.html").read_text()))
    paper = shown["The paper, Phi-4-Mini 3.8 B"]["data"]
    assert {trace["name"]: trace["y"] for trace in paper} == {
        name: [PAPER[stage][index] for stage in STAGES]
        for index, name in enumerate(["AIME 24", "MATH-500", "GPQA"])
    }
    results = read_sealed(run / "results.json")["stages"]
    ours = shown["This run, held-out problems"]["data"]
    (mean,) = [trace for trace in ours if trace.get("name") == "mean@8"]
    assert mean["y"] == [100 * row["mean_at_8"] for row in results]
    bars = [trace["y"] for trace in ours if "name" not in trace]
    assert bars == [[100 * x for x in row["ci95"]] for row in results]


def test_the_gains_and_times_are_those_of_the_results(run: Path) -> None:
    shown = charts(elements((run / "report.html").read_text()))
    rows = read_sealed(run / "results.json")["stages"]
    gained = [t for t in shown["What each stage adds, points of mean@8"]["data"] if "name" in t]
    assert [t["x"][0] for t in gained] == [100 * row["gain"] for row in rows[1:]]
    training, evaluation = shown["Where the time went"]["data"]
    assert training["x"] == [row["seconds"] for row in rows]
    assert evaluation["x"] == [row["evaluation_seconds"] for row in rows]


def test_a_curve_holds_every_step_and_a_gap_where_it_has_no_value(run: Path) -> None:
    page = elements((run / "report.html").read_text())
    (rl,) = [json.loads(f.findtext("script") or "") for f in page.iter("figure") if f.findtext("figcaption") == "Kl"]  # fmt: skip
    rows = [json.loads(line) for line in (run / "rlvr" / "metrics.jsonl").read_text().splitlines()]
    kl = [np.nan if row.get("kl") is None else row["kl"] for row in rows]
    every_step, mean = rl["data"]
    assert (every_step["x0"], every_step["dx"]) == (1, 1)
    assert values(every_step["y"]) == pytest.approx(kl, rel=1e-6, nan_ok=True)
    gaps = {i for i, y in enumerate(kl) if y != y}
    assert gaps == {3, *NO_UPDATE}
    assert {i for i, y in enumerate(values(mean["y"])) if y != y} == gaps
    # Between the gaps at 3 and 5, and 5 and 7, a line has no other point: a dot.
    assert [i for i, size in enumerate(values(every_step["marker"]["size"])) if size] == [4, 6]
    validation = charts(page)["Validation loss"]["data"][0]
    assert values(validation["x"]) == list(range(10, 121, 10)), (
        "no gap: only every tenth step has it"
    )


def test_steps_without_an_update_are_counted_and_named(run: Path) -> None:
    page = elements((run / "report.html").read_text())
    text = page_text(page).replace("\xa0", " ")
    assert "RL 4 of 120 steps made no update: steps 6, 8, 9, 51" in text
    assert "RL kl is not a finite number: step 4" in text
    cells = {row[0].text: [c.text for c in row] for row in page.iter("tr") if row[0].text}
    assert cells["RL"][5:7] == ["120", "116"] and cells["SFT"][5:7] == ["120", "120"]


def test_alarms_of_guards_are_shown_and_are_no_curves(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": 1.0} | ({"alarm_loss_spike": 40.0 + n, "skipped": 1} if n > 30 else {}) for n in range(50)]  # fmt: skip
    found = dict(alarms(tmp_path, {"sft": rows}))
    assert found["sft"].startswith("loss spike, up to 89: steps 32, 33, 34") and found["sft"].endswith("and 7 more")  # fmt: skip
    assert num_updates(rows) == 31
    drawn = stage_curves("sft", rows)
    assert [chart.title for chart in (*drawn["shown"], *drawn["folded"])] == ["Loss"]


def test_the_time_of_rl_is_that_of_its_phases(run: Path) -> None:
    with_update, without = charts(elements((run / "report.html").read_text()))["Where RL's time went"]["data"]  # fmt: skip
    # 120 steps of 0.16 s, 4 without an update: 0.1 s sampling, 0.01 s verdicts, the rest training.
    assert with_update["x"] == pytest.approx([11.6, 1.16, 0, 0, 5.8])
    assert without["x"] == pytest.approx([0.4, 0.04, 0, 0, 0.2])


def test_nothing_is_fetched_and_only_the_pages_own_scripts_run(run: Path) -> None:
    page = (run / "report.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == 2 and scripts[0] == get_plotlyjs().replace("\r\n", "\n")
    hashes = [sha256(script) for script in scripts]
    seen = Tags(re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    assert dict(seen.attributes)["content"].startswith("width")
    policy = next(value for name, value in seen.attributes if value.startswith("default-src"))
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; "
        "style-src 'unsafe-inline'; img-src data: blob:"
    )
    others = {"link", "img", "iframe", "object", "embed", "video", "audio", "base", "form"}
    assert not set(seen.tags) & others
    for name, value in seen.attributes:
        assert not name.startswith("on"), (name, value)
        assert name not in ("src", "href", "srcset", "action", "data"), (name, value)
        assert "//" not in value and "url(" not in value, (name, value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def with_hostile_text(value: object) -> object:
    """Replace every text in `value` except names of stages."""
    if isinstance(value, dict):
        return {
            k if k in NEEDED_KEYS else HOSTILE + k: with_hostile_text(v) for k, v in value.items()
        }
    if isinstance(value, list):
        return [with_hostile_text(v) for v in value]
    return HOSTILE + value if isinstance(value, str) and value not in STAGES else value


NEEDED_KEYS = {
    "stages", "stage", "mean_at_8", "ci95", "gain", "gain_ci95", "greedy", "pass_at_8", "steps", "tokens", "seconds",
    "evaluation_seconds", "seed", "num_problems", "num_samples", "peak_rss_bytes", "versions", "machine", "date",
    "wall_seconds", "config", "name", "accuracy", "families", "levels", "n", "samples", "question", "answer",
    "response", "correct", "family", "level", "per_problem_mean",
}  # fmt: skip


def test_hostile_text_changes_no_tag(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    hostile = {
        path: with_hostile_text(read_sealed(tmp_path / path))
        for path in ["results.json", *(f"evaluate/{stage}.json" for stage in STAGES)]
    }
    # JSON files cannot hold the lone surrogate, a response in memory can.
    monkeypatch.setattr(
        "phimini.stages.report.page.read_sealed",
        lambda path: hostile.get(str(path.relative_to(tmp_path))) or read_sealed(path),
    )
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = page_text(elements(page))
    assert Tags(page).tags == Tags((run / "report.html").read_text()).tags
    assert '<script>alert("1")</script>' in text and "<script>alert" not in page
    assert "\x00" not in page and "�" in page
    assert unescape("&amp;amp;") in page, "an entity in the text is text"


def test_the_headline_counts_only_gains_that_are_sure(tmp_path: Path) -> None:
    make_run(tmp_path)
    write_report(tmp_path)
    assert "Each of the 4 gains has a paired" in page_text(
        elements((tmp_path / "report.html").read_text())
    )
    results = read_sealed(tmp_path / "results.json")
    results["stages"][4]["gain_ci95"] = [-0.01, 0.05]
    write_sealed(tmp_path / "results.json", results)
    write_report(tmp_path)
    assert "3 of the 4 gains have a paired" in page_text(
        elements((tmp_path / "report.html").read_text())
    )


def test_controls_and_a_stage_without_metrics(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "sft" / "metrics.jsonl").unlink()
    summarise(tmp_path)
    arm = {"arm": "controls/rejection_sft", "mean_at_8": 0.5, "ci95": [0.4, 0.6], "gain_over_sft": 0.08,
           "gain_ci95": [0.05, 0.11], "against_rlvr": -0.03, "against_rlvr_ci95": [-0.05, -0.01], "greedy": 0.5, "pass_at_8": 0.7, "steps": 300, "seconds": 60.0}  # fmt: skip
    write_sealed(tmp_path / "controls" / "controls.json", {"seed": 0, "arms": [arm]})
    write_report(tmp_path)
    page = elements((tmp_path / "report.html").read_text())
    assert "rejection sft 50.0" in page_text(page) and "+8.0 [+5.0, +11.0] −3.0" in page_text(page)
    assert "SFT" not in [h.text for h in page.iter("h3")]


@pytest.mark.parametrize("missing", ["results.json", "evaluate/sft.json"])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_metrics_file_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, steps=6)
    path = tmp_path / "sft" / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:3]))
    with pytest.raises(
        ValueError, match=r"sft/metrics\.jsonl: has .* in 3 rows, expected .* 6 rows"
    ):
        write_report(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"sft/metrics\.jsonl: this file is missing"):
        write_report(tmp_path)


@pytest.mark.parametrize("damage", [{}, {"stages": []}], ids=str)
def test_damaged_results_are_named(damage: dict, tmp_path: Path) -> None:
    make_run(tmp_path)
    write_sealed(tmp_path / "results.json", damage)
    with pytest.raises(ValueError, match="results.json: expected an object with"):
        write_report(tmp_path)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1" + "0" * 400, "1.7e308", "null"])
def test_a_number_that_no_chart_can_show_is_left_out(value: str, tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    path = tmp_path / "sft" / "metrics.jsonl"
    with path.open("a") as file:
        file.write(f'{{"step": 3, "loss": {value}}}\n')
    summarise(tmp_path)
    write_report(tmp_path)


CURVES = {
    "one point": [(1.0, 2.0)],
    "flat": [(float(x), 0.01) for x in range(100)],
    "all zero": [(float(x), 0.0) for x in range(5)],
    "falling below zero": [(float(x), -0.3 * x) for x in range(30)],
    "tiny": [(float(x), 1e-7 * (x + 1)) for x in range(80)],
    "huge": [(float(x), 1e7 + 1e6 * x) for x in range(80)],
    "long": [(float(x), (x * 7919 % 101) / 101) for x in range(10_000)],
}


@pytest.mark.parametrize("case", CURVES)
def test_a_curve_lies_inside_its_axes(case: str) -> None:
    points = CURVES[case]
    figure = curves([Series("x", points), Series("y", points[:3], "c2")])
    layout: Any = figure.layout
    for axis, index in ((layout.xaxis, 0), (layout.yaxis, 1)):
        low, high = axis.range
        assert low < min(p[index] for p in points) or min(p[index] for p in points) == 0
        assert low < high and max(p[index] for p in points) <= high
    assert len(figure.data[0].y) == len(points), "every step can be read and zoomed into"
    assert all(len(trace.y) <= 1000 for trace in figure.data[1:]), "the mean is drawn with less"


def test_a_report_of_10_000_steps_stays_below_8_mb(tmp_path: Path) -> None:
    write_report(make_run(tmp_path, steps=10_000))
    own = (tmp_path / "report.html").stat().st_size - len(get_plotlyjs())
    assert own < 3.2e6


def test_the_running_mean_of_a_straight_line_is_the_line_ends_included() -> None:
    line = 3.0 - 0.5 * np.arange(200)
    assert smoothed(line) == pytest.approx(line)


def test_the_running_mean_of_a_long_noisy_curve_is_near_its_trend() -> None:
    trend = np.arange(1000) / 1000
    noisy = trend + np.random.default_rng(0).normal(0, 0.05, 1000)
    assert np.abs(smoothed(noisy) - trend).max() < 0.03


# Draws all charts, as printing does.
PROBE = """
dispatchEvent(new Event("beforeprint"));
const root = document.documentElement;
return {
  charts: document.querySelectorAll(".chart").length,
  drawn: document.querySelectorAll(".chart.drawn").length,
  empty: [...document.querySelectorAll(".chart")].filter((c) => !c.querySelector(".js-line, .bars path, .points path")).length,
  overflow: root.scrollWidth - root.clientWidth,
};
"""
BUDGET = "--virtual-time-budget=20000"


@needs_chromium
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_draws_every_chart_without_an_error(
    width: int, run: Path, tmp_path: Path
) -> None:
    found = probed(run / "report.html", width, tmp_path, PROBE, BUDGET)
    charts = found.pop("charts")
    assert found == {"drawn": charts, "empty": 0, "overflow": 0, "said": ""} and charts > 30


@needs_chromium
def test_a_browser_draws_10_000_steps(tmp_path: Path) -> None:
    write_report(make_run(tmp_path, steps=10_000))
    found = probed(tmp_path / "report.html", 1280, tmp_path, PROBE, BUDGET)
    assert found["drawn"] == found["charts"] and not found["said"] and not found["empty"]


@needs_chromium
def test_a_script_that_is_not_the_pages_own_does_not_run(run: Path, tmp_path: Path) -> None:
    """The content security policy refuses an injected script and an image of another host."""
    injected = (
        '<script>document.title = "mine"</script><img src="https://example.invalid/x.png"/></body>'
    )
    page = (run / "report.html").read_text().replace("</body>", injected)
    (tmp_path / "injected.html").write_text(page)
    tree, said = browse(tmp_path / "injected.html", 1280, tmp_path / "profile", BUDGET)
    assert "<title>mine" not in tree and said.count("Content Security Policy") == 2, said
