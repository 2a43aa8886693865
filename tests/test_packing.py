import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimini.parallel.batch import IGNORE
from phimini.stages import packing
from phimini.stages.packing import (
    EpochSampler,
    Example,
    best_fit,
    check_lengths,
    chunks,
    documents,
    shares,
)


def test_targets_are_the_next_tokens_of_the_answer_only() -> None:
    example = Example("a", [10, 11, 12, 13, 14], loss_from=3)
    assert example.inputs == [10, 11, 12, 13]
    assert example.targets == [IGNORE, IGNORE, 13, 14]
    assert len(example) == 4
    assert documents([example])[0].targets == example.targets


def test_loss_on_the_question_trains_every_token_but_the_first() -> None:
    assert Example("a", [10, 11, 12], loss_from=0).targets == [11, 12]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_best_fit_places_every_document_once_within_capacity(lengths: list[int]) -> None:
    rows = best_fit(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert max(totals) <= 50
    # No two rows would fit into one: best fit leaves at most one row under half full.
    assert sum(total <= 25 for total in totals) <= 1


def test_best_fit_fills_rows() -> None:
    rows = best_fit([6, 4, 5, 5, 3, 7], 10)
    assert sorted(sorted(row) for row in rows) == [[0, 1], [2, 3], [4, 5]]


def test_a_document_longer_than_the_sequence_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:7: 4 tokens, but sft.sequence_length is 3"):
        check_lengths([Example("rows.jsonl:7", [1, 2, 3, 4, 5], 0)], 3, "sft.sequence_length")


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 5))
def test_shares_are_equal_in_count_and_near_in_cost(costs: list[int], num_shares: int) -> None:
    dealt = shares(costs, num_shares)
    assert sorted(i for share in dealt for i in share) == list(range(len(costs)))
    counts = [len(share) for share in dealt]
    assert max(counts) - min(counts) <= 1
    if len(costs) and len(costs) % num_shares == 0:
        totals = [sum(costs[i] for i in share) for share in dealt]
        assert max(totals) - min(totals) <= max(costs)


def test_an_epoch_holds_every_item_once_and_epochs_differ() -> None:
    sampler = EpochSampler(10, 4, seed=3)
    seen = [i for step in range(5) for i in sampler.batch(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert EpochSampler(10, 4, seed=3).batch(2) == sampler.batch(2)
    assert EpochSampler(10, 4, seed=4).batch(0) != sampler.batch(0)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_no_item_stands_twice_in_a_step(num_items: int, batch_size: int, seed: int) -> None:
    sampler = EpochSampler(num_items, batch_size, seed)
    steps = [sampler.batch(step) for step in range(3 * num_items)]
    flat = [i for batch in steps for i in batch]
    for epoch in range(len(flat) // num_items):
        assert sorted(flat[epoch * num_items :][:num_items]) == list(range(num_items))
    if num_items >= batch_size:
        assert all(len(set(batch)) == batch_size for batch in steps)
    packing._orders.cache_clear()
    assert [sampler.batch(step) for step in reversed(range(len(steps)))] == steps[::-1]


def test_a_run_that_resumes_in_a_late_epoch_gets_the_same_batch() -> None:
    ahead = EpochSampler(3, 2, 0).batch(9000)
    packing._orders.cache_clear()
    assert [EpochSampler(3, 2, 0).batch(step) for step in range(9001)][-1] == ahead


def test_chunks() -> None:
    assert chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
