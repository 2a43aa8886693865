"""Examples in rows and batches: best-fit packing, seeded order, equal shares for the data-parallel ranks.

An example becomes its tokens without the last one, each with the next token as its target; positions before
`loss_from` carry no loss. Documents never attend to one another, packed or not.
"""

import hashlib
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TypeVar

import numpy as np

from phimini.model.config import ModelConfig, forward_flops
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import IGNORE, Document, PackedBatch, digest, idle

T = TypeVar("T")


@dataclass(frozen=True, slots=True, init=False, eq=False)
class Example:
    """Token ids of a prompt and its answer; the answer (and its end) starts at `loss_from`."""

    id: str
    tokens: np.ndarray  # int32; of a token set, a view of the file
    loss_from: int

    def __init__(self, id: str, tokens: Sequence[int] | np.ndarray, loss_from: int) -> None:
        object.__setattr__(self, "id", id)
        object.__setattr__(self, "tokens", np.asarray(tokens, dtype=np.int32))
        object.__setattr__(self, "loss_from", loss_from)

    @property
    def inputs(self) -> np.ndarray:
        """The tokens without the last one."""
        return self.tokens[:-1]

    @property
    def targets(self) -> np.ndarray:
        """The next token at each input position, IGNORE in the prompt."""
        targets = self.tokens[1:].copy()
        targets[: max(self.loss_from - 1, 0)] = IGNORE
        return targets

    @property
    def num_targets(self) -> int:
        """The number of positions with a target."""
        return len(self.tokens) - max(self.loss_from, 1)

    def digest(self) -> int:
        """Return a checksum of all that training sees."""
        return digest(self.tokens.tobytes(), self.loss_from)

    def __len__(self) -> int:
        """Return the number of input positions: one fewer than tokens."""
        return len(self.tokens) - 1


def check_lengths(lengths: Sequence[int] | np.ndarray, limit: int, field: str, name: Callable[[int], str]) -> None:  # fmt: skip
    """Raise ValueError for an example of more than `limit` positions.

    field: the setting that the limit comes from. name: of the example at an index, for the message.
    """
    too_long = np.flatnonzero(np.asarray(lengths) > limit)
    if len(too_long):
        first = int(too_long[0])
        raise ValueError(
            f"{name(first)}: {lengths[first]} tokens, but {field} is {limit}; raise it or drop the document"
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Documents in packed rows: row i holds documents[ends[i - 1] : ends[i]]."""

    documents: np.ndarray  # (documents,) int32 indices
    ends: np.ndarray  # (rows,) int64

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ends)

    def __getitem__(self, row: int) -> list[int]:
        """Return the documents of a row, longest first."""
        start = self.ends[row - 1] if row else 0
        return self.documents[start : self.ends[row]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> Rows:
    """Return documents in rows of at most `capacity` tokens: longest first, into the fullest row that fits.

    No document is cut. Best-fit decreasing (arXiv 2404.10830), for all documents of a length at once: of the rows that
    fit, the fullest takes as many of them as it can, before the next.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int32)  # of the documents in that order
    open_rows = _OpenRows(capacity)
    num_rows = at = 0
    for length, count in zip(*(x[::-1].tolist() for x in np.unique(lengths, return_counts=True)), strict=True):  # fmt: skip
        assert 0 < length <= capacity, f"a document has {length} tokens, a row {capacity}"
        while count:
            free, rows = open_rows.take(length)
            each = free // length
            if not len(rows):
                rows = np.arange(num_rows, num_rows - (-count // each), dtype=np.int32)
                num_rows += len(rows)
            used = min(len(rows), -(-count // each))
            placed = min(count, used * each)
            row_of[at : at + placed] = np.repeat(rows[:used], each)[:placed]
            open_rows.put(free - each * length, rows[: used - 1])
            open_rows.put(free - (placed - (used - 1) * each) * length, rows[used - 1 : used])
            open_rows.put(free, rows[used:])
            at, count = at + placed, count - placed
    placing = np.argsort(row_of, kind="stable")
    ends = np.cumsum(np.bincount(row_of, minlength=num_rows))
    return Rows(order[placing].astype(np.int32), ends)


class _OpenRows:
    """Rows with free space, by their free space."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: dict[int, list[np.ndarray]] = defaultdict(list)
        self._has_rows = np.zeros(capacity + 1, bool)

    def put(self, free: int, rows: np.ndarray) -> None:
        if free and len(rows):
            self._rows[free].append(rows)
            self._has_rows[free] = True

    def take(self, least: int) -> tuple[int, np.ndarray]:
        """Return the smallest free space of at least `least` tokens, and all rows that have it, in ascending order.

        Without such rows, the space of a new row and no rows.
        """
        free = least + int(self._has_rows[least:].argmax())
        if not self._has_rows[free]:
            return self._capacity, np.empty(0, np.int32)
        self._has_rows[free] = False
        return free, np.sort(np.concatenate(self._rows.pop(free)), kind="stable")


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
    lengths: Sequence[int],  # of each item, in the unit of `capacity`
    costs: Sequence[float],  # FLOPs of each item
    capacity: int,
    world: World,
    make: Callable[[list[T]], PackedBatch],
) -> list[PackedBatch]:
    """Return this data rank's share of a step's `items`, packed into micro-batches of at most `capacity`.

    The shares are equal in count and nearly in cost. Every data rank gets as many micro-batches: where one needs fewer than
    another, `idle` ones fill the gap, so that collectives stay aligned and the loss per token of the step is unchanged.
    """
    if not items:
        return []
    dealt = [
        [[share[i] for i in sorted(row)] for row in best_fit([lengths[i] for i in share], capacity)]
        for share in shares(costs, world.data_size)
    ]
    mine = dealt[world.data_rank]
    gap = max(map(len, dealt)) - len(mine)
    cheapest = min(range(len(items)), key=lambda i: costs[i])
    filling = [idle(make([items[cheapest]]))] * gap if gap else []
    return [make([items[i] for i in part]) for part in mine] + filling


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
        self._extend(orders, positions.stop)
        return [
            int(orders[position // self.num_items][position % self.num_items])
            for position in positions
        ]

    def batches(self, steps: int) -> np.ndarray:
        """Return the item indices of steps 0 to `steps`, (steps, batch_size) int32."""
        orders: list[np.ndarray] = []
        self._extend(orders, steps * self.batch_size)
        flat = np.concatenate(orders)[: steps * self.batch_size]
        return flat.reshape(steps, self.batch_size)

    def _extend(self, orders: list[np.ndarray], positions: int) -> None:
        """Append epochs until there are so many positions."""
        while len(orders) * self.num_items < positions:
            orders.append(self._order(len(orders), orders[-1] if orders else np.empty(0, np.int32)))

    def _order(self, epoch: int, before: np.ndarray) -> np.ndarray:
        """Return the shuffle of `epoch`.

        Items that the first batch has already, from the end of the epoch `before`, stand after that batch.
        """
        shuffled = array("i", range(self.num_items))  # random's shuffle; numpy's has another order
        random.Random(derive(self.seed, "epoch", epoch)).shuffle(shuffled)
        order = np.frombuffer(shuffled, np.int32)
        missing = -epoch * self.num_items % self.batch_size
        if not missing or self.num_items < self.batch_size:
            return order
        head = order[~np.isin(order, before[missing - self.batch_size :])][:missing]
        return np.concatenate([head, order[~np.isin(order, head)]])


@lru_cache(maxsize=4)
def _orders(num_items: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """Return the list of epochs so far, each of which depends on the one before.

    Kept from step to step: shuffling 64,000 items again takes 20 ms, a quarter of a small model's step.
    """
    return []


def chunks(items: Sequence, size: int) -> list[list]:
    """Return `items` in lists of at most `size`."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


@phase("data")
def documents(examples: Sequence[Example]) -> list[Document]:
    """Return the examples as documents for `pack`."""
    return [Document(tokens=example.inputs, targets=example.targets) for example in examples]
