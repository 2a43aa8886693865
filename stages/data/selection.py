"""Rules that choose each stage's rows from an index of verified rollouts. Each one quotes the sentence that it follows.

The sentences are of the model card of Phi-4-mini-reasoning, of arXiv 2503.01743, or of a published summary of arXiv
2504.21233. The numbers are ours: no source gives the sizes of its subsets. `set_aside.py` has the rule of the prompts.
"""

import random
from array import array
from collections.abc import Iterator

import numpy as np

from phimini.stages.config.schema import CurateConfig
from phimini.stages.data.row_index import CORRECT, EMPTY, ENDED, RowIndex

PASS_RATE_BINS = 5
STEPS = ("midtrain", "sft", "chosen", "rejected", "copy", "loop")
"""bits of a row in curate/steps.npy, the lowest first: the sets that it is in, and why it is not in others"""


def verified(index: RowIndex) -> np.ndarray:
    """Return stage 1's rows: all that are correct, each text once.

    "eight distinct solutions (rollouts) were sampled, and only those verified as correct were retained" (model card).
    """
    return distinct(index, index.where(CORRECT))


def balanced_subset(
    index: RowIndex, rows: np.ndarray, config: CurateConfig, seed: int
) -> np.ndarray:
    """Return `sft_examples` of stage 1's rows: equal over families, by `level_weights` over levels, with many questions.

    "compact, yet representative, subset" of the mid-training data, with problems beyond college level (summary of
    2504.21233); "diverse domains and varying difficulty levels" (2503.01743). A cell of family and level with too few rows
    gives all it has; the others add the difference in proportion to their weight. seed: of the random choice within a cell.
    """
    rng = random.Random(seed)
    rows = without_loops(index, rows, config)
    cells = {}
    numbers, firsts = np.unique(index.cells[rows], return_index=True)
    for cell in numbers[np.argsort(firsts)].tolist():  # in the order of appearance
        members = rows[index.cells[rows] == cell]
        rng.shuffle(members)  # pyright: ignore[reportArgumentType]
        turn = occurrence(index.problems[members])
        cells[index.names[cell]] = members[np.argsort(turn, kind="stable")]
    weights = {cell: level_weight(config, cell[1]) for cell in cells}
    sizes = {cell: len(members) for cell, members in cells.items()}
    quotas = water_fill(sizes, weights, config.sft_examples)
    parts = [cells[cell][: quotas[cell]] for cell in sorted(cells, key=str)]
    chosen = np.concatenate([*parts, np.empty(0, np.int64)])
    rng.shuffle(chosen)  # pyright: ignore[reportArgumentType]
    return chosen


def preference_pairs(index: RowIndex, config: CurateConfig, seed: int) -> np.ndarray:
    """Return stage 3's pairs, (pairs, 2): a correct and an incorrect rollout of one question; no text is used twice.

    "we label correct sampled answers as preferred generations and incorrect ones as dis-preferred" (2503.01743); "a balanced
    set of correct and incorrect answers" (model card). An answer that was cut off before its first word is left out. Pairs
    differ in length by at most `pair_length_ratio`, are at most `pairs_per_question` of one question and, if `pairs` limits
    them, equal over the questions' pass rates. seed: of the choice within a pass rate.
    """
    usable = np.flatnonzero((index.flags & EMPTY == 0) | (index.flags & ENDED != 0))
    rows = without_loops(index, distinct(index, usable), config)
    correct = index.flags[rows] & CORRECT != 0
    found, bins = array("q"), array("B")
    for members in by_question(index.problems[rows]):
        right, wrong = rows[members[correct[members]]], rows[members[~correct[members]]]
        if len(right) and len(wrong):
            joined = _joined(index, right, wrong, config.pair_length_ratio)
            joined = joined[: config.pairs_per_question]
            found.extend(joined.ravel())
            # Both kinds are there, so the rate is below 1.
            bins.extend([int(PASS_RATE_BINS * len(right) / len(members))] * len(joined))
    pairs = np.array(found, np.int64).reshape(-1, 2)
    if config.pairs is None or config.pairs >= len(pairs):
        return pairs
    return pairs[_evenly(np.array(bins), config.pairs, seed)]


def _joined(
    index: RowIndex, right: np.ndarray, wrong: np.ndarray, ratio: float | None
) -> np.ndarray:
    """Return pairs (right, wrong) of one question: in order, or by length so that as many as possible keep the ratio."""
    if ratio is None:
        size = min(len(right), len(wrong))
        return np.stack([right[:size], wrong[:size]], 1)
    right, wrong = (side[np.argsort(index.lengths[side], kind="stable")] for side in (right, wrong))
    pairs, i, j = [], 0, 0
    while i < len(right) and j < len(wrong):
        a, b = int(index.lengths[right[i]]), int(index.lengths[wrong[j]])
        if max(a, b) <= ratio * min(a, b):
            pairs.append((right[i], wrong[j]))
            i, j = i + 1, j + 1
        elif a < b:
            i += 1
        else:
            j += 1
    return np.array(pairs, np.int64).reshape(-1, 2)


def _evenly(bins: np.ndarray, total: int, seed: int) -> np.ndarray:
    """Return `total` places in ascending order, as many of each bin as there are or an equal part."""
    rng = random.Random(seed)
    places = {number: np.flatnonzero(bins == number) for number in range(PASS_RATE_BINS)}
    sizes = {number: len(some) for number, some in places.items()}
    quotas = water_fill(sizes, dict.fromkeys(sizes, 1.0), total)
    chosen = [rng.sample(range(sizes[number]), quotas[number]) for number in sizes]
    return np.sort(np.concatenate([places[n][some] for n, some in enumerate(chosen) if some]))


def without_loops(index: RowIndex, rows: np.ndarray, config: CurateConfig) -> np.ndarray:
    """Return the rows whose words repeat at most `max_repetition`.

    Each sample is annotated with the "presence of repetitive patterns" (summary of 2504.21233).
    """
    if config.max_repetition is None:
        return rows
    return rows[index.repetitions[rows] <= 100 * config.max_repetition]


def distinct(index: RowIndex, rows: np.ndarray) -> np.ndarray:
    """Return the rows without later copies of the same response to the same question."""
    return rows[np.sort(np.unique(index.texts[rows], return_index=True)[1])]


def by_question(problems: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the places of each question's rows, the questions in the order of appearance."""
    order = np.argsort(problems, kind="stable")
    ends = np.flatnonzero(np.diff(problems[order], append=~problems[order[-1:]])) + 1
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    for number in np.argsort(order[starts], kind="stable"):
        yield order[starts[number] : ends[number]]


def occurrence(values: np.ndarray) -> np.ndarray:
    """Return for each value how many equal ones are before it."""
    order = np.argsort(values, kind="stable")
    is_first = np.diff(values[order], prepend=~values[order[:1]]) != 0
    places = np.arange(len(values))
    turn = np.empty(len(values), np.int64)
    turn[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return turn


def level_weight(config: CurateConfig, level: int) -> float:
    """Return the weight of a level. Raises ValueError for a level without one."""
    if not 0 <= level < len(config.level_weights):
        raise ValueError(
            f"curate.level_weights has {len(config.level_weights)} values; a rollout has level {level}"
        )
    return config.level_weights[level]


def water_fill(sizes: dict, weights: dict, total: int) -> dict:
    """Return whole-number quotas in proportion to weight, at most each group's size, that add up to min(total, all)."""
    quotas = dict.fromkeys(sizes, 0)
    left = min(total, sum(size for cell, size in sizes.items() if weights[cell] > 0))
    while left:
        open_cells = [cell for cell in sizes if quotas[cell] < sizes[cell] and weights[cell] > 0]
        scale = left / sum(weights[cell] for cell in open_cells)
        given = 0
        for cell in open_cells:
            add = min(int(scale * weights[cell]), sizes[cell] - quotas[cell])
            quotas[cell] += add
            given += add
        if not given:  # fewer left than cells: one each, the heaviest first
            for cell in sorted(open_cells, key=lambda c: (-weights[c], str(c)))[:left]:
                quotas[cell] += 1
                given += 1
        left -= given
    return quotas
