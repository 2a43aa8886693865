"""The rules that choose each stage's rows, and the memory that they take."""

import gc
import multiprocessing
import random
import signal
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import write_rows
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import CurateConfig, override
from phimini.stages.curate import curate, pair_rows
from phimini.stages.data.row_index import RowIndex, index_rows, repetition
from phimini.stages.data.selection import (
    balanced_subset,
    by_question,
    occurrence,
    preference_pairs,
    verified,
    water_fill,
)
from phimini.stages.distill import distill


def index_of(folder: Path, rows: list[dict[str, Any]]) -> RowIndex:
    write_rows(folder / "rollouts.jsonl", rows)
    return index_rows(folder / "rollouts.jsonl", with_repetition=True)


def subset(
    folder: Path, sizes: dict[tuple[str, int], int], rollouts: int = 2, **config: Any
) -> list[dict]:
    """Return the balanced subset of cells of so many rows."""
    rows = [
        {"id": f"{f}{v}-{i}", "problem_id": f"{f}{v}-{i // rollouts}", "family": f, "level": v, "correct": True, "response": str(i)}
        for (f, v), size in sizes.items()
        for i in range(size)
    ]  # fmt: skip
    index = index_of(folder, rows)
    return list(index.rows(balanced_subset(index, verified(index), CurateConfig(**config), seed=1)))


def test_the_subset_is_even_over_families_and_weighted_over_levels(tmp_path: Path) -> None:
    sizes = {(f, v): 100 for f in "abc" for v in (0, 1)}
    chosen = subset(tmp_path, sizes, sft_examples=90, level_weights=(1.0, 2.0))
    assert Counter((r["family"], r["level"]) for r in chosen) == {
        (f, v): 10 * (v + 1) for f in "abc" for v in (0, 1)
    }
    assert len({r["id"] for r in chosen}) == 90


def test_other_questions_come_before_other_rollouts_of_one(tmp_path: Path) -> None:
    chosen = subset(tmp_path, {("a", 0): 100}, sft_examples=50, level_weights=(1.0,))
    assert len({r["problem_id"] for r in chosen}) == 50


def test_a_small_cell_gives_all_it_has_and_others_make_up(tmp_path: Path) -> None:
    sizes = {("a", 0): 4, ("b", 0): 100}
    chosen = subset(tmp_path, sizes, sft_examples=40, level_weights=(1.0,))
    assert Counter(r["family"] for r in chosen) == {"a": 4, "b": 36}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 300))
def test_water_fill_gives_exactly_the_total_that_there_is(sizes: list[int], total: int) -> None:
    cells = dict(enumerate(sizes))
    weights = {cell: 1.0 + cell % 3 for cell in cells}
    quotas = water_fill(cells, weights, total)
    assert sum(quotas.values()) == min(total, sum(sizes))
    assert all(0 <= quotas[cell] <= cells[cell] for cell in cells)


def test_a_level_without_a_weight_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="level_weights has 1 values; a rollout has level 2"):
        subset(tmp_path, {("a", 2): 3}, sft_examples=3, level_weights=(1.0,))


@given(st.lists(st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1]), max_size=30))
def test_rows_are_grouped_and_counted_by_question(values: list[int]) -> None:
    hashes = np.array(values, np.int64)
    groups = [members.tolist() for members in by_question(hashes)]
    expected = [[i for i, v in enumerate(values) if v == value] for value in dict.fromkeys(values)]
    assert groups == expected
    assert occurrence(hashes).tolist() == [values[:i].count(v) for i, v in enumerate(values)]


# --- pairs ----------------------------------------------------------------------------------------
def asked(question: str, *answers: str, right: int) -> list[dict[str, Any]]:
    """Return rollouts of a question, the first `right` of them correct."""
    return [
        {"id": f"{question}/{k}", "problem_id": question, "family": "a", "level": 0, "question": question, "answer": "1",
         "response": f"{text} \\boxed{{{1 if k < right else 2}}}", "correct": k < right}
        for k, text in enumerate(answers)
    ]  # fmt: skip


def pairs_of(folder: Path, rows: list[dict[str, Any]], **config: Any) -> list[dict[str, Any]]:
    index = index_of(folder, rows)
    pairs = preference_pairs(index, CurateConfig(**config), seed=1)
    return list(pair_rows(index, pairs, np.ones(len(pairs), bool)))


def test_pairs_join_a_right_and_a_wrong_rollout_of_one_question(tmp_path: Path) -> None:
    rows = asked("p", "a", "b", "c", right=2) + asked("r", "a", "b", right=2) + asked("s", *"abcde", right=3)  # fmt: skip
    pairs = pairs_of(tmp_path, rows)
    right = {r["id"]: r["correct"] for r in rows}
    assert Counter(p["problem_id"] for p in pairs) == {"p": 1, "s": 2}
    for pair in pairs:
        chosen, rejected = pair["id"].split("|")
        assert right[chosen] and not right[rejected]
        assert chosen[0] == rejected[0] == pair["problem_id"]
    assert len({p["rejected"] for p in pairs}) == 3
    assert len(pairs_of(tmp_path, rows, pairs_per_question=1)) == 2


def test_a_text_counts_once_in_stage_1_and_in_pairs(tmp_path: Path) -> None:
    """But the same text answers another question too."""
    rows = asked("p", "a", "a", "b", "b", "c", right=2) + asked("q", "a", right=1)
    index = index_of(tmp_path, rows)
    assert [row["id"] for row in index.rows(verified(index))] == ["p/0", "q/0"]
    assert [pair["id"] for pair in pairs_of(tmp_path, rows)] == ["p/0|p/2"]
    more = asked("p", "a", "d", "b", "b", right=2)
    assert [pair["id"] for pair in pairs_of(tmp_path, more)] == ["p/0|p/2"]


def test_the_ends_of_a_pair_are_of_similar_length_if_asked_for(tmp_path: Path) -> None:
    words = lambda n: "w" * (n - 10)  # the box has ten characters
    rows = asked("p", words(400), words(100), words(50), words(210), words(100), words(52), right=3)
    lengths = lambda pair: (len(pair["chosen"]), len(pair["rejected"]))
    assert [lengths(p) for p in pairs_of(tmp_path, rows)] == [(400, 210), (100, 100), (50, 52)]
    found = [lengths(p) for p in pairs_of(tmp_path, rows, pair_length_ratio=1.1)]
    assert found == [(50, 52), (100, 100)]


def test_pairs_are_even_over_the_pass_rates_of_their_questions(tmp_path: Path) -> None:
    rows = [row for n in range(30) for row in asked(f"easy{n}", *"abcdefgh", right=7)]
    rows += [row for n in range(5) for row in asked(f"hard{n}", *"abcdefgh", right=1)]
    chosen = pairs_of(tmp_path, rows, pairs=8)
    assert Counter(p["problem_id"][:4] for p in chosen) == {"easy": 4, "hard": 4}
    assert len(pairs_of(tmp_path, rows)) == 35
    assert chosen != pairs_of(tmp_path, rows, pairs=8, pairs_per_question=1)[:7]


def test_a_pair_with_another_verdict_than_before_is_left_out(tmp_path: Path) -> None:
    rows = asked("p", "a", "b", right=1) + asked("q", "a", "b", right=1)
    rows[0]["response"] = "now wrong \\boxed{7}"
    rows[3]["response"] = "now right \\boxed{1}"
    assert pairs_of(tmp_path, rows) == []
    assert len(pairs_of(tmp_path, rows + asked("r", "a", "b", right=1))) == 1


# --- repetition -----------------------------------------------------------------------------------
def test_a_loop_repeats_its_words_and_a_derivation_does_not(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = " ".join(f"step {n}: {rng.randint(1, 99)} + {n} gives" for n in range(60))
    assert repetition(text) == repetition("") == repetition("one two three") == 0.0
    loop = f"{text} " + "wait, let me check this again from the very first line " * 40
    assert 0.5 < repetition(loop) < 0.9
    rows = asked("p", text, loop, "short", f"{loop} no", right=2)
    assert [len(p["chosen"]) for p in pairs_of(tmp_path, rows, max_repetition=0.3)] == [len(text) + 10]  # fmt: skip
    index = index_of(tmp_path, rows)
    kept = balanced_subset(index, verified(index), CurateConfig(max_repetition=0.3), seed=0)
    assert kept.tolist() == [0] and verified(index).tolist() == [0, 1]


# --- streaming ------------------------------------------------------------------------------------
def corpus(path: Path, number: int) -> Path:
    """Write two rollouts each of so many questions, of 2 kB."""
    rng = random.Random(number)
    filler = ["".join(rng.choices("abcdefgh ", k=2000)) for _ in range(50)]
    write_rows(path, (
        {"question": f"Is {n} + {n % 7} odd?", "answer": str(n % 5), "level": n % 3, "id": f"r{n}.{k}",
         "response": f"{k} {filler[n % 50]} \\boxed{{{n % 5 if k == 0 else 9}}}"}
        for n in range(number)
        for k in range(2)
    ))  # fmt: skip
    return path


def peak_bytes(folder: Path, number: int) -> int:
    run = override(tiny(), [f"out={folder / str(number)}", f"distill.source={corpus(folder / f'{number}.jsonl', number)}",
                            "distill.num_heldout=40", "distill.num_validation=20", "distill.num_prompts=40",
                            "curate.sft_examples=500", "curate.pairs=500"])  # fmt: skip
    gc.collect()
    tracemalloc.start()
    distill(run)
    curate(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_grows_by_less_than_100_bytes_a_rollout(tmp_path: Path) -> None:
    """The rows have 2 kB each, and the caches and buffers are full at both sizes."""
    small, large = peak_bytes(tmp_path, 1200), peak_bytes(tmp_path, 4000)
    slope = (large - small) / (2 * 2800)
    print(f"{small / 1e6:.2f} MB, {large / 1e6:.2f} MB: {slope:.1f} bytes a rollout")
    assert slope < 100


def prepare(words: list[str]) -> None:
    run = override(tiny(), words)
    distill(run)
    curate(run)


def test_a_run_that_was_killed_anywhere_gives_the_same_bytes(tmp_path: Path) -> None:
    source = corpus(tmp_path / "given.jsonl", 150)
    words = [f"distill.source={source}", "distill.num_heldout=20", "distill.num_validation=10", "curate.pairs=50"]  # fmt: skip
    began = time.monotonic()
    prepare([*words, f"out={tmp_path / 'whole'}"])
    seconds = time.monotonic() - began
    killed, statuses = [*words, f"out={tmp_path / 'killed'}"], []
    for n in range(6):
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(killed,))
        process.start()
        process.join((n + 0.5) / 6 * seconds)
        process.kill()
        process.join()
        statuses.append(process.exitcode)
    prepare(killed)
    assert statuses.count(-signal.SIGKILL) >= 2, "it was too quick to be killed"
    for stage, sets in {"distill": 5, "curate": 4}.items():
        files = read_sealed(tmp_path / "whole" / stage / "summary.json")["files"]
        assert len(files) == sets and files == read_sealed(tmp_path / "killed" / stage / "summary.json")["files"]  # fmt: skip
