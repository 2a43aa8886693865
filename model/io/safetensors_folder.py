"""Safetensors folders: one file, or shards with an index, read lazily and replaced atomically.

Pickles are never read: a folder that has only pytorch_model.bin is refused. A Llama stores queries, keys and values, and
gate and up apart; they are read as the one tensor that Phi-3 has of each, its rows in this order.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phimini.model.io.json_files import atomic_file, flush_directory, read_object, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FUSED_OF = {part: whole for whole, parts in _FUSED.items() for part in parts}


class TensorFiles(Mapping[str, Tensor]):
    """Tensors of a folder by name, read from disk on access and not kept."""

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        single, index = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        if single.is_file() and index.is_file():
            raise ValueError(
                f"{self.directory}: has both {SINGLE_FILE} and {INDEX_FILE}; expected one of them"
            )
        if not single.is_file() and not index.is_file():
            raise ValueError(
                f"{self.directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither"
            )
        self._opened = {}
        self.file_of: dict[str, str] = {}
        """the file of each tensor; of a fused one, that of its first part"""
        self._parts: dict[str, list[str]] = {}
        if single.is_file():
            self._name(dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE))
            return
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(f, str) for f in weight_map.values()
        ):
            raise ValueError(f"{index}: expected 'weight_map' from tensor names to files")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise ValueError(f"{index}: expected file names in this folder, got {file!r:.100}")
            absent = {n for n, f in weight_map.items() if f == file} - set(self._open(file).keys())
            if absent:
                raise ValueError(
                    f"{self.directory / file}: has no tensor {min(absent)!r:.100}, which {INDEX_FILE} promises"
                )
        self._name(weight_map)

    def _name(self, stored: dict[str, str]) -> None:
        """Name the tensors, with the stored parts of a fused one under one name."""
        self._stored = stored
        for name in stored:
            module, _, last = name.rpartition(".weight")[0].rpartition(".")
            fused, parts = name, [name]
            if last in _FUSED_OF and name.endswith(".weight"):
                fused = f"{module}.{_FUSED_OF[last]}.weight"
                parts = [f"{module}.{part}.weight" for part in _FUSED[_FUSED_OF[last]]]
            if missing := [part for part in parts if part not in stored]:
                raise ValueError(f"{self.directory}: tensor {missing[0]} is missing beside {name}")
            if self._parts.setdefault(fused, parts) != parts:
                raise ValueError(f"{self.directory}: {fused} is stored whole and in parts")
            self.file_of[fused] = stored[parts[0]]

    def _open(self, file: str):
        if file not in self._opened:
            path = self.directory / file
            if not path.is_file():
                raise ValueError(f"{path}: no such file, but {INDEX_FILE} names it")
            try:
                self._opened[file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a whole safetensors file: {error!s:.200}") from error
        return self._opened[file]

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._open(self._stored[part]).get_tensor(part) for part in self._parts[name]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor from the file's header."""
        shapes = [tuple(each.get_shape()) for each in self._slices(name)]
        if len(shapes) == 1:
            return shapes[0]
        # Keys and values, or gate and up, are alike; queries have more rows.
        if shapes[-1] != shapes[-2] or len(shapes[0]) != 2 or shapes[0][1:] != shapes[-1][1:]:
            raise ValueError(
                f"{self.directory}: expected matrices of one width, the last two of one shape, got "
                f"{dict(zip(self._parts[name], shapes, strict=True))}"
            )
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def dtype(self, name: str) -> str:
        """Return the data type of a tensor from the file's header, in safetensors' notation (F32, BF16).

        Parts of several types give all of them, which is none.
        """
        return ", ".join(sorted({each.get_dtype() for each in self._slices(name)}))

    def _slices(self, name: str) -> list[Any]:
        return [self._open(self._stored[part]).get_slice(part) for part in self._parts[name]]


def read_tensors(directory: str | os.PathLike) -> TensorFiles:
    """Open the weights of a folder.

    Raises ValueError that names the file if the folder has no weights, or a file is missing or truncated.
    """
    return TensorFiles(directory)


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    directory: str | os.PathLike,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Stream tensors into one file, or into shards with an index, with at most one shard in memory.

    All files are first written under temporary names, so that a failure or a kill leaves existing weights unchanged.
    Then the old files are deleted and the new ones renamed, the index last, so that no reader sees a mixture. Raises
    OSError that names the file (disk full, no permission).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    names: list[list[str]] = []
    total_bytes = 0
    try:
        for shard in _shards(tensors, max_shard_bytes):
            shards.append(directory / f".tmp-{os.getpid()}-{len(shards)}.safetensors")
            names.append(list(shard))
            total_bytes += sum(t.nbytes for t in shard.values())
            _write_shard(shards[-1], shard)
            del shard  # frees it before the next one is gathered
        if not shards:
            raise ValueError(f"{directory}: no tensors to write")
        single = len(shards) == 1
        files = [
            SINGLE_FILE if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            for i in range(len(shards))
        ]
        for old in [directory / INDEX_FILE, *directory.glob("model*.safetensors")]:
            # os.replace replaces a single file atomically.
            if not (single and old.name == SINGLE_FILE):
                old.unlink(missing_ok=True)
        for temporary, file in zip(shards, files, strict=True):
            temporary.replace(directory / file)
        flush_directory(directory)
        if not single:
            weight_map = {n: file for file, group in zip(files, names, strict=True) for n in group}
            write_json(
                directory / INDEX_FILE,
                {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
            )
    finally:
        for temporary in shards:
            temporary.unlink(missing_ok=True)


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"write_tensors: tensor {name} came twice")
        seen.add(name)
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _write_shard(path: Path, shard: dict[str, Tensor]) -> None:
    """Write a safetensors file: 8 bytes of length, a JSON header, the tensors' bytes.

    The library's writer copies all tensors to Python bytes first, which doubles the memory of an export.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide types first, so that each tensor starts at a multiple of its element size.
    ordered = sorted(shard.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
