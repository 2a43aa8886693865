"""The memory accesses of a kernel in the interpreter: bounds, races between programs, bytes and FLOPs.

A program may not read an element that another program of the same launch writes. Per element of every argument, the
monitor keeps the last program that stored it and the programs that read it. Three cases are races: two programs store the
same element, one reads an element that another stored, one stores an element that another read. On a CPU such a kernel
gives the right value, because programs run one after the other, so a test of values cannot find it. Atomic
read-modify-writes never race with each other.

Out of bounds means outside the argument that the pointer was made from: beyond the end of a tensor, even where another
tensor lies there, and beyond the end of a slice of a larger tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

Access = Literal["load", "store", "atomic"]
SECTOR_BYTES = 32  # what a GPU's L2 moves at least

_NOBODY, _SEVERAL, _ATOMIC = 0, -2, -1


class OutOfBoundsError(IndexError):
    """A kernel touched memory outside its arguments."""


class RaceError(RuntimeError):
    """Two programs of one launch touch the same element, at least one of them with a plain store."""


@dataclass(slots=True, kw_only=True)
class Launch:
    """The requests of one kernel launch to memory and matrix units. Bytes unless named otherwise."""

    kernel: str
    grid: tuple[int, int, int]
    loaded_bytes: int = 0
    stored_bytes: int = 0
    atomic_bytes: int = 0
    unique_loaded_bytes: int = 0
    """each element counted once, as if caches were infinitely large"""
    unique_stored_bytes: int = 0
    load_sectors: int = 0
    """32-byte sectors per load instruction, summed: loaded_bytes / (32 * load_sectors) is the coalescing"""
    store_sectors: int = 0
    dot_flops: int = 0
    bytes_by_argument: dict[str, int] = field(default_factory=dict)

    @property
    def requested_bytes(self) -> int:
        """Return the requested bytes. An atomic counts twice, because it reads and writes."""
        return self.loaded_bytes + self.stored_bytes + 2 * self.atomic_bytes


class _Storage:
    """The last reader and writer of each element of one block of memory; programs are numbered from 1."""

    def __init__(self, base: int, num_bytes: int, item: int) -> None:
        self.base, self.item = base, item
        self.stored_by = np.zeros(num_bytes // item + 1, np.int32)
        self.read_by = np.zeros(num_bytes // item + 1, np.int32)


@dataclass(slots=True)
class Region:
    """The memory of one tensor argument, first byte to one past its last."""

    name: str
    begin: int
    end: int
    storage: _Storage


class MemoryMonitor:
    """Follow the memory accesses of one launch."""

    def __init__(
        self,
        launch: Launch,
        arguments: Iterable[tuple[str, Tensor]],
        races: Literal["raise", "record"],
    ) -> None:
        self.launch = launch
        self.races: set[str] = set()
        self.program: tuple[int, int, int] = (0, 0, 0)
        self._raise_races = races == "raise"
        arguments = [(name, t) for name, t in arguments if t.numel() > 0]
        item = {}
        for _name, t in arguments:
            key = t.untyped_storage().data_ptr()
            item[key] = min(item.get(key, t.element_size()), t.element_size())
        self._storages = {
            t.untyped_storage().data_ptr(): _Storage(
                t.untyped_storage().data_ptr(),
                t.untyped_storage().nbytes(),
                item[t.untyped_storage().data_ptr()],
            )
            for _name, t in arguments
        }
        self.regions = [
            Region(
                name,
                t.data_ptr(),
                t.data_ptr() + _extent_bytes(t),
                self._storages[t.untyped_storage().data_ptr()],
            )
            for name, t in arguments
        ]

    def access(
        self, kind: Access, addresses: np.ndarray, item_bytes: int, region: Region | None
    ) -> None:
        """Record one instruction's `addresses` (int, active lanes only); raise where it is out of bounds."""
        if addresses.size == 0:
            return
        first, last = int(addresses.min()), int(addresses.max())
        region = self._check_bounds(kind, first, last + item_bytes, region)
        self._count(kind, addresses, item_bytes, region.name)
        storage = region.storage
        elements = (addresses - np.uint64(storage.base)).astype(np.int64) // storage.item
        program = self._number(self.program)
        writer, reader = storage.stored_by[elements], storage.read_by[elements]
        if kind == "load":
            foreign = (writer != program) & (writer > _NOBODY)
            self._report(foreign, "reads what another stored", region, elements, writer)
            mixed = (reader != _NOBODY) & (reader != program)
            storage.read_by[elements] = np.where(mixed, _SEVERAL, program)
        elif kind == "store":
            foreign = (writer != program) & (writer != _NOBODY)
            self._report(foreign, "stores what another stored", region, elements, writer)
            foreign = (reader != program) & (reader != _NOBODY)
            self._report(foreign, "stores what another read", region, elements, reader)
            storage.stored_by[elements] = program
        else:
            storage.stored_by[elements] = _ATOMIC

    def check_lanes(self, addresses: np.ndarray, bits: np.ndarray, region: Region | None) -> None:
        """Raise where one store instruction gives an address two values, because it is undefined which lane wins."""
        if addresses.size < 2 or bool(np.all(addresses[1:] > addresses[:-1])):
            return
        order = np.argsort(addresses, kind="stable")
        same = addresses[order][1:] == addresses[order][:-1]
        differs = same & (bits[order][1:] != bits[order][:-1])
        if differs.any():
            name = region.name if region is not None else "?"
            self._race(
                f"write race in {self.launch.kernel} program {self.program}: one store gives an element "
                f"of argument {name!r} {int(differs.sum()) + 1} values"
            )

    def finish(self) -> None:
        for storage in self._storages.values():
            self.launch.unique_loaded_bytes += storage.item * int(np.count_nonzero(storage.read_by))
            self.launch.unique_stored_bytes += storage.item * int(
                np.count_nonzero(storage.stored_by)
            )

    def _check_bounds(self, kind: Access, first: int, end: int, region: Region | None) -> Region:
        if (
            region is None
        ):  # a pointer made from an integer may belong to any argument that contains the access
            region = next((r for r in self.regions if r.begin <= first and end <= r.end), None)
        if region is not None and region.begin <= first and end <= region.end:
            return region
        where = (
            f"argument {region.name!r} has {region.end - region.begin} bytes, "
            f"accessed bytes {first - region.begin} to {end - region.begin}"
            if region is not None
            else f"address {first:#x} lies in no argument"
        )
        raise OutOfBoundsError(
            f"out-of-bounds {kind} in {self.launch.kernel} program {self.program}: {where}"
        )

    def _count(self, kind: Access, addresses: np.ndarray, item_bytes: int, name: str) -> None:
        launch, num_bytes = self.launch, addresses.size * item_bytes
        launch.bytes_by_argument[name] = launch.bytes_by_argument.get(name, 0) + num_bytes
        if kind == "atomic":
            launch.atomic_bytes += num_bytes
            return
        sectors = addresses // np.uint64(SECTOR_BYTES)
        if not bool(np.all(sectors[1:] >= sectors[:-1])):
            sectors = np.sort(sectors)
        num_sectors = 1 + int(np.count_nonzero(sectors[1:] != sectors[:-1]))
        if kind == "load":
            launch.loaded_bytes += num_bytes
            launch.load_sectors += num_sectors
        else:
            launch.stored_bytes += num_bytes
            launch.store_sectors += num_sectors

    def _report(
        self, race: np.ndarray, what: str, region: Region, elements: np.ndarray, other: np.ndarray
    ) -> None:
        if not race.any():
            return
        at = int(np.argmax(race))
        self._race(
            f"race in {self.launch.kernel}: program {self.program} {what} ({self._name(int(other[at]))}): "
            f"argument {region.name!r}, element {int(elements[at])}"
        )

    def _race(self, message: str) -> None:
        if self._raise_races:
            raise RaceError(message)
        self.races.add(message)

    def _number(self, program: tuple[int, int, int]) -> int:
        x, y, z = program
        return 1 + x + self.launch.grid[0] * (y + self.launch.grid[1] * z)

    def _name(self, number: int) -> str:
        if number in (_ATOMIC, _SEVERAL):
            return "an atomic" if number == _ATOMIC else "several programs"
        z, rest = divmod(number - 1, self.launch.grid[0] * self.launch.grid[1])
        y, x = divmod(rest, self.launch.grid[0])
        return f"program {(x, y, z)}"


def _extent_bytes(t: Tensor) -> int:
    """Return the bytes from a tensor's first element to one past its last, without the rest of its storage."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()
