import bisect
import dataclasses
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_run import rollout_of

from phimini.model.config import preset
from phimini.parallel.training.batch import IGNORE, PackedBatch, idle, pack
from phimini.stages.config.recipes import tiny
from phimini.stages.data import packing
from phimini.stages.data.packing import (
    EpochSampler,
    Example,
    best_fit,
    check_lengths,
    chunks,
    documents,
    flops_of,
    micro_batches,
    shares,
)
from phimini.stages.rlvr import rollout_batches


def test_targets_are_the_next_tokens_of_the_answer_only() -> None:
    example = Example("a", [10, 11, 12, 13, 14], loss_from=3)
    assert example.inputs.tolist() == [10, 11, 12, 13]
    assert example.targets.tolist() == [IGNORE, IGNORE, 13, 14]
    assert len(example) == 4
    assert list(documents([example])[0].targets) == [IGNORE, IGNORE, 13, 14]


def test_loss_on_the_question_trains_every_token_but_the_first() -> None:
    assert Example("a", [10, 11, 12], loss_from=0).targets.tolist() == [11, 12]


@settings(deadline=None)  # a busy machine
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_best_fit_places_every_document_once_within_capacity(lengths: list[int]) -> None:
    rows = best_fit(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert max(totals) <= 50
    # No two rows would fit into one: best fit leaves at most one row under half full.
    assert sum(total <= 25 for total in totals) <= 1


def best_fit_of_lists(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return rows by best-fit decreasing in its plain form, one document at a time."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[i], -1))
        space, row = free.pop(at) if at < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if space > lengths[i]:
            bisect.insort(free, (space - lengths[i], row))
    return rows


@settings(deadline=None)
@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=120))))  # fmt: skip
def test_best_fit_gives_the_rows_of_one_document_at_a_time(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    assert list(best_fit(lengths, capacity)) == best_fit_of_lists(lengths, capacity)


def test_rows_of_log_normal_lengths_are_full_and_no_document_is_split() -> None:
    """Lengths of reasoning traces, in stage 1's rows."""
    lengths = np.random.default_rng(0).lognormal(8.1, 0.8, 100_000).astype(int).clip(20, 16_384)
    rows = best_fit(lengths, 16_384)
    assert np.array_equal(np.sort(rows.documents), np.arange(len(lengths)))
    totals = np.add.reduceat(lengths[rows.documents], np.concatenate([[0], rows.ends[:-1]]))
    assert totals.max() <= 16_384 and lengths.sum() / (len(rows) * 16_384) > 0.97


def test_the_batches_of_all_steps_are_those_of_each() -> None:
    for items, size, steps in ((10, 4, 9), (3, 5, 7), (7, 7, 3)):
        sampler = EpochSampler(items, size, seed=1)
        assert sampler.batches(steps).tolist() == [sampler.batch(step) for step in range(steps)]


def test_best_fit_fills_rows() -> None:
    rows = best_fit([6, 4, 5, 5, 3, 7], 10)
    assert sorted(sorted(row) for row in rows) == [[0, 1], [2, 3], [4, 5]]


def test_a_document_longer_than_the_sequence_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:7: 4 tokens, but sft.sequence_length is 3"):
        check_lengths([3, 4], 3, "sft.sequence_length", lambda i: f"rows.jsonl:{6 + i}")


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


@settings(deadline=None)
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


def of_each_rank(ranks: int, batches_of) -> list[list[PackedBatch]]:
    return [
        batches_of(types.SimpleNamespace(data_size=ranks, data_rank=rank, token_multiple=4))
        for rank in range(ranks)
    ]


@settings(deadline=None)  # pure Python on a busy machine
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(12, 60), st.randoms(use_true_random=False)
)
def test_every_data_rank_has_as_many_micro_batches_and_every_rollout_is_in_one(
    num_rollouts: int, ranks: int, micro: int, random
) -> None:
    """For all (rollouts, ranks, micro), collectives stay aligned, and each rollout's tokens weigh 1 in total."""
    config = dataclasses.replace(tiny().rlvr, sequence_length=12, micro_tokens=micro)
    lengths = [random.randint(1, 9) for _ in range(num_rollouts)]
    rollouts = [
        rollout_of(f"r{k}", [1] * random.randint(1, 4), [100 + k] * n, advantage=1.0)
        for k, n in enumerate(lengths)
    ]
    model = lambda world: types.SimpleNamespace(world=world, num_updates=0, config=preset("tiny"))
    everywhere = of_each_rank(ranks, lambda w: rollout_batches(rollouts, model(w), config))  # pyright: ignore[reportArgumentType]
    numbers = {len(batches) for batches in everywhere}
    of_a_rank = 12 * -(-num_rollouts // ranks)  # tokens, at most
    assert len(numbers) == 1 and numbers.pop() <= 1 + 2 * of_a_rank // micro
    trained, weight = [], 0.0
    for batch in (b for batches in everywhere for b in batches):
        targets = batch.targets_T[batch.targets_T >= 0]
        weight += float(batch.fields["weight"].sum())
        assert len(targets) == int((batch.fields["weight"] != 0).sum())
        assert sum(batch.lengths) <= micro + 3 and batch.num_tokens % 4 == 0
        trained += [token for token in targets.tolist() if token >= 100]
    assert sorted(trained) == [100 + k for k, n in enumerate(lengths) for _ in range(n)]
    assert weight == sum(lengths)


def test_an_idle_micro_batch_is_the_cheapest_item_without_its_loss() -> None:
    examples = [Example(str(n), list(range(n + 1)), 1) for n in (9, 3, 5)]
    costs = [flops_of([len(e)], preset("tiny")) for e in examples]
    make = lambda part: pack(documents(part))
    everywhere = of_each_rank(
        4, lambda world: micro_batches(examples, [1] * 3, costs, 1, world, make)
    )
    assert [[b.lengths for b in batches] for batches in everywhere] == [[[9]], [[5]], [[3]], [[3]]]
    assert [int((batches[0].targets_T >= 0).sum()) for batches in everywhere] == [9, 5, 3, 0]
    assert of_each_rank(2, lambda world: micro_batches([], [], [], 1, world, make)) == [[], []]


def test_idle_keeps_types_and_leaves_its_source_alone() -> None:
    batch = pack(documents([Example("a", [1, 2, 3], 1)]))
    batch.fields["age"], batch.document_fields["weight"] = torch.ones(2, dtype=torch.int64), torch.ones(1)  # fmt: skip
    nothing = idle(batch)
    assert nothing.fields["age"].dtype == torch.int64 and not nothing.fields["age"].any()
    assert not nothing.document_fields["weight"].any() and (nothing.targets_T == IGNORE).all()
    assert batch.targets_T.tolist() == [2, 3] and batch.fields["age"].all()
