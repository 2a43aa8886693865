"""`phimini clean`: what goes and why, near-duplicates found and counted, the same bytes after any kill, and what a run does with the rows."""

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpus_cases import WORDS, clean, corpus, digests, rows_in

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import read_rows, write_rows
from phimini.stages.cli import main
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.corpus.shards import SCHEMA
from phimini.stages.curate import curate
from phimini.stages.distill import distill
from phimini.stages.report.datasets import trace


def test_every_row_is_kept_with_its_facts_or_dropped_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = corpus(tmp_path)
    out = clean(tmp_path)
    kept, dropped = rows_in(out / "rows"), rows_in(out / "dropped")
    given = [row for path in sorted(source.iterdir()) for row in read_rows(path, {})]
    assert sorted(row["id"] for row in kept + dropped) == sorted(row["id"] for row in given)
    assert [row["id"] for row in kept] == [g["id"] for g in given if g["id"] in {r["id"] for r in kept}], "in order"  # fmt: skip
    reasons = {row["id"]: row["reason"] for row in dropped}
    assert {r.partition(".")[0] for r, why in reasons.items() if why.startswith("held-out")} == {"r101", "r110"}  # fmt: skip
    assert Counter(why.partition(" question ")[0] for why in reasons.values()) == {
        "held-out": 12, "repetition": 78, "near-duplicate of another correct row": 78
    }  # fmt: skip
    one = {row["id"].partition(".")[2]: row for row in kept if row["id"].startswith("r111.")}
    assert len(one) == 4 and len({"right", "near"} & one.keys()) == 1
    row = one["other"]
    assert {key: row[key] for key in ("correct", "verdict", "repetition", "tried", "passed", "licence", "sampling", "seed", "level", "family")} == {
        "correct": True, "verdict": "equal", "repetition": 0.0, "tried": 6, "passed": 4, "licence": "MIT", "sampling": {"temperature": 0.6},
        "seed": 111, "level": 0, "family": "sums"
    }  # fmt: skip
    assert row["origin"] == f"{source}/a.jsonl:{6 * 11 + 4}"
    assert (one["wrong"]["verdict"], one["cut"]["verdict"]) == ("different", "cut off")
    assert all(pq.read_schema(path).equals(SCHEMA) for path in out.rglob("rows/*.parquet"))
    report = read_sealed(out / "report.json")
    assert (report["rows"], report["correct"], report["questions"]) == (312, 156, 78)
    assert report["dropped"]["held-out"]["examples"][0] == {
        "id": "r101.right", "origin": f"{source}/a.jsonl:7", "reason": "held-out question held.jsonl:1", "question": "What is 101 + 303?"
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "held-out 12, near-duplicate of another correct row 78, repetition 78" in said
    assert main(["clean", str(source), str(out), f"heldout={tmp_path / 'held.jsonl'}", "max_repetition=0.5", "shard_mb=0.04", "near.buckets=10", "workers=2"]) == 0  # fmt: skip
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in said.splitlines()[-3:]), "a complete one is only told of"  # fmt: skip


def test_a_quoted_held_out_question_and_one_with_other_numbers_are_found(tmp_path: Path) -> None:
    held = "A train leaves the station at 9 and travels 60 miles an hour towards a town 180 miles away. When does it arrive?"
    questions = {
        "reworded": "A train leaves at 9 from the station towards a town 180 miles away, at 60 miles an hour. When does it get there?",
        "quoted": "Ann has 7 maps. On one of them she reads: a train leaves the  station at $9$ and travels 60 miles an hour towards a "
                  "town. The town has 12 gates, and she walks through 5 of them each day. How many days until she has seen all gates?",
        "numbers": held.replace("180", "240").replace("60", "80"),
        "other": "At 9 in the morning a shop gets 60 boxes with 180 pens. How many pens are in each box?",
    }  # fmt: skip
    rows = [{"id": id, "question": q, "answer": "12", "response": f"{id} \\boxed{{12}}"} for id, q in questions.items()]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "held.jsonl", [{"id": "h", "question": held, "answer": "12"}])
    found = {}
    for name, words in {"plain": ["heldout_words=none"], "default": [], "masked": ["heldout_masked=true"]}.items():  # fmt: skip
        assert main(["clean", str(tmp_path / "rows.jsonl"), str(tmp_path / name), f"heldout={tmp_path / 'held.jsonl'}", "near.remove=false", *words]) == 0  # fmt: skip
        found[name] = {row["id"]: row["reason"] for row in rows_in(tmp_path / name / "dropped")}
    plain = {"reworded": "held-out question h"}
    default = plain | {"quoted": "13 words of held-out question h"}
    assert found == {"plain": plain, "default": default, "masked": default | {"numbers": "other numbers in held-out question h"}}  # fmt: skip


def test_a_run_reads_the_rows_and_a_trace_tells_what_clean_did(tmp_path: Path) -> None:
    corpus(tmp_path)
    out = clean(tmp_path)
    run = override(tiny(), [f"distill.source={out / 'rows'}", f"out={tmp_path / 'run'}", "distill.num_heldout=8", "distill.num_validation=4",
                            "curate.sft_examples=20", "distill.min_pass_rate=0.6"])  # fmt: skip
    data = distill(run)
    curate(run)
    rollouts = read_rows(data / "rollouts.jsonl", {})
    assert Counter(row["verdict"] for row in rollouts) == {"equal": 132, "different": 66, "cut off": 66}  # fmt: skip
    assert len(read_rows(data / "prompts.jsonl", {})) == 66, "4 of 6 are right, of the rows that are left 2 of 4"  # fmt: skip
    id = rollouts[0]["id"]
    lines = trace(run, id)
    assert lines[0].startswith(f"{id}: origin {tmp_path / 'source'}/a.jsonl:") and "licence MIT" in lines[0]  # fmt: skip
    assert lines[1:3] == ["clean: repetition 0.00", "clean: 4 of the question's 6 rollouts are correct"]  # fmt: skip
    assert re.fullmatch(r"distill: line 1 of rollouts.jsonl, correct \(equal\)", lines[3])
    assert trace(run, "r101.cut")[-1] == "clean: left out: held-out question held.jsonl:1"
    assert trace(run, "r120.loop")[1:] == ["clean: repetition 0.94", "clean: left out: repetition"]
    with pytest.raises(ValueError, match="expected the id of a row, got 'r9'"):
        trace(run, "r9")


def test_verdicts_and_drops_are_those_of_the_steps_in_process(tmp_path: Path) -> None:
    """`distill` on the source itself, with the same held-out questions, calls the same functions without datatrove."""
    source = corpus(tmp_path)
    out = clean(tmp_path, "near.remove=false")
    for name in ("rollouts", "validation"):
        write_rows(tmp_path / "sets" / f"{name}.jsonl", [r for p in sorted(source.iterdir()) for r in read_rows(p, {}) if name == "rollouts" or "r111.right" == r["id"]])  # fmt: skip
    for name in ("heldout", "prompts"):
        (tmp_path / "sets" / f"{name}.jsonl").write_bytes((tmp_path / "held.jsonl").read_bytes())
    data = distill(override(tiny(), [f"distill.source={tmp_path / 'sets'}", f"out={tmp_path / 'run'}", "distill.gym_tasks=chain_sum"]))  # fmt: skip
    ours = {row["id"]: row.get("verdict") for row in rows_in(out)}
    theirs = {row["id"]: row["verdict"] for row in read_rows(data / "rollouts.jsonl", {})}
    assert theirs == {id: ours[id] for id in theirs} and len(theirs) == 78 * 6
    held = {row["id"]: row["reason"] for row in read_rows(data / "dropped.jsonl", {})}
    assert {row["id"] for row in rows_in(out / "dropped") if row["reason"].startswith("held-out")} == held.keys()  # fmt: skip


def edited(text: str, rng: random.Random) -> str:
    """Return a text of which a word in a hundred is another, with other spacing and letter case."""
    words = [rng.choice(WORDS) if rng.random() < 0.01 else word for word in text.split()]
    return "  ".join(words).capitalize()


def test_planted_near_duplicates_are_found_and_distinct_rows_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Distinct: other rollouts of a question, equal answers to other questions, questions with other numbers."""
    rng, rows = random.Random(1), []
    for n in range(150):
        text = " ".join(rng.choices(WORDS, k=rng.randint(80, 300)))
        question, end = f"How many coins are {n} bags of {n + 7}?", f" \\boxed{{{n * (n + 7)}}}"
        rows.append({"id": f"{n}.first", "question": question, "answer": str(n * (n + 7)), "response": text + end})  # fmt: skip
        if n % 3 == 0:
            rows.append(rows[-1] | {"id": f"{n}.planted", "response": edited(text, rng) + end})
        other = " ".join(rng.choices(WORDS, k=120))
        rows.append(rows[-1] | {"id": f"{n}.rollout", "response": other + end})
        rows.append({"id": f"{n}.short", "question": f"What is the half of {2 * n + 2000}?", "answer": str(n + 1000), "response": f"It is \\boxed{{{n + 1000}}}."})  # fmt: skip
        rows.append({"id": f"{n}.same", "question": f"What is {900 + n} take away {n + 858}, in words?", "answer": "42", "response": "\\boxed{42}"})  # fmt: skip
    rng.shuffle(rows)
    write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["clean", f"{tmp_path / 'rows.jsonl'}", f"{tmp_path / 'out'}", "shard_mb=0.2"]) == 0
    went = [row["id"] for row in rows_in(tmp_path / "out" / "dropped")]
    of_pairs = [id for id in went if id.partition(".")[2] in ("first", "planted") and int(id.partition(".")[0]) % 3 == 0]  # fmt: skip
    found = {id.partition(".")[0] for id in of_pairs}
    precision, recall = len(of_pairs) / len(went), len(found) / 50
    with capsys.disabled():
        print(f"near-duplicates: precision {precision:.3f}, recall {recall:.3f}")
    assert len(found) == len(of_pairs), "one of each pair stays"
    assert precision == 1.0 and recall >= 0.9


def test_the_same_bytes_after_kills_at_any_point_and_with_any_number_of_workers(
    tmp_path: Path,
) -> None:
    corpus(tmp_path, 120)
    started = time.monotonic()
    whole = digests(clean(tmp_path))
    seconds = time.monotonic() - started
    (tmp_path / "out").rename(tmp_path / "whole")
    rng = random.Random(int(os.environ.get("PYTEST_SEED", time.time())))
    kills = 0
    for k in range(8):
        process = multiprocessing.get_context("fork").Process(target=clean, args=(tmp_path, f"workers={1 + k % 2}"))  # fmt: skip
        process.start()
        process.join(seconds * rng.uniform(0.05, 0.4))
        kills += process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills >= 2, "it ended too soon to be killed"
    clean(tmp_path, "workers=2")
    assert digests(tmp_path / "out") == whole and len(whole) > 8


def test_bad_rows_and_changes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, words = corpus(tmp_path, 8), [str(tmp_path / "source"), str(tmp_path / "out")]
    error = lambda *more: (main(["clean", *words, *more]), capsys.readouterr().err)
    path = source / "a.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"question": "What?", "answer": 3, "response": "4"}\n')
    for workers in ("workers=1", "workers=2"):
        status, said = error("shard_mb=0.01", workers)
        assert status == 2 and said.count("\n") == 1 and f"{path}, line 49, field 'answer': expected a string" in said  # fmt: skip
    status, said = error("shard_mb=0.02")
    assert status == 2 and "was made with shard_mb=0.01, now it is 0.02; use --redo" in said
    path.write_bytes(whole)
    status, said = error("shard_mb=0.01")
    assert status == 2 and f"{path} has changed since" in said
    assert error("shard_mb=0.01", "--redo")[0] == 0
    assert error("executor=slurm") == (2, "phimini: clean: executor=slurm: expected slurm.partition=NAME, got none\n")  # fmt: skip
    monkeypatch.setenv("PATH", "/nowhere")
    assert "found no sbatch on the PATH" in error("executor=slurm", "slurm.partition=cpu")[1]
    words[:] = ["nowhere", "out"]
    assert "source=nowhere: expected a file or folder of rollouts, found none" in error()[1]


def test_without_the_extra_one_sentence_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("datatrove", "phimini.stages.corpus.jobs", "phimini.stages.corpus.blocks"))]:  # fmt: skip
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    import phimini.stages.corpus

    monkeypatch.delattr(phimini.stages.corpus, "jobs", raising=False)
    corpus(tmp_path, 4)
    assert main(["clean", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "phimini: clean: datatrove is not installed; pip install 'phimini[data]'\n"  # fmt: skip
    assert not (tmp_path / "out").exists()
