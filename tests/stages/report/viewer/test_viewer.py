"""The viewer: values at the tokens that they belong to, the trainer's own data, and its page in a browser."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from browser import needs_chromium, probed
from recipe_cases import MICRO, finished  # noqa: F401

from phimini.model.io.chat import encode_prompt
from phimini.model.io.checked_files import write_sealed
from phimini.model.io.json_files import read_rows
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.parallel.training.batch import IGNORE, Document, pack
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override, to_dict
from phimini.stages.report.viewer import sources
from phimini.stages.report.viewer.page import write_viewer, write_viewers
from phimini.stages.report.viewer.samples import Sample, Text, texts_of, within

HOSTILE = "</script><script>alert(1)</script>"


def test_a_value_stands_at_the_token_that_was_predicted() -> None:
    names = ["old_logp", "advantage", "weight"]
    fields = lambda *rows: dict(zip(names, rows, strict=True))
    documents = [
        Document(
            tokens=[5, 6, 7],
            targets=[IGNORE, 7, 8],
            token_fields=fields([0.0, -0.5, -2.0], [0.0, 1.5, 1.5], [0.0, 0.5, 0.5]),
        ),
        Document(
            tokens=[9], targets=[10], token_fields=fields([-1.0], [-1.0], [1.0])
        ),
    ]  # fmt: skip
    first, second = texts_of(pack(documents), ["a", "b"])
    assert first.tokens.tolist() == [5, 6, 7, 8] and second.tokens.tolist() == [9, 10]
    assert first.columns["weight"].tolist() == [0, 0, 0.5, 0.5]
    assert second.columns["weight"].tolist() == [0, 1]
    assert first.columns["logp"] == pytest.approx([np.nan, np.nan, -0.5, -2.0], nan_ok=True)
    assert second.columns["advantage"] == pytest.approx([np.nan, -1.0], nan_ok=True)


def test_the_viewer_shows_the_tokens_that_each_step_counted(finished: Path) -> None:  # noqa: F811
    """All samples of a step have as many tokens with loss as the trainer counted in that step."""
    for stage, source in (("midtrain", sources.packed_rows), ("sft", sources.examples)):
        counted: dict[int, float] = {}
        for sample in source(finished):
            step = int(sample.id.removeprefix("step ").partition(",")[0]) - 1
            trained = sum(text.columns["weight"].sum() for text in sample.texts)
            counted[step] = counted.get(step, 0) + trained
        rows = read_rows(finished / stage / "metrics.jsonl", {"step": int, "tokens": int})
        assert {row["step"]: row["tokens"] for row in rows} == counted and len(rows) > 3


def test_an_example_and_a_pair_are_those_of_their_rows(finished: Path) -> None:  # noqa: F811
    tokenizer = Tokenizer.load(finished / "base" / "model")
    rows = read_rows(finished / "curate" / "sft.jsonl", {})
    for sample in sources.examples(finished):
        line, text = int(sample.id.rpartition(":")[2]), sample.texts[0]
        trained = tokenizer.decode(text.tokens[text.columns["weight"] > 0])
        assert trained == f"{rows[line - 1]['response']}<|end|><|endoftext|>"
    pairs = read_rows(finished / "curate" / "pairs.jsonl", {})
    shown = list(sources.pairs(finished, tokenizer))
    assert len(shown) == len(pairs)
    for sample in shown:
        row = pairs[sample.place]
        for text in sample.texts:
            assert row[text.name] in tokenizer.decode(text.tokens[text.columns["weight"] > 0])
        before, after = (
            [float(x) for x in sample.facts[f"log-prob {when}"].split(" / ")]
            for when in ("before", "after")
        )
        margin = 0.1 * (after[0] - before[0] - after[1] + before[1])
        assert float(sample.facts["margin"]) == pytest.approx(margin, abs=0.03)


def test_rollouts_are_those_of_the_log(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    """The first is trained on, the second is not."""
    for name in ("base", "distill"):
        (tmp_path / name).symlink_to(finished / name)
    run = override(tiny(), ["rlvr.normalizer=sequence"])
    settings = {"chat_template": run.chat_template, "rlvr": to_dict(run.rlvr)}
    write_sealed(tmp_path / "rlvr" / "begun.json", {"settings": settings})
    problem = read_rows(tmp_path / "distill" / "prompts.jsonl", {})[0]
    tokenizer = Tokenizer.load(tmp_path / "base" / "model")
    row = {
        "id": "rollout/4/p/0", "prompt_id": problem["id"], "step": 4, "temperature": 0.8, "reward": 1.0, "reason": "equal",
        "advantage": 1.25, "finish_reason": "stop", "tokens": tokenizer.encode("12+7=19"),
        "versions": [{"version": 3, "start": 0, "end": 7}],
    }  # fmt: skip
    row["logprobs"] = [-0.5 * n for n in range(len(row["tokens"]))]
    other = row | {"id": "rollout/4/p/1", "reward": -1.0, "reason": "different", "advantage": None}
    (tmp_path / "rlvr" / "rollouts").mkdir()
    table = pa.Table.from_pylist([row, other])
    pyarrow.parquet.write_table(table, tmp_path / "rlvr" / "rollouts" / "000005.parquet")
    first, second = sources.rollouts(tmp_path, tokenizer)
    (text,), n = first.texts, len(row["tokens"])
    prompt = encode_prompt(tokenizer, problem["question"], run.chat_template)
    assert text.tokens.tolist() == prompt + row["tokens"]
    missing = [np.nan] * len(prompt)
    for name, expected in {"logp": row["logprobs"], "advantage": [1.25] * n}.items():
        assert text.columns[name] == pytest.approx([*missing, *expected], nan_ok=True)
    assert text.columns["weight"] == pytest.approx([0] * len(prompt) + [1 / n] * n)
    assert (first.id, first.verdict, first.reason) == ("step 5, rollout/4/p/0", "right", "equal")
    assert first.facts["trained on"] == "with advantage +1.250" and first.facts["sampled after update"] == "3"  # fmt: skip
    assert second.facts["trained on"] == "no" and not second.texts[0].columns["weight"].any()
    assert np.isnan(second.texts[0].columns["advantage"]).all()


def test_report_writes_the_viewer_and_names_its_pages(finished: Path) -> None:  # noqa: F811
    paths = write_viewers(finished, "micro")
    assert [path.name for path in paths] == ["midtrain.html", "sft.html", "rollout_dpo.html"]
    for path in paths:
        assert "<script>" in path.read_text() and "plotly" not in path.read_text()


def test_a_page_holds_at_most_so_many_tokens_in_the_order_of_places() -> None:
    text = Text("d", np.arange(10), {})
    samples = [Sample(id=str(place), place=place, texts=[text]) for place in (3, 1, 2, 0)]
    assert [sample.place for sample in within(samples, 30)] == [1, 2, 3]
    assert [sample.place for sample in within(samples, 5)] == [3], "one in any case"
    endless = (Sample(id="x", place=n, texts=[text]) for n in itertools.count())
    assert len(within(endless, 100)) == 10


def rollouts(number: int, tokens: int, vocabulary: int) -> list[Sample]:
    """Made-up rollouts: 16 tokens of prompt without loss, an advantage for all of an answer."""
    rng = np.random.default_rng(0)
    samples = []
    for place in range(number):
        size = tokens if place else 40
        answer = np.arange(size) >= 16
        right = place % 3 == 0
        inside = lambda values, answer=answer: np.where(answer, values, np.nan).astype(np.float32)
        columns = {
            "weight": answer.astype(np.float32),
            "logp": inside(-rng.exponential(1.0, size)),
            "advantage": inside(1.0 if right else -0.5),
        }
        samples.append(Sample(
            id=f"step {place // 64 + 1}, rollout/{place}{HOSTILE if place == 1 else ''}", place=place,
            texts=[Text(f"p{place // 8}", rng.integers(0, vocabulary, size), columns)],
            verdict="right" if right else "wrong", reason="equal" if right else "different" if place % 2 else "cut off",
            facts={"reward": "+1" if right else "-1"},
        ))  # fmt: skip
    return samples


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viewer") / "rlvr.html"
    tokenizer = train_tiny_tokenizer(["What is 12 + 7? It is 19, é and 你."] * 3, vocab_size=300)
    write_viewer(path, "tiny", "rlvr", "rollouts", rollouts(1000, 400, 280), tokenizer)
    return path


# The helper functions read what a reader sees.
PROBE = """
const at = (id) => document.getElementById(id);
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const title = () => at("title").textContent.trim();
const counted = () => at("count").textContent;
const choose = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event(id === "find" ? "input" : "change")); };
const rgb = (colour) => {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
  return probe.getImageData(0, 0, 1, 1).data;
};
const over = (top, below) => [0, 1, 2].map((i) => (top[i] * top[3] + below[i] * (255 - top[3])) / 255);
const light = (c) => {
  const [r, g, b] = [...c].slice(0, 3).map((x) => (x / 255 <= 0.03928 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (span) => {
  const card = rgb(getComputedStyle(document.querySelector(".text")).backgroundColor);
  const style = getComputedStyle(span);
  const [a, b] = [light(rgb(style.color)), light(over(rgb(style.backgroundColor), card))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const found = { first: title(), all: counted(), tokens: document.querySelectorAll("#texts span[data-token]").length };
found.painted = {};
found.contrast = 99;
for (const input of document.querySelectorAll("[name=quantity]")) {
  input.click();
  const spans = [...document.querySelectorAll("#texts span[data-token]")];
  found.painted[input.value] = spans.filter((span) => !span.classList.contains("none")).length;
  found.contrast = Math.min(found.contrast, ...spans.map(contrast));
}
const last = document.querySelector("#texts span[data-token='39']");
last.click();
found.token = at("token").textContent;
press("ArrowRight");
found.second = title();
press("k"); press("ArrowLeft");
found.again = title();
choose("verdict", "right");
found.right = counted();
choose("reason", "different");
found.neither = counted();
choose("verdict", "");
found.different = counted();
choose("reason", "");
choose("find", "ROLLOUT/99");
found.searched = counted();
found.shown = title();
const root = document.documentElement;
found.dark = matchMedia("(prefers-color-scheme: dark)").matches;
found.overflow = root.scrollWidth - root.clientWidth;
return found;
"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_rollouts(page: Path, width: int, scheme: str, tmp_path: Path) -> None:
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    found = probed(page, width, tmp_path, PROBE, *dark)
    assert found.pop("contrast") >= 4.5, "WCAG AA"
    token = found.pop("token")
    assert token.endswith("· position 39") and "loss weight 1 · log-prob −" in token and "advantage 1 ·" in token  # fmt: skip
    assert found == {
        "said": "", "overflow": 0, "dark": scheme == "dark", "first": "step 1, rollout/0 ✓", "all": "1,000 of 1,000", "tokens": 40,
        "painted": {"weight": 24, "logp": 24, "advantage": 24, "position": 40},
        "second": f"step 1, rollout/1{HOSTILE} ✗", "again": "step 1, rollout/0 ✓",
        "right": "334 of 1,000", "neither": "0 of 1,000", "different": "333 of 1,000",
        "searched": "11 of 1,000", "shown": "step 2, rollout/99 ✓",
    }  # fmt: skip


@needs_chromium
def test_1000_rollouts_open_in_less_than_two_seconds(page: Path, tmp_path: Path) -> None:
    """From the start of the navigation to the first sample; the least of several, because other programs may run."""
    taken = []
    for attempt in range(5):
        (tmp_path / str(attempt)).mkdir()
        found = probed(page, 1280, tmp_path / str(attempt), "return { ms: Number(document.body.dataset.readyMs) };")  # fmt: skip
        taken.append(found["ms"])
        if found["ms"] < 2000:
            return
    pytest.fail(f"the page took {taken} ms")
