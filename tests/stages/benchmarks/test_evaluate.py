"""`phimini evaluate MODEL benchmarks=...`: samples, kills, scores, the page, `compare`, and bad input."""

import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_cases import (
    evaluation_words,
    journalled,
    killed_at,
    log_of_seeds,
    rows,
    write_data,
    write_model,
)
from fault_runs import command

from phimini.model.io.chat import encode_prompt
from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import read_object, write_json
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.benchmarks import evaluate
from phimini.stages.benchmarks.plan import opened, planned
from phimini.stages.benchmarks.questions import BOX
from phimini.stages.cli import main
from phimini.stages.config.options import BenchmarkOptions
from phimini.stages.rollout.dispatch import RolloutError
from phimini.stages.rollout.engine import Sampled
from phimini.stages.run.outputs import write_summary


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_model(folder / "model")
    write_data(folder / "data")
    return folder


def test_killed_twice_it_loses_no_sample_and_asks_none_twice(given: Path, tmp_path: Path) -> None:
    """The last run has two ranks, whose samples are those of one."""
    log, seeds, out = tmp_path / "log", tmp_path / "seeds", tmp_path / "out"
    whole = tmp_path / "whole"
    assert command(evaluation_words(given, whole), log, lambda: log_of_seeds(seeds)) == 0
    of_all = json.loads(seeds.read_text())
    assert len(set(of_all)) == 12
    assert command(evaluation_words(given, out), log, killed_at(5, False, seeds)) == -signal.SIGKILL
    first = journalled(out)
    assert len(first) == 5
    assert command(evaluation_words(given, out), log, killed_at(3, True, seeds)) == -signal.SIGKILL
    asked = json.loads(seeds.read_text())
    assert len(asked) == 7 and set(asked) < set(of_all)
    second = journalled(out)
    assert second[:5] == first and len(second) == 8
    assert not (out / "samples" / "math500.0.jsonl").read_bytes().endswith(b"\n")
    assert (
        command(evaluation_words(given, out, "processes=2"), log, lambda: log_of_seeds(seeds)) == 0
    )
    assert len(json.loads(seeds.read_text())) == 4
    assert len(journalled(out)) == 12 and len(list(out.glob("samples/*"))) == 2
    assert rows(out) == rows(whole)
    results = [read_sealed(folder / "benchmarks.json")["benchmarks"] for folder in (out, whole)]
    assert results[0] == results[1]
    seeds.unlink()
    assert command(evaluation_words(given, out, "k=2"), log, lambda: log_of_seeds(seeds)) == 0
    assert not seeds.exists() and len(rows(out)) == 6, "fewer samples ask for none"
    assert command(evaluation_words(given, out, "k=5"), log, lambda: log_of_seeds(seeds)) == 0
    assert len(json.loads(seeds.read_text())) == 3, "more samples ask for the new ones only"
    assert command(evaluation_words(given, out, "--redo"), log, lambda: log_of_seeds(seeds)) == 0
    assert json.loads(seeds.read_text()) == of_all and rows(out) == rows(whole)


@pytest.mark.parametrize(
    ("word", "field"),
    [("temperature=0.7", "temperature=0.6, now it is 0.7"), ("top_p=0.9", "top_p=0.95, now it is 0.9"), ("seed=1", "seed=0, now it is 1"),
     ("max_new_tokens=13", "max_new_tokens=12, now it is 13"), ("questions=2", "num_questions=3, now it is 2"),
     ("rollout.dtype=bfloat16", "rollout.dtype=auto, now it is bfloat16")],
)  # fmt: skip
def test_a_journal_of_something_else_is_refused_by_its_field(
    word: str, field: str, given: Path, sampled: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert command(evaluation_words(given, sampled, word), log) == 2
    assert f"math500.0.jsonl was made with {field}; use --redo, or another out=" in log.read_text()


@pytest.fixture(scope="module")
def sampled(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sampled") / "out"
    assert command(evaluation_words(given, out), out.with_suffix(".log")) == 0
    return out


def test_a_journal_of_another_model_or_a_damaged_one_is_refused(
    given: Path, sampled: Path, tmp_path: Path
) -> None:
    other, log = tmp_path / "model", tmp_path / "log"
    write_model(other)
    config = read_object(other / "generation_config.json")
    write_json(other / "generation_config.json", config | {"note": 1})
    assert (
        command(
            evaluation_words(given, sampled)[:1]
            + [str(other)]
            + evaluation_words(given, sampled)[2:],
            log,
        )
        == 2
    )
    assert "math500.0.jsonl was made with model.generation_config.json=" in log.read_text()
    path = sampled / "samples" / "math500.0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    try:
        for bad, message in (
            (lines[:2] + lines[1:], r"line 3: Key.* is here a second time: the file is damaged"),
            ([*lines[:3], b'{"a": 1}\n'], r"line 4: expected a sample: .*: the file is damaged"),
            ([*lines[:3], b"[1\n"], r"line 4: malformed JSON"),
        ):
            path.write_bytes(b"".join(bad))
            assert command(evaluation_words(given, sampled), log) == 2
            assert re.search(message, log.read_text())
    finally:
        path.write_bytes(b"".join(lines))


# --- scores, page and comparison, with an engine that answers as it is told ----------------------
def telling(texts: list[str], dies_after: int = 10**9) -> Callable[[], None]:
    """Return a `prepare` whose engine gives these answers, in order, and dies after so many. A text ending in ... is cut off."""

    class Told:
        def load(self, folder: Path) -> None:
            self.tokenizer = Tokenizer.load(folder)

        def generate(self, prompts: Any, params: Any, seeds: Any, arrived: Any) -> None:
            for number, text in enumerate(texts[: len(prompts)]):
                if number == dies_after:
                    raise RolloutError("no vLLM engine is left; 7 of 12 requests are unanswered")
                reason = "length" if text.endswith("...") else "stop"
                ids = self.tokenizer.encode(text) + [self.tokenizer.end_id] * (reason == "stop")
                tokens = np.array(ids, np.int32)
                arrived(number, Sampled(tokens=tokens, logprobs=np.zeros(len(ids), np.float32), finish_reason=reason, versions=()))  # fmt: skip

    def prepare() -> None:
        evaluate.build_engine = lambda *_: Told()  # pyright: ignore[reportAttributeAccessIssue]

    return prepare


BEFORE = [
    *(
        "\\boxed{42}",
        "\\boxed{84/2}",
        "<think>\\boxed{42}</think> I do not know.",
        "\\boxed{41}...",
    ),
    *("\\boxed{71}", "\\boxed{71}", "\\boxed{71.0}", "\\boxed{70}"),
    *("\\boxed{16}", "\\boxed{17}", "\\boxed{16}", "\\boxed{17}"),
]
AFTER = [*["\\boxed{42}"] * 4, *BEFORE[4:8], *["\\boxed{16}"] * 4]


def test_scores_page_and_comparison(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    a, b, log = tmp_path / "sft", tmp_path / "rlvr", tmp_path / "log"
    assert command(evaluation_words(given, a), log, telling(BEFORE)) == 0
    assert command(evaluation_words(given, b), log, telling(AFTER)) == 0
    assert "math500: mean@4 of 3 questions: strict 50.00 [" in log.read_text()
    found = read_sealed(a / "benchmarks.json")["benchmarks"]["math500"]
    assert found["strict"][0] == pytest.approx(6 / 12) and found["lenient"][0] == pytest.approx(8 / 12)  # fmt: skip
    assert 0 < found["strict"][1] < 0.5 < found["strict"][2] < 1
    assert [(p["id"], p["strict"], p["lenient"]) for p in found["problems"]] == [("m/0", 1, 3), ("m/1", 3, 3), ("m/2", 2, 2)]  # fmt: skip
    # 1 - C(4 - c, k) / C(4, k) for c = 1, 3, 2
    assert [found["pass_at"][k]["strict"][0] for k in ("1", "2", "4")] == pytest.approx([0.5, (1 / 2 + 1 + 5 / 6) / 3, 1])  # fmt: skip
    assert found["majority"][0] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert found["truncated"] == pytest.approx(1 / 12)
    assert {verdict: each["n"] for verdict, each in found["tokens"].items()} == {"right": 6, "wrong": 5, "cut off": 1}  # fmt: skip
    assert {name: each["strict"][0] for name, each in found["subjects"].items()} == pytest.approx({"Subject 0": 3 / 8, "Subject 1": 3 / 4})  # fmt: skip
    assert list(found["levels"]) == ["1", "2", "3"]
    sample = rows(a)[1]
    assert (sample["problem"], sample["sample"], sample["extracted"], sample["vote"], sample["strict"], sample["lenient"], sample["reason"]) == (
        "m/0", 1, "84/2", "42", False, True, "not in lowest terms")  # fmt: skip
    page = (b / "benchmarks.html").read_text()
    for text in ("48.13", "31.77", "91.2", "44.51", "57.5", "94.6", "SFT, our rule", "RL, lenient", "3 <small>of 500", "These stages", "by subject", "Level 3"):  # fmt: skip
        assert text in page, text
    assert page.count("66.7") >= 1 and "https://" not in page.split("<script>")[0]
    assert main(["compare", str(a), str(b), "shown=1"]) == 0
    said = capsys.readouterr().out
    assert "strict   50.00 -> 58.33: +8.33 [" in said
    assert "lenient  66.67 -> 58.33: -8.33 [" in said
    assert "changed by our rule: 1 gained, 1 lost, 1 stayed" in said
    assert "0.250 -> 1.000  m/0: " in said and "and 1 more; shown=2 lists them" in said


def test_an_engine_that_dies_keeps_what_is_finished(given: Path, tmp_path: Path) -> None:
    out, log, seeds = tmp_path / "out", tmp_path / "log", tmp_path / "seeds"
    assert (
        command(evaluation_words(given, out, names="gsm8k,math500"), log, telling(BEFORE, 5)) == 1
    )
    last = log.read_text().splitlines()[-1]
    assert last == f"phimini: no vLLM engine is left; 7 of 12 requests are unanswered; the others are in {out}/samples/gsm8k.0.jsonl, and the same command goes on"  # fmt: skip
    assert len(journalled(out)) == 5
    assert (
        command(evaluation_words(given, out, names="gsm8k"), log, lambda: log_of_seeds(seeds)) == 0
    )
    assert len(json.loads(seeds.read_text())) == 7 and len(rows(out, "gsm8k")) == 12


BAD = [
    (["benchmarks="], r"benchmarks: expected one or more of aime24, .*, got none"),
    (["benchmarks=math50"], r"benchmarks: did you mean math500\?"),
    (["k=8", "pass_at=1,16"], r"pass_at=16: math500 needs a k of as many samples, got k=8"),
    (["data=nowhere"], r"data=nowhere: found no file for math500; expected one of math500, "),
    (["max_new_tokens=1000"], r"max_new_tokens=1000: with the longest prompt, of \d+ tokens, that is more than the model's max_positions 512"),
    (["temperature=-1"], r"temperature: expected a number from 0"),
    (["sample=3"], r"evaluate MODEL: unknown 'sample=3'; "),
    (["model=nowhere"], r"nowhere: expected a stage's folder of a run or a Hugging Face folder, found none"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_settings_are_one_sentence(
    more: list[str], message: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = [word for word in evaluation_words(given, tmp_path / "out") if not word.startswith(more[0].split("=")[0] + "=")]  # fmt: skip
    assert main(own + more) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(f"phimini: {message}", said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, r"chat_template: expected the text of a chat template, here or in chat_template.jinja, got None"),
     ("{{ messages | nosuch }}", r"chat_template: TemplateAssertionError: No filter named 'nosuch'"),
     ("{{ messages[0]", r"chat_template: TemplateSyntaxError: ")],
)  # fmt: skip
def test_a_model_without_a_chat_template_is_refused(
    template: str | None, message: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = write_model(tmp_path / "model")
    config = read_object(model / "tokenizer_config.json")
    write_json(model / "tokenizer_config.json", config | {"chat_template": template})
    assert main([*evaluation_words(given, tmp_path / "out"), f"model={model}"]) == 2
    assert re.search(rf"phimini: {model}/tokenizer_config.json: {message}", capsys.readouterr().err)
    (model / "chat_template.jinja").write_text("Q: {{ messages[0]['content'] }} A:")
    done = opened(str(model))
    ids = encode_prompt(done.tokenizer, "What is 1 + 1?", done.template)
    assert done.tokenizer.decode(ids) == "Q: What is 1 + 1? A:"


def test_a_stages_folder_is_a_model_whose_results_lie_in_its_run(
    given: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "run" / "sft"
    write_model(stage / "model")
    write_summary(stage, {"id": "sft"})
    settings = BenchmarkOptions(
        model=str(stage), benchmarks=("gsm8k",), data=f"{given}/data", max_new_tokens=8
    )
    plan = planned(settings)
    assert plan.model.name == "run/sft" and plan.run.out == str(tmp_path / "run" / "benchmarks" / "sft")  # fmt: skip
    assert plan.run.rollout.max_model_len == 8 + max(map(len, plan.asked[0].prompts.values()))
    text = plan.model.tokenizer.decode(plan.asked[0].prompts["gsm8k_test.jsonl:1"])
    assert text == f"<|system|>Your name is Phi, an AI math expert developed by Microsoft.<|end|><|user|>{BOX} What is 17 + 25?<|end|><|assistant|>"  # fmt: skip
    own = planned(replace(settings, model=f"{given}/model"))
    assert own.run.out == "runs/benchmarks/model" and own.model.files == plan.model.files
    with (stage / "model" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"sft/model/model.safetensors: has .* bytes, expected .* the file is damaged"):  # fmt: skip
        planned(settings)


def test_bad_comparisons_are_one_sentence(sampled: Path, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    other = tmp_path / "other"
    assert command(evaluation_words(given, other, "questions=2"), tmp_path / "log") == 0
    for folders, message in (
        ([str(sampled)], r"after: expected text that is not empty"),
        ([str(sampled), "nowhere"], r"nowhere/benchmarks.json: no such file; `phimini evaluate MODEL benchmarks=...` writes it"),
        ([str(sampled), str(other)], r"compare: math500: expected the same questions, got only one with 'Please reason"),
    ):  # fmt: skip
        assert main(["compare", *folders]) == 2
        assert re.search(message, capsys.readouterr().err)
