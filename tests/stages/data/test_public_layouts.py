r"""Files of published data sets: every layout and container gives the same rows, and what is wrong is named.

The rows here are self-made. PHIMINI_DATA_SAMPLES names a folder of the real files.
"""

import json
import os
import resource
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from forked_ranks import run_ranks

from phimini.model.io.json_files import read_rows, write_rows
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.curate import curate
from phimini.stages.data.layouts import mapping_of
from phimini.stages.data.own_rows import own_problems, own_rollouts
from phimini.stages.data.row_fields import is_correct
from phimini.stages.distill import distill
from phimini.stages.run.outputs import sources_of
from phimini.stages.verify.verdict import judge

THOUGHTS = "<|begin_of_thought|>\n\n17 + 25\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nIt is \\boxed{42}.\n\n<|end_of_solution|>"
ASKED = "What is 17 + 25?"
PUBLISHED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "plain": (
        {"question": ASKED, "answer": "42", "response": "\\boxed{42}", "level": "Level 2", "licence": "MIT"},
        [{"question": ASKED, "answer": "42", "response": "\\boxed{42}", "level": 2, "licence": "MIT", "source": "file"}],
    ),
    "openr1_math": (
        {"problem": ASKED, "solution": "$\\boxed{42}$", "answer": "42", "problem_type": "Algebra", "source": "olympiads", "uuid": "u1", "license": "Apache-2.0",
         "is_reasoning_complete": [True, True, False], "generations": ["<think>\nadd\n</think>\n\\boxed{42}", "\\boxed{90}", "<think>\nand"],
         "correctness_math_verify": [False, False, False], "correctness_llama": [True, False, None], "finish_reasons": ["stop", "stop", "length"],
         "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "x"}]},
        [{"id": "u1/0", "problem_id": "u1", "question": ASKED, "answer": "42", "family": "Algebra", "source": "olympiads", "published": True, "licence": "Apache-2.0", "teacher": "DeepSeek-R1",
          "response": "<think>\nadd\n</think>\n\\boxed{42}", "finish_reason": "stop"},
         {"id": "u1/1", "response": "\\boxed{90}", "published": False}, {"id": "u1/2", "finish_reason": "length", "published": False}],
    ),
    "openr1_math without verdicts": (
        {"problem": ASKED, "answer": "42", "generations": ["a", "b"], "is_reasoning_complete": [True, False], "finish_reasons": None},
        [{"response": "a", "problem_id": ASKED, "id": "mine:1"}, {"response": "b", "finish_reason": "length", "id": "mine:1/1"}],
    ),
    "openthoughts": (
        {"problem": ASKED, "deepseek_reasoning": " add ", "deepseek_solution": "It is \\boxed{42}.", "ground_truth_solution": "$\\boxed{42.0}$",
         "domain": "math", "source": "aime"},
        [{"question": ASKED, "answer": "42.0", "response": "<think>\nadd\n</think>\n\nIt is \\boxed{42}.", "family": "math", "source": "aime"}],
    ),
    "openthoughts without truth": (
        {"problem": ASKED, "deepseek_reasoning": "add", "deepseek_solution": "It is \\boxed{42}.", "ground_truth_solution": None},
        [{"answer": "42", "source": "openthoughts"}],
    ),
    "stratos": (
        {"system": "Think.", "conversations": [{"from": "user", "value": f"Return your final response within \\boxed{{}}. {ASKED}"},
                                               {"from": "assistant", "value": THOUGHTS}]},
        [{"question": ASKED, "answer": "42", "response": "<think>\n17 + 25\n</think>\n\nIt is \\boxed{42}.", "source": "conversation"}],
    ),
    "messages": (
        {"messages": [{"role": "system", "content": "Think."}, {"role": "user", "content": ASKED}, {"role": "assistant", "content": "\\boxed{41}"}],
         "answer": "42", "correct": False},
        [{"question": ASKED, "answer": "42", "response": "\\boxed{41}", "published": False}],
    ),
    "gsm8k": (
        {"question": ASKED, "answer": "17 and 25 make <<17+25=42>>42.\n#### 42"},
        [{"question": ASKED, "answer": "42", "response": "17 and 25 make 42.\nThe answer is $\\boxed{42}$.", "source": "gsm8k"}],
    ),
    "math": (
        {"problem": ASKED, "solution": "It is $\\boxed{42}$.", "level": "Level 1", "type": "Algebra"},
        [{"question": ASKED, "answer": "42", "response": "It is $\\boxed{42}$.", "level": 1, "family": "Algebra"}],
    ),
    "aqua_rat": (
        {"question": ASKED, "options": ["A)41", "B)42"], "rationale": "Add them.", "correct": "B"},
        [{"question": f"{ASKED}\n(A) 41\n(B) 42", "answer": "B", "response": "Add them.\nThe answer is $\\boxed{B}$."}],
    ),
}  # fmt: skip


def jsonl(rows: list[dict]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def write(path: Path, rows: list[dict]) -> Path:
    """Write a file of the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        with pyarrow.output_stream(path) as file:  # compresses by the suffix
            file.write(jsonl(rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_becomes_rows_of_ours(name: str, suffix: str, tmp_path: Path) -> None:
    published, want = PUBLISHED[name]
    rows = list(own_rollouts(write(tmp_path / f"a{suffix}", [published]), "mine", 9))
    assert len(rows) == len(want)
    for row, expected in zip(rows, want, strict=True):
        assert expected.items() <= row.items(), (row, expected)
    assert is_correct(rows[0]) == (name not in ("messages", "openr1_math without verdicts"))


def test_other_layouts_are_read_by_paths(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": ASKED}], "reward_model": {"ground_truth": 42}, "out": ["\\boxed{42}", "x"], "gold": ["1", "2"]}  # fmt: skip
    path = write(tmp_path / "a.parquet", [row])
    fields = ["question:prompt.0.content", "answer:reward_model.ground_truth", "response:out.0"]
    (read,) = own_rollouts(path, "mine", 3, mapped=mapping_of("auto", fields))
    assert (read["question"], read["answer"], read["response"]) == (ASKED, "42", "\\boxed{42}")
    (read,) = own_problems(path, mapped=mapping_of("auto", [fields[0], "answer:gold"]))
    assert read["answer"] == "1, 2" and "reward_model" not in read
    with pytest.raises(ValueError, match=r"a.parquet, row 1, field 'prompt.1.content': expected question, got no such field; the row has"):  # fmt: skip
        list(own_problems(path, mapped=mapping_of("auto", ["question:prompt.1.content"])))
    with pytest.raises(ValueError, match=r"distill.fields: expected OUR_FIELD:PATH, got quest:x; did you mean question"):  # fmt: skip
        mapping_of("auto", ["quest:x"])


ROW = {"question": ASKED, "answer": "42", "response": "\\boxed{42}", "note": "é\u2028"}
ENDINGS: dict[str, Callable[[bytes], bytes]] = {
    "no last newline": lambda data: data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n") + b"\r\n",
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data + b"\n",
    "empty lines": lambda data: b"\n" + data.replace(b"\n", b"\n\n") + b"\n\n",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_line_ends_and_byte_order_marks_make_no_difference(
    ending: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    with pyarrow.output_stream(path) as file:
        file.write(ENDINGS[ending](jsonl([ROW, ROW | {"id": 7}])))
    rows = list(own_rollouts(path, "mine", 3))
    assert [row["response"] for row in rows] == [ROW["response"]] * 2
    assert rows[0]["note"] == ROW["note"] and rows[1]["id"] == "7"


BAD: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "latin-1": (b'{"question": "caf\xe9", "answer": "1"}', r"line 3: not UTF-8"),
    "UTF-16": ('{"question": "a"}'.encode("utf-16"), r"line 3: not UTF-8"),
    "no answer": ({"question": ASKED, "response": "x"}, r"line 3, field 'answer': expected a string, got no such field"),
    "no box": ({"problem": ASKED, "solution": "It is 42."}, r"line 3, field 'solution': expected an answer in a closed \\boxed\{\}, got 'It is 42.'"),
    "no ####": ({"question": ASKED, "answer": "42 ####"}, r"line 3, field 'answer': expected a last line '#### N'"),
    "two questions": ({"messages": [{"role": "user", "content": "a"}] * 2}, r"line 3, field 'messages': expected one question and one response, got roles \['user', 'user'\]"),
    "no choice": ({"question": ASKED, "options": ["A)1"], "rationale": "r", "correct": "E"}, r"line 3, field 'correct': expected one of \['A'\], got 'E'"),
    "generations a number": ({"problem": ASKED, "answer": "42", "generations": 1}, r"line 3: expected the layout openr1_math: TypeError"),
    "id used twice": (ROW | {"id": "a"}, r"line 3, field 'id': expected one that no earlier row has, got 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_row_and_field(case: str, tmp_path: Path) -> None:
    given, message = BAD[case]
    line = given if isinstance(given, bytes) else jsonl([given])
    write(
        tmp_path / "a.jsonl.zst", [ROW | {"id": "a"}]
    )  # ids are compared over the files of a folder
    (tmp_path / "b.jsonl").write_bytes(jsonl([ROW, ROW]) + b"\n" + line)
    with pytest.raises(ValueError, match=rf"{tmp_path}/b.jsonl, {message}"):
        list(own_rollouts(tmp_path, "mine", 3))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_cut_or_foreign_file_is_named(suffix: str, tmp_path: Path) -> None:
    rows = [ROW | {"id": n, "note": os.urandom(20).hex()} for n in range(500)]
    path = write(tmp_path / f"a{suffix}", rows)
    assert len(list(own_rollouts(path, "mine", 3))) == 500
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(ValueError, match=rf"{path}: (cannot be decompressed|not readable as Parquet): "):  # fmt: skip
        list(own_rollouts(path, "mine", 3))
    path.write_bytes(b"no such thing\n" * 9)
    with pytest.raises(ValueError, match=rf"{path}: (cannot be decompressed|not readable as Parquet): "):  # fmt: skip
        list(own_rollouts(path, "mine", 3))


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_a_file_is_read_in_constant_memory(suffix: str, tmp_path: Path) -> None:
    rows = [{"question": f"{n} " * 4000, "answer": "1", "id": n} for n in range(5000)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":  # one row group
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, use_dictionary=False)
    else:
        write(path, rows)

    def growth() -> int:
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        next(read := own_problems(path))
        list(islice(read, 100))
        before = peak()
        assert sum(1 for _ in read) == 4899
        return peak() - before

    assert run_ranks(growth, 1)[0] < 32e6  # the texts are 100 MB


def test_a_folder_of_shards_goes_through_distill_and_curate(tmp_path: Path) -> None:
    source = tmp_path / "given"
    rows = [
        {"problem": f"What is {n} + {n}?", "answer": str(2 * n), "uuid": f"u{n}", "generations": [f"\\boxed{{{2 * n}}}", "\\boxed{1}"]}
        for n in range(100, 140)
    ]  # fmt: skip
    write(source / "data" / "train-00000-of-00002.parquet", rows[:20])
    write(source / "data" / "train-00001-of-00002.parquet", rows[20:])
    (source / "README.md").write_text("a card")
    write(source / ".cache" / "half.parquet", rows)
    words = [f"distill.source={source}", f"out={tmp_path / 'run'}", "distill.num_heldout=8", "distill.num_validation=4"]  # fmt: skip
    run = override(tiny(), words)
    distill(run)
    assert [Path(name).name for name in sources_of(run, "distill")] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]  # fmt: skip
    made = read_rows(tmp_path / "run" / "distill" / "rollouts.jsonl", {})
    assert len(made) == 2 * (40 - 12) and {row["source"] for row in made} == {"openr1_math"}
    curate(run)
    assert len(read_rows(tmp_path / "run" / "curate" / "midtrain.jsonl", {})) == 28
    write(source / "data" / "train-00001-of-00002.parquet", rows[30:])
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet has changed since"):
        distill(run)


def test_sets_may_be_of_any_format(tmp_path: Path) -> None:
    source = tmp_path / "given"
    rows = [ROW | {"question": f"What is {n} + 1?", "answer": str(n + 1), "response": f"\\boxed{{{n + 1}}}"} for n in range(200, 230)]  # fmt: skip
    write(source / "rollouts" / "a.jsonl.gz", rows[:10])
    write(source / "rollouts" / "deep" / "b.parquet", rows[10:15])
    write(source / "validation.parquet", rows[15:20])
    write_rows(source / "prompts.jsonl", rows[20:25])
    run = override(tiny(), [f"distill.source={source}", f"out={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=r"distill.source=.*the folder has no set heldout"):
        distill(run)
    write(source / "heldout.jsonl.zst", rows[25:])
    distill(run)
    made = read_rows(tmp_path / "run" / "distill" / "rollouts.jsonl", {})
    assert [row["id"] for row in made[9:11]] == ["rollouts/a.jsonl.gz:10", "rollouts/deep/b.parquet:1"]  # fmt: skip
    write(source / "heldout.parquet", rows[25:])
    with pytest.raises(ValueError, match=r"expected one set heldout, found \['heldout.jsonl.zst', 'heldout.parquet'\]"):  # fmt: skip
        distill(run, redo=True)


# --- real files -----------------------------------------------------------------------------------
SAMPLES = os.environ.get("PHIMINI_DATA_SAMPLES")
needs_samples = pytest.mark.skipif(
    SAMPLES is None, reason="PHIMINI_DATA_SAMPLES names no folder of public sets"
)
COUNTS = {
    "gsm8k_train.jsonl": 7473, "gsm8k_test.jsonl": 1319, "math500.jsonl": 500, "aqua_rat.jsonl": 254,
    "layout_openr1_math.jsonl": 12, "layout_stratos.jsonl": 4,
}  # fmt: skip


@needs_samples
@pytest.mark.parametrize("name", COUNTS)
def test_the_verifier_agrees_with_published_solutions_and_verdicts(name: str) -> None:
    rows = list(own_rollouts(Path(SAMPLES or "") / name, name, 9))
    assert len(rows) == COUNTS[name]
    wrong = [row["id"] for row in rows if is_correct(row) != row.get("published", True)]
    assert not wrong


@needs_samples
def test_the_verifier_agrees_with_a_peer_but_for_one_answer() -> None:
    path, differing = Path(SAMPLES or "") / "math_answers_graded.jsonl", []
    scores = [row["score"] for row in read_rows(path, {"score": list})]
    for k in range(8):
        fields = ["question:question", "answer:gt", "level:level", f"response:code.{k}"]
        rows = own_rollouts(path, "peer", 9, mapped=mapping_of("auto", fields))
        for row, score in zip(rows, scores, strict=True):
            verdict = judge(row["response"], row["answer"])
            if verdict.correct != score[k]:
                differing.append((row["answer"], verdict.extracted))
    assert differing == [("10{,}000", "10000")], "the peer refuses a number without its comma"


@needs_samples
def test_published_parquet_is_read() -> None:
    fields = ["question:prompt.0.content", "answer:reward_model.ground_truth"]
    for name, number in (("math500.parquet", 500), ("aime24.parquet", 480)):
        rows = own_problems(Path(SAMPLES or "") / name, mapped=mapping_of("auto", fields))
        assert len(list(rows)) == number
