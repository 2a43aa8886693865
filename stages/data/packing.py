"""Examples in rows and batches: best-fit packing, seeded order, equal shares for the data-parallel ranks.

An example becomes its tokens without the last one, each with the next token as its target; positions before
`loss_from` carry no loss. Documents never attend to one another, packed or not.
"""

import bisect
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from typing import TypeVar

from phimini.model.config import ModelConfig, forward_flops
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import IGNORE, Document, PackedBatch, digest, idle

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and its answer; the answer (and its end) starts at `loss_from`."""

    id: str
    tokens: list[int]
    loss_from: int

    @property
    def inputs(self) -> list[int]:
        """The tokens without the last one."""
        return self.tokens[:-1]

    @property
    def targets(self) -> list[int]:
        """The next token at each input position, IGNORE in the prompt."""
        skipped = max(self.loss_from - 1, 0)
        return [IGNORE] * skipped + self.tokens[skipped + 1 :]

    @property
    def num_targets(self) -> int:
        """The number of positions with a target."""
        return len(self.tokens) - max(self.loss_from, 1)

    def digest(self) -> int:
        """Return a checksum of all that training sees."""
        return digest(self.tokens, self.loss_from)

    def __len__(self) -> int:
        """Return the number of input positions: one fewer than tokens."""
        return len(self.tokens) - 1


def check_lengths(examples: Sequence[Example], limit: int, field: str) -> None:
    """Raise ValueError for an example longer than `limit` positions; `field` is the setting that the limit comes from."""
    for example in examples:
        if len(example) > limit:
            raise ValueError(
                f"{example.id}: {len(example)} tokens, but {field} is {limit}; raise it or drop the document"
            )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return indices in rows of at most `capacity` tokens: longest first, into the fullest row that fits.

    No document is cut. Best-fit decreasing (arXiv 2404.10830); O(n log n) but for list insertion.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free space, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= capacity, f"document {index} has {length} tokens, a row {capacity}"
        at = bisect.bisect_left(open_rows, (length, -1))
        if at == len(open_rows):
            rows.append([index])
            free, row = capacity - length, len(rows) - 1
        else:
            free, row = open_rows.pop(at)
            rows[row].append(index)
            free -= length
        if free:
            bisect.insort(open_rows, (free, row))
    return rows


def shares(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Return indices dealt into shares of equal count (within one) and nearly equal cost, heaviest first, back and forth."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    dealt: list[list[int]] = [[] for _ in range(num_shares)]
    for start in range(0, len(order), num_shares):
        turn = order[start : start + num_shares]
        if (start // num_shares) % 2:
            turn = turn[::-1] if len(turn) == num_shares else turn
        for share, index in zip(dealt, turn, strict=False):
            share.append(index)
    return dealt


def flops_of(lengths: Sequence[int], config: ModelConfig) -> int:
    """Return the forward FLOPs of these documents in one row; the attention part grows with the squares of the lengths."""
    return forward_flops(config, list(accumulate(lengths, initial=0)))


@phase("data")
def micro_batches(
    items: Sequence[T],
    costs: Sequence[float],  # FLOPs of each item
    size: int,
    world: World,
    make: Callable[[list[T]], PackedBatch],
) -> list[PackedBatch]:
    """Return this data rank's share of a step's `items` in micro-batches of at most `size`, costly items first.

    Every data rank gets as many micro-batches, of nearly equal cost. Where a rank has fewer items than micro-batches,
    `idle` ones fill the gap, so that collectives stay aligned and the loss per token of the step is unchanged.
    """
    if not items:
        return []
    mine = shares(costs, world.data_size)[world.data_rank]
    number = -(-len(items) // (size * world.data_size))
    cheapest = min(range(len(items)), key=lambda i: costs[i])
    return [
        make([items[i] for i in part]) if part else idle(make([items[cheapest]]))
        for part in parts(mine, number)
    ]


def derive(seed: int, *names: str | int) -> int:
    """Return the 63-bit seed of the random stream `names` of run `seed`; equal inputs give equal seeds everywhere.

    Every random choice of a run has a stream of its own, so a new one changes no other.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True)
class EpochSampler:
    """Return the items of a step's global batch; each epoch is its own seeded shuffle.

    An item stands once in a batch, also where two epochs meet in it, unless there are fewer items than `batch_size`.
    A function of (seed, step) alone, so a resumed run needs only its step.
    """

    num_items: int
    batch_size: int
    seed: int

    @phase("data")
    def batch(self, step: int) -> list[int]:
        """Return the item indices of step `step`, counted from 0."""
        first = step * self.batch_size
        positions = range(first, first + self.batch_size)
        orders = _orders(self.num_items, self.batch_size, self.seed)
        while len(orders) * self.num_items < positions.stop:
            orders.append(self._order(len(orders), orders[-1] if orders else []))
        return [
            orders[position // self.num_items][position % self.num_items] for position in positions
        ]

    def _order(self, epoch: int, before: list[int]) -> list[int]:
        """Return the shuffle of `epoch`.

        Items that the first batch has already, from the end of the epoch `before`, stand after that batch.
        """
        order = list(range(self.num_items))
        random.Random(derive(self.seed, "epoch", epoch)).shuffle(order)
        missing = -epoch * self.num_items % self.batch_size
        if not missing or self.num_items < self.batch_size:
            return order
        repeated = set(before[missing - self.batch_size :])
        head = list(islice((item for item in order if item not in repeated), missing))
        first = set(head)
        return head + [item for item in order if item not in first]


@lru_cache(maxsize=4)
def _orders(num_items: int, batch_size: int, seed: int) -> list[list[int]]:
    """Return the list of epochs so far, each of which depends on the one before.

    Kept from step to step: shuffling 64,000 items again takes 20 ms, a quarter of a small model's step.
    """
    return []


def chunks(items: Sequence, size: int) -> list[list]:
    """Return `items` in lists of at most `size`."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def parts(items: Sequence, number: int) -> list[list]:
    """Return `items` in order, in `number` parts of equal count (within one)."""
    cuts = [len(items) * i // number for i in range(number + 1)]
    return [list(items[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


@phase("data")
def documents(examples: Sequence[Example]) -> list[Document]:
    """Return the examples as documents for `pack`."""
    return [Document(tokens=example.inputs, targets=example.targets) for example in examples]
