"""The report: one well-formed page that needs no network, with everything in it and nothing that can act."""

import random
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from phimini.model.io.json_files import read_json, write_json, write_rows
from phimini.stages.report.charts import Series, _smoothed, line_chart, tick_labels
from phimini.stages.report.intervals import mean_interval, paired_gain, wilson_interval
from phimini.stages.report.page import PAPER, STAGE_NAMES, write_report

STAGES = ["base", "midtrain", "sft", "rollout_dpo", "rlvr"]
FAMILIES = ["chain_sum", "equation", "gcd", "product", "quotient", "sequence", "word"]
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
        write_json(run / "evaluate" / f"{stage}.json", {
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
    write_json(run / "results.json", {
        "stages": rows, "seed": 7, "num_problems": problems, "num_samples": 8, "peak_rss_bytes": 1_900_000_000,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "megatron-core": "0.16.1"},
        "machine": "AMD EPYC 7B13, 2 cores", "date": "2025-05-04", "wall_seconds": 702.0,
        "config": {"name": "tiny", "seed": 7, "midtrain": {"steps": steps, "optimizer": {"lr": 0.004, "clip": 1.0}}},
    })  # fmt: skip
    return run


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
                "kl": None if step == 3 else 0.01 * done}  # fmt: skip
    return row


def elements(page: str) -> ElementTree.Element:
    """The page's tree; raises if a tag is not closed or a character is not escaped."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def words(node: ElementTree.Element) -> str:
    return re.sub(r"\s+", " ", " ".join(node.itertext()))


class Tags(HTMLParser):
    """The page as a browser's parser sees it: tags in order, attributes, text."""

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
    text = words(elements((run / "report.html").read_text()))
    results = read_json(run / "results.json")
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
    assert "0 → 1.29" in words(section), "the first margin is rounding, not a number to read"
    assert "Reward" not in captions["SFT"], "a curve that the stage has no rows for"
    assert "Base" not in captions


def test_the_paper_stands_beside_the_run(run: Path) -> None:
    page = elements((run / "report.html").read_text())
    figures = {f.findtext("figcaption"): f for f in page.iter("figure")}
    paper = figures["The paper, Phi-4-Mini 3.8 B"]
    assert len(list(paper.iter("circle"))) == 15
    for value in ("10.0", "30.0", "43.3", "50.0", "57.5"):
        assert value in words(paper)
    ours = figures["This run, held-out problems"]
    assert len([p for p in ours.iter("path") if "whisker" in p.attrib["class"]]) == 5


def test_nothing_is_fetched_and_nothing_runs(run: Path) -> None:
    page = (run / "report.html").read_text()
    seen = Tags(page)
    assert not set(seen.tags) & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "video",
        "audio",
        "base",
        "form",
    }
    for name, value in seen.attributes:
        assert not name.startswith("on") and name not in (
            "src",
            "href",
            "srcset",
            "action",
            "data",
        ), (name, value)
        assert "//" not in value and "url(" not in value, (name, value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in page


def with_hostile_text(value: object) -> object:
    """`value` with every text in it replaced, but for what names a stage."""
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
        path: with_hostile_text(read_json(tmp_path / path))
        for path in ["results.json", *(f"evaluate/{stage}.json" for stage in STAGES)]
    }
    # JSON files cannot hold the lone surrogate, a response in memory can.
    monkeypatch.setattr(
        "phimini.stages.report.page.read_json",
        lambda path: hostile[str(path.relative_to(tmp_path))],
    )
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = words(elements(page))
    assert Tags(page).tags == Tags((run / "report.html").read_text()).tags
    assert '<script>alert("1")</script>' in text and "<script" not in page
    assert "\x00" not in page and "�" in page
    assert unescape("&amp;amp;") in page, "an entity in the text is text"


def test_the_headline_counts_only_gains_that_are_sure(tmp_path: Path) -> None:
    make_run(tmp_path)
    write_report(tmp_path)
    assert "Each of the 4 gains has a paired" in words(
        elements((tmp_path / "report.html").read_text())
    )
    results = read_json(tmp_path / "results.json")
    results["stages"][4]["gain_ci95"] = [-0.01, 0.05]
    write_json(tmp_path / "results.json", results)
    write_report(tmp_path)
    assert "3 of the 4 gains have a paired" in words(
        elements((tmp_path / "report.html").read_text())
    )


def test_controls_and_a_stage_without_metrics(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "sft" / "metrics.jsonl").unlink()
    arm = {"arm": "controls/rejection_sft", "mean_at_8": 0.5, "ci95": [0.4, 0.6], "gain_over_sft": 0.08,
           "gain_ci95": [0.05, 0.11], "against_rlvr": -0.03, "against_rlvr_ci95": [-0.05, -0.01], "greedy": 0.5, "pass_at_8": 0.7, "steps": 300, "seconds": 60.0}  # fmt: skip
    write_json(tmp_path / "controls" / "controls.json", {"seed": 0, "arms": [arm]})
    write_report(tmp_path)
    page = elements((tmp_path / "report.html").read_text())
    assert "rejection sft 50.0" in words(page) and "+8.0 [+5.0, +11.0] -3.0" in words(page)
    assert "SFT" not in [h.text for h in page.iter("h3")]


@pytest.mark.parametrize("missing", ["results.json", "evaluate/sft.json"])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("damage", [[], {}, {"stages": []}], ids=str)
def test_damaged_results_are_named(damage: object, tmp_path: Path) -> None:
    make_run(tmp_path)
    write_json(tmp_path / "results.json", damage)
    with pytest.raises(ValueError, match="results.json: expected an object with"):
        write_report(tmp_path)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1" + "0" * 400, "1.7e308", "null"])
def test_a_number_that_no_chart_can_show_is_left_out(value: str, tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    path = tmp_path / "sft" / "metrics.jsonl"
    with path.open("a") as file:
        file.write(f'{{"step": 3, "loss": {value}}}\n')
    write_report(tmp_path)


CHARTS = {
    "one point": [(1.0, 2.0)],
    "flat": [(float(x), 0.01) for x in range(100)],
    "all zero": [(float(x), 0.0) for x in range(5)],
    "falling below zero": [(float(x), -0.3 * x) for x in range(30)],
    "tiny": [(float(x), 1e-7 * (x + 1)) for x in range(80)],
    "huge": [(float(x), 1e7 + 1e6 * x) for x in range(80)],
    "long": [(float(x), (x * 7919 % 101) / 101) for x in range(5000)],
}


@pytest.mark.parametrize("case", CHARTS)
def test_a_chart_stays_in_its_frame(case: str) -> None:
    svg = ElementTree.fromstring(
        line_chart([Series("x", CHARTS[case]), Series("y", CHARTS[case][:3], "c2")])
    )
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for path in svg.iter("path"):
        numbers = [float(n) for n in re.findall(r"-?[0-9.]+", path.attrib["d"])]
        assert numbers and all(0 <= n <= max(width, height) for n in numbers), path.attrib["d"][:80]
        assert len(numbers) <= 2 * 240
    for axis in ("tick end", "tick mid"):
        labels = [t.text for t in svg.iter("text") if t.attrib["class"] == axis]
        assert labels and len(labels) == len(set(labels)), labels


def test_the_running_mean_of_a_straight_line_is_the_line_ends_included() -> None:
    points = [(float(x), 3.0 - 0.5 * x) for x in range(200)]
    assert _smoothed(points) == [(x, pytest.approx(y)) for x, y in points]


def test_a_long_noisy_curve_is_drawn_near_its_trend() -> None:
    rng = random.Random(0)
    points = [(float(x), x / 1000 + rng.gauss(0, 0.05)) for x in range(1000)]
    svg = ElementTree.fromstring(line_chart([Series("x", points)]))
    smooth = next(p for p in svg.iter("path") if p.attrib["class"] == "line c1").attrib["d"]
    xy = [tuple(map(float, pair.split())) for pair in smooth[1:].split("L")]
    (x0, y0), (x1, y1) = xy[0], xy[-1]
    for x, y in xy:
        straight = y0 + (x - x0) / (x1 - x0) * (y1 - y0)
        assert abs(y - straight) < 8, f"{abs(y - straight):.1f} of 190 pixels off at x = {x}"


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 0.5, 1.0], ["0.0", "0.5", "1.0"]),
        ([-2.0, 0.0, 2.0], ["−2", "0", "2"]),
        ([0.25, 0.5, 0.75], ["0.25", "0.50", "0.75"]),
        ([0.0, 1e-4, 2e-4], ["0", "1.0e-4", "2.0e-4"]),
        ([1e6, 1.02e6, 1.04e6], ["1.00e6", "1.02e6", "1.04e6"]),
        ([9e-6, 9.25e-6, 9.5e-6], ["9.00e-6", "9.25e-6", "9.50e-6"]),
        ([10000.0, 15000.0], ["10k", "15k"]),
        ([3.0], ["3"]),
    ],
    ids=str,
)
def test_tick_labels(ticks: list[float], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels
