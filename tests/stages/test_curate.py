from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimini.stages.config.schema import CurateConfig
from phimini.stages.curate import balanced_subset, teacher_pairs, water_fill


def rows(sizes: dict[tuple[str, int], int], rollouts: int = 2) -> list[dict]:
    return [
        {
            "id": f"{f}{v}-{i}",
            "problem_id": f"{f}{v}-{i // rollouts}",
            "family": f,
            "level": v,
            "correct": True,
        }
        for (f, v), size in sizes.items()
        for i in range(size)
    ]


def test_the_subset_is_even_over_families_and_weighted_over_levels() -> None:
    sizes = {(f, v): 100 for f in "abc" for v in (0, 1)}
    chosen = balanced_subset(
        rows(sizes), CurateConfig(sft_examples=90, level_weights=(1.0, 2.0)), seed=1
    )
    assert Counter((r["family"], r["level"]) for r in chosen) == {
        (f, v): 10 * (v + 1) for f in "abc" for v in (0, 1)
    }
    assert len({r["id"] for r in chosen}) == 90


def test_other_questions_come_before_other_rollouts_of_one() -> None:
    chosen = balanced_subset(
        rows({("a", 0): 100}), CurateConfig(sft_examples=50, level_weights=(1.0,)), seed=1
    )
    assert len({r["problem_id"] for r in chosen}) == 50


def test_a_small_cell_gives_all_it_has_and_others_make_up() -> None:
    chosen = balanced_subset(
        rows({("a", 0): 4, ("b", 0): 100}),
        CurateConfig(sft_examples=40, level_weights=(1.0,)),
        seed=1,
    )
    assert Counter(r["family"] for r in chosen) == {"a": 4, "b": 36}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 300))
def test_water_fill_gives_exactly_the_total_that_there_is(sizes: list[int], total: int) -> None:
    cells = dict(enumerate(sizes))
    weights = {cell: 1.0 + cell % 3 for cell in cells}
    quotas = water_fill(cells, weights, total)
    assert sum(quotas.values()) == min(total, sum(sizes))
    assert all(0 <= quotas[cell] <= cells[cell] for cell in cells)


def test_a_level_without_a_weight_is_named() -> None:
    with pytest.raises(ValueError, match="level_weights has 1 values; a rollout has level 2"):
        balanced_subset(
            rows({("a", 2): 3}), CurateConfig(sft_examples=3, level_weights=(1.0,)), seed=1
        )


def test_teacher_pairs_join_a_right_and_a_wrong_rollout_of_one_question() -> None:
    rollouts = [
        {"id": f"{q}/{k}", "problem_id": q, "family": "a", "level": 0, "question": q, "answer": "1",
         "response": f"{q}{k}", "correct": right}
        for q, verdicts in {"p": [True, False, True], "r": [True, True], "s": [False, False, True, True, True]}.items()
        for k, right in enumerate(verdicts)
    ]  # fmt: skip
    pairs = teacher_pairs(rollouts)
    right = {r["response"]: r["correct"] for r in rollouts}
    assert Counter(p["problem_id"] for p in pairs) == {"p": 1, "s": 2}
    for pair in pairs:
        assert right[pair["chosen"]]
        assert not right[pair["rejected"]]
        assert pair["chosen"][0] == pair["rejected"][0] == pair["problem_id"]
    assert len({p["rejected"] for p in pairs}) == 3
