"""The way of single rows through the data steps, and the pages of the data sets."""

import json
import re
from pathlib import Path

import pytest

from phimini.model.io.json_files import read_rows, write_json, write_rows
from phimini.stages.cli import main
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.curate import curate
from phimini.stages.distill import distill
from phimini.stages.report.datasets import described, pages, trace
from phimini.stages.report.page import trained_on
from phimini.stages.run.outputs import write_summary

LOOP = "and once more we add the two numbers in this line " * 30


def made(folder: Path):
    rows = [
        {"id": f"r{n}.{kind}", "question": f"What is {n} + {n}?", "answer": str(2 * n), "level": n % 3, "family": "<sums>",
         "license": "MIT", "teacher": "R1", "sampling": {"temperature": 0.6}, "response": response}
        for n in range(100, 140)
        for kind, response in {
            "right": f"so \\boxed{{{2 * n}}}", "copy": f"so \\boxed{{{2 * n}}}", "wrong": "so \\boxed{1}",
            "loop": f"{LOOP}\\boxed{{{2 * n}}}", "cut": "so we",
        }.items()
    ]  # fmt: skip
    write_rows(folder / "given.jsonl", rows)
    words = [f"distill.source={folder / 'given.jsonl'}", f"out={folder / 'run'}", "distill.num_heldout=8", "distill.num_validation=4",
             "curate.max_repetition=0.3", "curate.sft_examples=20", "curate.pairs_per_question=1"]  # fmt: skip
    return override(tiny(), words)


def test_a_row_is_followed_from_its_file_to_the_sets_that_it_is_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path)
    data = distill(run)
    question = read_rows(data / "rollouts.jsonl", {})[0]["id"].partition(".")[0]
    said = lambda kind: "\n".join(trace(run, f"{question}.{kind}"))
    assert said("right").endswith("curate: not run yet")
    curate(run)
    place = 5 * (int(question[1:]) - 100) + 1
    origin = f"{question}.right: origin {tmp_path / 'given.jsonl'}:{place}, source file, licence MIT, teacher R1, sampling"
    assert origin in said("right")
    for kind, expected in {
        "right": r"line \d+ of rollouts.jsonl, correct \(equal\)\ncurate: midtrain: line \d+\ncurate: sft: .*\ncurate: pairs: chosen in QUESTION.right\|QUESTION.wrong",
        "copy": r"correct \(equal\)\ncurate: copy\ncurate: midtrain: not in it\n.*sft: not in it\n.*pairs: not in them",
        "wrong": r"wrong \(different\)\ncurate: midtrain: not in it\n.*sft: not in it\n.*pairs: rejected in QUESTION.right\|QUESTION.wrong",
        "loop": r"correct \(equal\)\ncurate: loop\ncurate: midtrain: line \d+\ncurate: sft: not in it\n.*pairs: not in them",
        "cut": r"wrong \(cut off\)\n",
    }.items():  # fmt: skip
        assert re.search(expected.replace("QUESTION", question), said(kind)), said(kind)
    heldout = read_rows(data / "heldout.jsonl", {})[0]
    (dropped,) = (r for r in read_rows(data / "dropped.jsonl", {}) if r["reason"].endswith(heldout["id"]) and r["id"].endswith(".cut"))  # fmt: skip
    assert trace(run, dropped["id"])[-1] == f"distill: left out: held-out question {heldout['id']}"
    sft = read_rows(tmp_path / "run" / "curate" / "sft.jsonl", {})
    assert "curate: sft: line 3\n" in "\n".join(trace(run, sft[2]["id"]))
    words = ["tiny", f"out={run.out}"]
    capsys.readouterr()
    assert main(["data", "trace", f"{question}.cut", *words]) == 0
    assert capsys.readouterr().out.strip() == said("cut")
    assert main(["data", "trace", "nowhere", *words]) == 2
    assert "expected the id of a row, got 'nowhere'" in capsys.readouterr().err
    assert main(["data", "trace", *words]) == 2
    assert "expected ID RECIPE" in capsys.readouterr().err


def test_a_page_counts_rows_and_drops_and_shows_samples(tmp_path: Path) -> None:
    run = made(tmp_path)
    distill(run)
    with pytest.raises(ValueError, match="data pages: .*curate is not complete"):
        pages(run)
    curate(run)
    read = {path.stem: path.read_text() for path in pages(run)}
    assert sorted(read) == ["midtrain", "pairs", "prompts", "sft"]
    table = lambda name: dict(re.findall(r"<tr><td>([^<]*)</td><td>([\d,]+)</td></tr>", read[name]))
    # 28 questions are trained on, 8 are held out with 5 rows each; of the 4 for validation 2 rows each are wrong.
    assert table("midtrain") == {
        "held-out": "40", "validation, different": "4", "validation, cut off": "4", "wrong, different": "28", "wrong, cut off": "28",
        "copy of another answer": "28",
    }  # fmt: skip
    assert table("sft") == {"loop": "28", "not chosen": "8"}
    assert table("pairs") == {"loop": "28", "copy": "28", "no partner": "28"}
    assert "<dd>56</dd>" in read["midtrain"] and "<dd>20</dd>" in read["sft"]
    assert "file, MIT, R1: 56" in read["midtrain"] and "<sums>" not in read["sft"]
    for page in read.values():
        charts = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]  # fmt: skip
        assert len(charts) >= 2 and all(sum(chart["data"][0]["y"]) > 0 for chart in charts)
        assert page.count('<details class="sample"') == 6


def test_what_was_trained_on_is_kept_until_the_data_is_made_again(tmp_path: Path) -> None:
    run = made(tmp_path)
    distill(run)
    curate(run)
    out = tmp_path / "run"
    sets = described(out)
    assert sets["midtrain"]["facts"]["Rows"] == "56" and sets["sft"]["drops"]["not chosen"] == 8
    (out / "curate" / "sft.jsonl").write_text("")
    assert described(out) == sets, "the files were read again"
    curate(override(run, ["curate.sft_examples=11"]), redo=True)
    assert described(out)["sft"]["facts"]["Rows"] == "11"
    (out / "data" / "sets.json").unlink()
    (out / "curate" / "sft.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"curate/sft\.jsonl: has 0 bytes"):
        described(out)


def test_pairs_of_the_models_own_rollouts_and_the_pool_are_counted(tmp_path: Path) -> None:
    run = made(tmp_path)
    distill(run)
    curate(run)
    out = tmp_path / "run"
    pair = {"id": "a|b", "problem_id": "p", "question": "q", "answer": "1", "chosen": "x" * 9, "rejected": "y"}  # fmt: skip
    write_rows(out / "rollout_dpo" / "pairs.jsonl", [pair])
    rollouts = [{"id": str(n), "correct": n < 3} for n in range(8)]
    write_rows(out / "rollout_dpo" / "rollouts" / "000001.jsonl", rollouts)
    number = len(read_rows(out / "distill" / "prompts.jsonl", {}))
    pool = {"probed": 9, "too_easy": 2, "unfinished": 3, "kept": ["p"]}
    write_json(out / "rlvr" / "pool.json", pool)
    for stage in ("rollout_dpo", "rlvr"):
        write_summary(out / stage, {"id": stage})
    sets = described(out)
    assert sets["pairs"]["facts"]["Rows"] == "1"
    assert sets["pairs"]["drops"] == {"right, in no pair": 2, "wrong, in no pair": 4}
    assert sets["prompts"]["drops"] == {
        "not probed": number - 9, "too easy for stage 3's model": 2, "every answer of the probe cut off": 3,
        "lengths of the answers vary": 3,
    }  # fmt: skip
    (line,) = [each for each in trained_on(out, sets) if each["stage"] == "Rollout DPO"]
    assert line["rows"] == "1" and line["pages"] == {"data set": "data/pairs.html"}
