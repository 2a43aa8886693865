"""Measurements as JSON lines: the rows that every bench writes and `phimini bench compare` reads.

A file holds three kinds of line, each with `schema` and `kind`:

    environment   device, driver, power cap, threads, versions, commit, dirty flag; `id` is a hash of all of it
    row           one provider at one case, measured in the environment whose id it names
    blessing      the reason why rows became a baseline (`phimini bench bless`)

All samples of a case come from one run in which the providers take turns, one sample per round:

    ours, eager = [...], [...]                                  # milliseconds, round by round
    row = Row(bench="kernels", case={"op": "rope", "T": 4096}, provider="phimini", unit="ms", samples=ours,
              reference="eager", reference_samples=eager, peak_bytes=...)
    write(path, [row, ...])

`reference` is another provider of the same work, or a yardstick of the machine such as "gemm". Name one wherever one
exists: a clock that slows both cancels out of the ratio. On a CPU, samples are the process's CPU time and not wall time,
because other processes share the cores.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phimini.bench.gate.environment import Environment, environment, slug_of
from phimini.model.io.json_files import parsed_lines, write_rows

SCHEMA = 2
"""since 2 a row holds its samples round by round"""
BETTER = {"ms": "lower", "cpu_ms": "lower", "bytes": "lower", "tokens/s": "higher", "tokens/cpu_s": "higher",
          "samples/s": "higher", "samples/cpu_s": "higher", "pairs/cpu_s": "higher", "rows/cpu_s": "higher",
          "verdicts/s": "higher"}  # fmt: skip
"""the units, and the better direction of each"""


class SchemaError(ValueError):
    """The rows of a file have another schema than this code writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Quantiles over the rounds of one run."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Band":
        p20, p50, p80 = map(_short, np.quantile(samples, (0.2, 0.5, 0.8)))
        return cls(p20=p20, p50=p50, p80=p80)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One provider at one case; `key` identifies it between runs. ValueError names a field that does not fit.

    Samples are kept to five digits, which is beyond the noise of any clock. An error that is not finite becomes None.
    """

    bench: str
    """the bench's name: kernels, train, rollout, ..."""
    case: dict[str, str | int | float | bool]
    """the inputs: op, pass, dtype, sizes, layout; no measurement"""
    provider: str
    unit: str
    """one of BETTER"""
    correct: bool = True
    """the result was checked in the same run"""
    samples: list[float]
    """one per round; empty where the result is wrong"""
    reference: str | None = None
    reference_samples: list[float] = field(default_factory=list)
    """of the same rounds and in the unit's direction: ms with ms, rate with rate"""
    run_to_run: float = 0.0
    """of a baseline: the relative change of its ratio between the runs that were blessed together"""
    peak_bytes: int | None = None
    error: float | None = None
    """largest error of the check"""
    info: dict[str, Any] = field(default_factory=dict)
    """further facts, which are never compared"""
    environment: Environment | None = None
    """set by `write` and `read`"""

    def __post_init__(self) -> None:
        try:
            for name in ("samples", "reference_samples"):
                object.__setattr__(self, name, _rounded(name, getattr(self, name)))
            self._check()
        except ValueError as problem:
            raise ValueError(f"row {self.bench}, {self.case}, {self.provider}: {problem}") from None
        if self.error is not None and not math.isfinite(self.error):
            object.__setattr__(self, "error", None)

    def _check(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.bench):
            raise ValueError(f"bench: expected a word that can name a file, got {self.bench!r}")
        if not self.key.isprintable():
            raise ValueError(f"expected printable names, got {self.key!a:.60}")
        if self.unit not in BETTER:
            raise ValueError(f"unit: expected one of {list(BETTER)}, got {self.unit!r}")
        rounds, others = len(self.samples), len(self.reference_samples)
        if self.correct != bool(rounds):
            raise ValueError(
                f"expected samples if and only if correct, got {rounds}, correct={self.correct}"
            )
        if self.correct and (self.reference is None) != (not others):
            raise ValueError("expected reference and reference_samples together")
        if others not in (0, rounds):
            raise ValueError(f"reference_samples: expected {rounds} of the same rounds, got {others}")  # fmt: skip
        if not 0 <= self.run_to_run <= 1e3:
            raise ValueError(f"run_to_run: expected a share of at least 0, got {self.run_to_run!r}")

    @property
    def key(self) -> str:
        case = ",".join(f"{k}={self.case[k]}" for k in sorted(self.case))
        return f"{self.bench}:{case}:{self.provider}:{self.unit}"

    @property
    def held(self) -> bool:
        """True if a later run is compared with this row; another project's row without a reference is information."""
        return self.provider == "phimini" or self.reference is not None

    @property
    def ratios(self) -> list[float]:
        """The ratio to the reference, round by round."""
        return [a / b for a, b in zip(self.samples, self.reference_samples, strict=False)]

    @property
    def value(self) -> Band | None:
        return Band.of(self.samples) if self.samples else None

    @property
    def ratio(self) -> Band | None:
        return Band.of(self.ratios) if self.ratios else None


FOR_READERS = ("value", "ratio")
"""properties that a file repeats beside the samples"""


def _rounded(name: str, samples: Iterable[Any]) -> list[float]:
    samples = list(samples)
    numbers = [s for s in samples if isinstance(s, int | float) and not isinstance(s, bool)]
    if len(numbers) < len(samples) or not all(0 < s < 1e300 for s in numbers):
        raise ValueError(f"{name}: expected positive finite numbers, got {samples!s:.60}")
    return [_short(s) for s in numbers]


def _short(number: float) -> float:
    return float(f"{number:.5g}")


# --- files -----------------------------------------------------------------------------------------
def write(
    path: str | Path, rows: Iterable[Row], blessings: Iterable[Mapping[str, Any]] = ()
) -> None:
    """Replace the file, whole or not at all. Rows without an environment get this process's.

    ValueError for two rows with one key: a later run could not tell which one to compare with.
    """
    rows = [r if r.environment else dataclasses.replace(r, environment=environment()) for r in rows]
    keys = [r.key for r in rows]
    if twice := sorted({k for k in keys if keys.count(k) > 1}):
        raise ValueError(f"{path}: expected one row per key, got several of {twice[0]}")
    environments = {r.environment.id: r.environment for r in rows if r.environment}
    lines: list[dict[str, Any]] = [
        {"kind": "environment", "id": id} | dataclasses.asdict(e) for id, e in environments.items()
    ]
    for row in rows:
        assert row.environment is not None
        bands = {n: band and dataclasses.asdict(band) for n in FOR_READERS for band in [getattr(row, n)]}  # fmt: skip
        lines.append({"kind": "row"} | dataclasses.asdict(row) | {"environment": row.environment.id} | bands)  # fmt: skip
    lines += [{"kind": "blessing"} | dict(b) for b in blessings]
    write_rows(path, [{"schema": SCHEMA} | line for line in lines])


def read(path: str | Path) -> list[Row]:
    """Return the rows of a file, each with its environment.

    SchemaError for another schema; ValueError naming file, line, field, the expected and the actual value.
    """
    return read_all(path)[0]


def read_all(path: str | Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return (rows, blessings); errors as in `read`."""
    environments: dict[str, Environment] = {}
    rows: dict[str, Row] = {}
    blessings: list[dict[str, Any]] = []
    for at, line in parsed_lines(Path(path)):
        if not isinstance(line, dict):
            raise ValueError(f"{at}: expected an object, got {line!r:.60}")
        if (schema := line.pop("schema", None)) != SCHEMA:
            text = f"expected {SCHEMA}, got {schema!r}; measure again with this version"
            raise SchemaError(f"{at}: schema: {text}")
        kind, id = line.pop("kind", None), str(line.get("environment"))
        if kind == "environment":
            if not isinstance(id := line.pop("id", None), str):
                raise ValueError(f"{at}, environment, field 'id': expected str, got {id!r:.60}")
            environments[id] = _made(Environment, line, f"{at}, environment")
            if slug_of(environments[id].slug) != environments[id].slug or not environments[id].slug:
                raise ValueError(f"{at}, environment: slug: expected a folder name, got {line['slug']!r}")  # fmt: skip
        elif kind == "row":
            if id not in environments:
                raise ValueError(f"{at}: environment: expected the id of an earlier line, got {id}")
            data = {k: v for k, v in line.items() if k not in FOR_READERS}
            row = _made(Row, data | {"environment": environments[id]}, at)
            if rows.setdefault(row.key, row) is not row:
                raise ValueError(f"{at}: expected one row per key, got several of {row.key}")
        elif kind == "blessing":
            blessings.append(line)
        else:
            raise ValueError(f"{at}: kind: expected environment, row or blessing, got {kind!r}")
    return list(rows.values()), blessings


def _made(cls: Any, data: dict[str, Any], at: str) -> Any:
    """Return `cls(**data)`. ValueError begins with `at` for a missing or unknown field, or one of another type."""
    kinds = typing.get_type_hints(cls)
    if data.keys() != kinds.keys():
        lacks, has = sorted(kinds.keys() - data.keys()), sorted(data.keys() - kinds.keys())
        raise ValueError(f"{at}: expected the fields {list(kinds)}; lacks {lacks}, has {has} too")
    for name, kind in kinds.items():
        optional = type(None) in typing.get_args(kind)
        allowed = [typing.get_origin(k) or k for k in (typing.get_args(kind) if optional else [kind])]  # fmt: skip
        value = data[name]
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in allowed)
            raise ValueError(f"{at}, field {name!r}: expected {wanted}, got {value!r:.60}")
    try:
        return cls(**data)
    except ValueError as problem:
        raise ValueError(f"{at}, {problem}") from None
