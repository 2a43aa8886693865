import random

import pytest

from phimini.stages.rl.remedies import (
    advantages,
    is_hard,
    is_too_easy,
    keeps_prompt,
    length_variation,
    next_size,
    rebalance,
    select_uniform_length,
    temperature_at,
)


def test_uniform_length_keeps_the_prompts_that_vary_least() -> None:
    lengths = {"wild": [10, 100], "even": [50, 50], "mild": [40, 60]}
    assert select_uniform_length(lengths, 2 / 3) == ["even", "mild"]
    assert select_uniform_length(lengths, 0.01) == ["even"]
    assert select_uniform_length(lengths, 1.0) == ["even", "mild", "wild"]
    # Spread is relative to length: a long prompt is not punished for being long.
    assert length_variation([100, 200]) == length_variation([10, 20])


def test_a_share_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"keep_share: expected a share in \(0, 1\], got 0"):
        select_uniform_length({"a": [1]}, 0)


def test_rebalance_keeps_all_positives_and_as_many_random_negatives() -> None:
    rewards = [-1.0] * 12 + [1.0, 1.0, 1.0]
    drawn = set()
    for seed in range(50):
        kept = rebalance(rewards, random.Random(seed))
        assert [i for i in kept if rewards[i] > 0] == [12, 13, 14]
        negatives = tuple(i for i in kept if rewards[i] < 0)
        assert len(negatives) == len(set(negatives)) == 3
        drawn.add(negatives)
    assert len(drawn) > 20, "the negatives are drawn at random"


def test_a_rebalanced_group_has_advantages_equal_to_its_rewards() -> None:
    rewards = [-1.0] * 100 + [1.0] * 4
    kept = [rewards[i] for i in rebalance(rewards, random.Random(0))]
    assert advantages(kept) == kept


def test_advantages_have_mean_zero_and_unit_deviation() -> None:
    result = advantages([1.0, -1.0, -1.0, -1.0])
    assert result == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])
    assert advantages([1.0, 1.0]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("positives", "keeps", "hard"),
    [(0, False, True), (1, True, True), (4, True, False), (5, False, False), (8, False, False)],
)
def test_prompts_above_half_right_and_at_zero_are_dropped(
    positives: int, keeps: bool, hard: bool
) -> None:
    rewards = [1.0] * positives + [-1.0] * (8 - positives)
    assert keeps_prompt(rewards, 0.5) is keeps
    assert is_hard(rewards, 8, 0.5) is hard
    assert is_too_easy(rewards, 0.5) is (positives > 4)
    assert is_too_easy(rewards, 1.0) is (positives == 8)


def test_an_oversampled_group_is_hard_until_it_has_the_positives_of_a_first_one() -> None:
    few, enough = [1.0] * 3 + [-1.0] * 61, [1.0] * 4 + [-1.0] * 60
    assert is_hard(few, 8, 0.5) and not is_hard(enough, 8, 0.5)
    assert [next_size(size, 100) for size in (16, 32, 64, 100)] == [32, 64, 100, 100]


def test_temperature_falls_linearly_over_the_first_half_and_stays() -> None:
    schedule = [temperature_at(step, 8, 1.0, 0.6) for step in range(8)]
    assert schedule == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6])
