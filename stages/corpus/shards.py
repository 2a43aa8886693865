"""The shards of a corpus: parts of the source's files to read, and the one row schema of the Parquet files in between and after.

Fields that other rows may lack, such as those of the source, are in the column `other` as JSON; `layouts` reads them back.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from phimini.model.io.json_files import Row, Span, dump, spans
from phimini.stages.config.cleaning import CleanOptions
from phimini.stages.data.layouts import mapping_of
from phimini.stages.data.own_rows import MAX_LEVELS, files_of, name_in, own_rollouts

_TEXTS = ("id", "origin", "problem_id", "question", "answer", "response", "family", "source", "licence", "teacher", "finish_reason")  # fmt: skip
_ADDED = {
    "correct": pa.bool_(), "verdict": pa.string(), "repetition": pa.float32(), "tried": pa.int32(), "passed": pa.int32(),
    "judge": pa.struct({"model": pa.string(), "verdict": pa.string(), "reason": pa.string(), "verifier": pa.string()}),
    "label": pa.struct({"model": pa.string(), "family": pa.string(), "level": pa.int32()}),
    "reason": pa.string(), "other": pa.string(),
}  # fmt: skip
SCHEMA = pa.schema({**dict.fromkeys(_TEXTS, pa.string()), "level": pa.int32(), **_ADDED})
"""`tried` and `passed`: rollouts of the question, and correct ones. `judge`: verdict right, wrong or, for an invalid reply,
null, and the verifier's. `label`: the model that gave family and level, and those of the source. `reason`: of a dropped row"""


class Shard(NamedTuple):
    """A file, or consecutive lines of one."""

    path: str
    name: str
    """for ids and origins"""
    span: Span | None


def shards_of(source: Path, most_bytes: int) -> list[Shard]:
    """Return the shards of a file or folder. Raises ValueError for an empty folder."""
    shards = []
    for path in files_of(source):
        is_divided = path.suffix == ".jsonl" and path.stat().st_size > most_bytes
        parts = list(spans(path, most_bytes)) if is_divided else [None]
        shards += [Shard(str(path), name_in(source, str(source), path), part) for part in parts]
    return shards


def rows_of(shard: Shard, options: CleanOptions) -> Iterator[Row]:
    """Yield a shard's rollouts. Raises ValueError that names file and line of bad rows, as `own_rollouts`."""
    mapped = mapping_of(options.layout, options.fields)
    licence = {} if options.licence is None else {"licence": options.licence}
    for row in own_rollouts(Path(shard.path), shard.name, MAX_LEVELS, mapped=mapped, span=shard.span):  # fmt: skip
        yield licence | row


def columns(row: Row) -> dict[str, Any]:
    """Return a row's values by the columns of SCHEMA."""
    other = {name: value for name, value in row.items() if name not in SCHEMA.names}
    return {name: row.get(name) for name in SCHEMA.names} | {"other": dump(other, row["id"])}


def read_back(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of SCHEMA; a missing file is empty."""
    if path.exists():
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    other = json.loads(row.pop("other"))
                    yield {name: value for name, value in row.items() if value is not None} | other
