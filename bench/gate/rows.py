"""Measurements as JSON lines: what every bench writes, and `phimini bench compare` reads.

A file holds three kinds of line, each with `schema` and `kind`:

    environment   device, driver, power cap, threads, versions, commit, dirty flag; `id` is a hash of all of it
    row           one provider at one case, measured in the environment whose id it names
    blessing      why rows became a baseline (`phimini bench bless`)

How a bench uses it (all samples of one case come from one run, providers taking turns, one sample per round):

    ours, eager = [...], [...]                                  # milliseconds, round by round
    row = measured(bench="kernels", case={"op": "rope", "T": 4096}, provider="phimini", unit="ms", samples=ours,
                   reference="eager", reference_samples=eager, peak_bytes=..., info={"gb_s": ...})
    write(path, [row, ...])

`reference` is what the row is held to: another provider of the same work, or a yardstick of the machine such as
"sgemm". A clock that slows both cancels out of `ratio`, so give one wherever one exists. On a CPU samples are
process CPU time, not wall time: other processes take turns with this one.
"""

import dataclasses
import math
import re
import statistics
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phimini.bench.gate.environment import Environment, environment, slug_of
from phimini.model.io.json_files import parsed_lines, write_rows

SCHEMA = 2
"""2: a row has its samples, round by round; 1 had their quantiles only"""
BETTER = {"ms": "lower", "cpu_ms": "lower", "bytes": "lower", "tokens/s": "higher", "tokens/cpu_s": "higher",
          "samples/cpu_s": "higher", "pairs/cpu_s": "higher", "rows/cpu_s": "higher"}  # fmt: skip
"""the units, and which way is better"""
FOR_READERS = ("value", "ratio")
"""what a file says of a row's samples beside them"""


class SchemaError(ValueError):
    """A file whose rows are of another schema than this code writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Quantiles over the rounds of one run."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Band":
        """ValueError for no sample, or one that is not a positive finite number."""
        wrong = [s for s in samples if not (_is_number(s) and 0 < s < math.inf)]
        if wrong or not samples:
            raise ValueError(f"samples: expected positive finite numbers, got {wrong or 'none'}")
        if len(samples) == 1:
            return cls(p20=samples[0], p50=samples[0], p80=samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(p20=fifths[0], p50=statistics.median(samples), p80=fifths[3])


def _is_number(value: object) -> bool:
    """A float, or a whole number that is one: JSON has no limit, a float has."""
    if type(value) is int:
        return abs(value) < 2**1023
    return isinstance(value, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One provider at one case. `key` identifies it between runs."""

    bench: str
    """the verb: kernels, train, rollout, ..."""
    case: dict[str, str | int | float | bool]
    """what was measured: op, pass, dtype, sizes, layout; nothing that was measured"""
    provider: str
    unit: str
    """one of BETTER"""
    correct: bool
    """checked in the same run; a wrong result has no samples"""
    samples: list[float]
    """one per round"""
    reference: str | None = None
    reference_samples: list[float] = field(default_factory=list)
    """of the same rounds; in the unit's direction too: ms to ms, or rate to rate"""
    run_to_run: float = 0.0
    """of a baseline: by what share its ratio moved between the runs that were blessed together"""
    peak_bytes: int | None = None
    error: float | None = None
    """largest error of the check; None: not finite, or no number"""
    info: dict[str, Any] = field(default_factory=dict)
    """anything else worth reading; never compared"""
    environment: Environment | None = None
    """set by `write` and `read`"""

    @property
    def key(self) -> str:
        case = ",".join(f"{k}={self.case[k]}" for k in sorted(self.case))
        return f"{self.bench}:{case}:{self.provider}:{self.unit}"

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def value(self) -> Band | None:
        return Band.of(self.samples) if self.samples else None

    @property
    def ratios(self) -> list[float]:
        """To the reference, round by round."""
        return [a / b for a, b in zip(self.samples, self.reference_samples, strict=False)]

    @property
    def ratio(self) -> Band | None:
        return Band.of(self.ratios) if self.ratios else None


def measured(
    *,
    bench: str,
    case: Mapping[str, str | int | float | bool],
    provider: str,
    unit: str,
    samples: Sequence[float],  # one per round; empty if the result was wrong
    correct: bool = True,
    reference: str | None = None,
    reference_samples: Sequence[float] = (),  # of the same rounds, in the same order
    peak_bytes: int | None = None,
    error: float | None = None,
    info: Mapping[str, Any] | None = None,
) -> Row:
    """A row from its samples. ValueError names the field that does not fit the others."""
    row = Row(
        bench=bench,
        case=dict(case),
        provider=provider,
        unit=unit,
        correct=correct,
        samples=[_rounded(sample) for sample in samples],
        reference=reference,
        reference_samples=[_rounded(sample) for sample in reference_samples],
        peak_bytes=peak_bytes,
        error=error if error is not None and math.isfinite(error) else None,
        info=dict(info or {}),
    )
    _check(row, f"row {bench}, {dict(case)}, {provider}")
    return row


def _rounded(sample: float) -> float:
    """To five digits, which is beyond any clock's noise and keeps files small."""
    return float(f"{sample:.5g}")


def _check(row: Row, at: str) -> None:
    """ValueError for a row that says what none can mean, made here or read from a file."""
    if not re.fullmatch(r"[\w-]+", row.bench):
        raise ValueError(f"{at}: bench: expected a word, which names a file, got {row.bench!r}")
    if not row.key.isprintable():
        raise ValueError(f"{at}: expected names that can be printed, got {row.key!a:.60}")
    if row.unit not in BETTER:
        raise ValueError(f"{at}: unit: expected one of {list(BETTER)}, got {row.unit!r}")
    if row.correct != bool(row.samples):
        raise ValueError(
            f"{at}: expected samples if and only if correct, got {row.num_samples}, correct={row.correct}"
        )
    if (row.reference is None) != (not row.reference_samples) and row.correct:
        raise ValueError(f"{at}: expected reference and reference_samples together")
    if not 0 <= row.run_to_run <= 1e3:
        raise ValueError(f"{at}: run_to_run: expected a share from 0 on, got {row.run_to_run!r}")
    for name in ("samples", "reference_samples"):
        try:
            if values := getattr(row, name):
                Band.of(values)
        except ValueError as problem:
            raise ValueError(f"{at}, {name}: {problem}") from problem
    if len(row.reference_samples) not in (0, len(row.samples)):
        raise ValueError(
            f"{at}, reference_samples: expected {len(row.samples)} of the same rounds, got {len(row.reference_samples)}"
        )


# --- files -----------------------------------------------------------------------------------------
def write(
    path: str | Path, rows: Iterable[Row], blessings: Iterable[Mapping[str, Any]] = ()
) -> None:
    """Replaces the file, whole or not at all. Rows without an environment get this process's.

    ValueError for two rows with one key: nobody could say which one a later run is held to.
    """
    rows = [r if r.environment else dataclasses.replace(r, environment=environment()) for r in rows]
    keys = [r.key for r in rows]
    if twice := sorted({k for k in keys if keys.count(k) > 1}):
        raise ValueError(f"{path}: expected one row per key, got several of {twice[0]}")
    environments = {r.environment.id: r.environment for r in rows if r.environment}
    lines: list[dict[str, Any]] = [
        {"schema": SCHEMA, "kind": "environment", "id": id} | dataclasses.asdict(e)
        for id, e in environments.items()
    ]
    for row in rows:
        assert row.environment is not None
        lines.append(
            {"schema": SCHEMA, "kind": "row"}
            | dataclasses.asdict(row)
            | {name: _plain(getattr(row, name)) for name in FOR_READERS}
            | {"environment": row.environment.id}
        )
    lines += [{"schema": SCHEMA, "kind": "blessing"} | dict(b) for b in blessings]
    write_rows(path, lines)


def _plain(band: Band | None) -> dict[str, float] | None:
    return None if band is None else dataclasses.asdict(band)


def read(path: str | Path) -> list[Row]:
    """The rows of a file, each with its environment.

    SchemaError for another schema; ValueError naming file, line, field, what was expected and what came.
    """
    return read_all(path)[0]


def read_all(path: str | Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """(rows, blessings); errors as in `read`."""
    environments: dict[str, Environment] = {}
    rows: list[Row] = []
    blessings: list[dict[str, Any]] = []
    keys: set[str] = set()
    for at, line in parsed_lines(Path(path)):
        data = _of_our_schema(line, at)
        kind = data.pop("kind", None)
        if kind == "environment":
            id = data.pop("id", None)
            if not isinstance(id, str):
                raise ValueError(f"{at}, environment, field 'id': expected str, got {id!r:.60}")
            here = _made(Environment, data, f"{at}, environment")
            if not here.slug or slug_of(here.slug) != here.slug:
                raise ValueError(
                    f"{at}, environment: slug: expected a folder name, got {here.slug!r}"
                )
            environments[id] = here
        elif kind == "row":
            known = isinstance(data.get("environment"), str)
            if not known or data["environment"] not in environments:
                raise ValueError(
                    f"{at}: environment: expected the id of a line before, got {data.get('environment')!r}"
                )
            data["environment"] = environments[data["environment"]]
            row = _made(Row, {k: v for k, v in data.items() if k not in FOR_READERS}, f"{at}, row")
            _check(row, f"{at}, row")
            if row.key in keys:
                raise ValueError(f"{at}, row: expected one row per key, got several of {row.key}")
            keys.add(row.key)
            rows.append(row)
        elif kind == "blessing":
            blessings.append(data)
        else:
            raise ValueError(f"{at}: kind: expected environment, row or blessing, got {kind!r}")
    return rows, blessings


def _of_our_schema(line: Any, at: str) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise ValueError(f"{at}: expected an object, got {line!r:.60}")
    if line.get("schema") != SCHEMA:
        raise SchemaError(
            f"{at}: schema: expected {SCHEMA}, got {line.get('schema')!r}; measure again with this version"
        )
    return {k: v for k, v in line.items() if k != "schema"}


def _made(cls: Any, data: Any, at: str) -> Any:
    """`cls(**data)`, after every field was found and has a value of its type."""
    if not isinstance(data, dict):
        raise ValueError(f"{at}: expected an object, got {data!r:.60}")
    kinds = typing.get_type_hints(cls)
    if data.keys() != kinds.keys():
        lacks, has = sorted(kinds.keys() - data.keys()), sorted(data.keys() - kinds.keys())
        raise ValueError(
            f"{at}: expected the fields {list(kinds)}; lacks {lacks}, has {has} besides"
        )
    for name, kind in kinds.items():
        allowed = [
            typing.get_origin(k) or k
            for k in (typing.get_args(kind) if _is_union(kind) else (kind,))
        ]
        value = data[name]
        fits = type(value) in allowed or (type(value) is int and float in allowed)
        if not fits:
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in allowed)
            raise ValueError(f"{at}, field {name!r}: expected {wanted}, got {value!r:.60}")
    return cls(**data)


def _is_union(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)
