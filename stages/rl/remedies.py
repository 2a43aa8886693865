"""The paper's three remedies for unstable RL with a verifiable reward (arXiv 2504.21233), one function each.

1. Prompt optimisation: `select_uniform_length` keeps prompts whose responses have like lengths.
2. Reward rebalancing: `is_hard` prompts are oversampled in rounds; `rebalance` keeps all positives and as many
   random negatives; `keeps_prompt` drops prompts that are too easy, or have no positive.
3. Temperature annealing: `temperature_at`.

The thresholds, round counts and sizes of the rounds are ours; the paper gives "e.g., 50%" for `max_accuracy` and 1.0 to
0.6 over the first half of the steps for the temperature.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np

T = TypeVar("T")


def length_variation(lengths: Sequence[int]) -> float:
    """Return the coefficient of variation: population standard deviation over mean."""
    return float(np.std(lengths) / np.mean(lengths))


def select_uniform_length(lengths: Mapping[T, Sequence[int]], keep_share: float) -> list[T]:
    """Return the `keep_share` of the prompts whose response lengths vary least over all rounds, at least one.

    Raises ValueError for a share outside (0, 1].
    """
    if not 0 < keep_share <= 1:
        raise ValueError(f"keep_share: expected a share in (0, 1], got {keep_share}")
    by_variation = sorted(
        lengths, key=lambda prompt: (length_variation(lengths[prompt]), str(prompt))
    )
    return by_variation[: max(1, round(keep_share * len(by_variation)))] if by_variation else []


def is_hard(rewards: Sequence[float], rollouts_per_prompt: int, max_accuracy: float) -> bool:
    """Return True if a group has fewer positives than `max_accuracy` of its first `rollouts_per_prompt`, oversampled or not."""
    return sum(reward > 0 for reward in rewards) / rollouts_per_prompt < max_accuracy


def next_size(size: int, limit: int) -> int:
    """Return the size to which a hard group of `size` rollouts grows: double, at most `limit`."""
    return min(2 * size, limit)


def is_too_easy(rewards: Sequence[float], max_accuracy: float) -> bool:
    """Return True if more than `max_accuracy` of the answers are right, or all."""
    return accuracy(rewards) > max_accuracy or accuracy(rewards) == 1


def keeps_prompt(rewards: Sequence[float], max_accuracy: float) -> bool:
    """Return True if some answers are right (a signal to learn from) and at most `max_accuracy` of them (not too easy)."""
    return 0 < accuracy(rewards) <= max_accuracy


def rebalance(rewards: Sequence[float], rng: random.Random) -> list[int]:
    """Return the indices of all positives and of as many random negatives, or all if there are fewer."""
    positives = [i for i, reward in enumerate(rewards) if reward > 0]
    negatives = [i for i, reward in enumerate(rewards) if reward <= 0]
    return sorted(positives + rng.sample(negatives, min(len(positives), len(negatives))))


def accuracy(rewards: Sequence[float]) -> float:
    """Return the share of positive rewards."""
    return sum(reward > 0 for reward in rewards) / len(rewards)


def advantages(
    rewards: Sequence[float], form: Literal["normalized", "centered"] = "normalized"
) -> list[float]:
    """Return (r - mean) / std over the group, with the population std, or `centered` r - mean; zeros for equal rewards.

    GRPO, arXiv 2402.03300, and Dr. GRPO, arXiv 2503.20783. A rebalanced group of +1/-1 rewards has mean 0 and std 1, so
    each advantage is its reward.
    """
    std = 1.0 if form == "centered" else float(np.std(rewards))
    if std == 0:
        return [0.0] * len(rewards)
    mean = float(np.mean(rewards))
    return [(reward - mean) / std for reward in rewards]


def temperature_at(step: int, num_steps: int, start: float, end: float) -> float:
    """Return start + (end - start) * min(1, step / (num_steps / 2)); `step` counts from 0."""
    return start + (end - start) * min(1.0, step / (0.5 * num_steps))
