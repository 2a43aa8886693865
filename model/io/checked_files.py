"""Files whose damage is noticed: JSON objects with a checksum of their own, and descriptions of other files."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phimini.model.io.json_files import dump, read_json, write_json

_CHECKSUM = "sha256"
_BLOCK_BYTES = 1 << 20


def write_sealed(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with the sha256 of it and the file's name as the last field, atomically; errors as in `write_json`."""
    write_json(path, _sealed(content, path))


def read_sealed(path: str | Path) -> dict[str, Any]:
    """Return an object that `write_sealed` wrote, without its checksum.

    Raises ValueError that names the file if a byte of it has changed or it was written under another name, OSError if it
    cannot be read.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: the file is damaged") from error
    whole = {}
    if isinstance(content, dict):
        content.pop(_CHECKSUM, None)
        whole = _sealed(content, path)
    # Byte by byte: 1e5 and 1E5 are one number and two files.
    if Path(path).read_text(encoding="utf-8") != dump(whole, f"{path}", indent=2) + "\n":
        raise ValueError(f"{path}: its content does not match its sha256: the file is damaged")
    return content


def describe_file(path: Path, size: int | None = None) -> dict[str, Any]:
    """Return the `bytes` and `sha256` of a file or of its first `size` bytes, and the `rows` of JSON Lines."""
    digest, rows, read = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        while block := file.read(min(_BLOCK_BYTES, size - read)):
            digest.update(block)
            read += len(block)
            if path.suffix == ".jsonl":
                rows += block.count(b"\n")
    found = {"bytes": read, "sha256": digest.hexdigest()}
    return found | ({"rows": rows} if path.suffix == ".jsonl" else {})


def check_file(
    path: Path, described: Mapping[str, Any], *, content: bool = True, prefix: bool = False
) -> None:
    """Compare a file with the result of `describe_file`. Raises ValueError that names it if it is missing or altered.

    content: False compares the sizes alone if they are equal. prefix: the file may have become longer since.
    """
    if not path.is_file():
        raise ValueError(f"{path}: this file is missing; expected {_amount(described)}")
    if not content and path.stat().st_size == described["bytes"]:
        return
    found = describe_file(path, described["bytes"] if prefix else None)
    if found["bytes"] != described["bytes"]:
        raise ValueError(
            f"{path}: has {_amount(found)}, expected {_amount(described)}: the file is damaged"
        )
    if found["sha256"] != described["sha256"]:
        raise ValueError(
            f"{path}: its content has changed since it was written: expected sha256 "
            f"{described['sha256']:.12}, got {found['sha256']:.12}: the file is damaged"
        )


def _sealed(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    text = f"{Path(path).name}\n{dump(content, f'{path}', indent=2)}"
    return {**content, _CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def _amount(described: Mapping[str, Any]) -> str:
    rows = f" in {described['rows']:,} rows" if "rows" in described else ""
    return f"{described['bytes']:,} bytes{rows}"
