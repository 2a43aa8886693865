"""Check before a step's first forward that the ranks train on the same data, in one small all-gather.

Each data rank trains on its share of the step's global batch. A rank with another file, verdict or random state would
go unnoticed, because losses and gradients stay finite. If the ranks of one replica differ, the gradients are wrong.
"""

import hashlib
import marshal
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import PackedBatch


class DivergedError(RuntimeError):
    """Error for ranks about to train on different data; raised on every rank before any weight changes."""


def digest(*values: Any) -> int:
    """Return a 64-bit checksum of numbers, strings, None, and lists and tuples of them, equal for equal values."""
    # marshal takes a hundredth of a step. Later versions than 2, and pickle, also encode which objects are shared.
    return _number(hashlib.blake2b(marshal.dumps(values, 2), digest_size=8).digest())


def check_same_data(
    world: World, step: str, items: Any, microbatches: Sequence[PackedBatch] = ()
) -> None:
    """Raise DivergedError on every rank unless all ranks have equal `items`, and a replica equal `microbatches`.

    Collective.

    step: name of the step for the message.
    items: the step's global batch, in types that `digest` accepts.
    microbatches: those of this data rank, still on the CPU. Document fields are not compared, because each rank may
    compute them and round differently.
    """
    if world.world_size == 1:
        return
    with phase("data"):
        several = world.layout.model_size > 1  # ranks of this replica
        mine = [digest(items), _of_tensors(microbatches) if several else 0, world.data_rank]
    with phase("communication"):
        here = torch.tensor(mine, dtype=torch.int64, device=world.device)
        everywhere = [torch.empty_like(here) for _ in range(world.world_size)]
        dist.all_gather(everywhere, here)
        wholes, shares, data_ranks = zip(*torch.stack(everywhere).tolist(), strict=True)
    if len(set(wholes)) > 1:
        raise DivergedError(
            f"{step}: the ranks are about to train on different data: {_sides(enumerate(wholes))}"
        )
    for data_rank in range(world.data_size):
        of_replica = [(r, share) for r, share in enumerate(shares) if data_ranks[r] == data_rank]
        if len({share for _, share in of_replica}) > 1:
            raise DivergedError(
                f"{step}: the ranks of one replica are about to train on different micro-batches: {_sides(of_replica)}"
            )


def _of_tensors(microbatches: Iterable[PackedBatch]) -> int:
    total = hashlib.blake2b(digest_size=8)
    for batch in microbatches:
        named = {"tokens": batch.tokens_T, "targets": batch.targets_T, "cuts": batch.cu_seqlens}
        for name, tensor in sorted((named | batch.fields).items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().numpy().data)
    return _number(total.digest())


def _number(checksum: bytes) -> int:
    return int.from_bytes(checksum, "little", signed=True)


def _sides(of_ranks: Iterable[tuple[int, int]]) -> str:
    """Return the ranks grouped by their data, the smaller groups first: `rank 1 differs from ranks 0, 2`."""
    sides: dict[int, list[str]] = defaultdict(list)
    for rank, value in of_ranks:
        sides[value].append(str(rank))
    ordered = sorted(sides.values(), key=lambda ranks: (len(ranks), -int(ranks[0])))
    texts = [f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for ranks in ordered]
    verb = "differs" if len(ordered[0]) == 1 else "differ"
    return f"{texts[0]} {verb} from {' and from '.join(texts[1:])}"
