"""Random changes of a Hugging Face folder: config.json, safetensors headers, index, tokenizer files."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz import NUMBERS, OTHERS, fuzz, value
from tokenizer_cases import TINY

from phimini.model.config import ModelConfig
from phimini.model.io.huggingface import load_config, load_reference, save_reference
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.reference import Phi4Mini

SMALL = ModelConfig(
    num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, vocab_size=32, max_positions=64,
    original_max_positions=16, short_factor=(1.0,) * 3, long_factor=(1.0, 2.0, 3.0),
)  # fmt: skip
WORDS = [
    "",
    "x",
    "16",
    "long",
    "short",
    "phi3",
    "longrope",
    "default",
    "gelu",
    "silu",
    "x" * 100_000,
]
ROPE = ["factor", "attention_factor", "rope_theta", "partial_rotary_factor", "rope_type", "zz", "original_max_position_embeddings"]  # fmt: skip
DTYPES = ["F16", "BF16", "F64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "zz", 1, None]
SHAPES: list[Any] = [
    [],
    [0],
    [-1],
    [2**31, 2**31],
    [2**63],
    "x",
    None,
    [1.5],
    [10**30],
    [1] * 10_000,
]
NAMES = ["x", "", "lm_head.weight", "model.layers.9.z", "\u202e", "../x", "a" * 100_000]
FILES = ["model-00001-of-00001.safetensors", "../good/model.safetensors", "/etc/passwd", "", ".", "..", "a\x00b", "x" * 300, "m.safetensors"]  # fmt: skip
LENGTHS = [0, 1, 2**63, 2**64 - 1, 10**9, 100_000_001]
RAW = [b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b"", b"\xff", b'{"num_hidden_layers": ' + b"9" * 5000 + b"}"]  # fmt: skip


def extreme(rng: random.Random) -> Any:
    return rng.choice([rng.choice(NUMBERS), rng.choice(OTHERS), rng.choice(WORDS), value(rng)])


def changed_config(rng: random.Random, config: dict) -> dict:
    for _ in range(rng.randint(1, 3)):
        kind, key = rng.random(), rng.choice(list(config) or ["x"])
        if kind < 0.15:
            config.pop(key, None)
        elif kind < 0.3 and isinstance(rope := config.get("rope_scaling"), dict):
            rope[rng.choice([*rope, *ROPE])] = extreme(rng)
        elif kind < 0.4:
            config[rng.choice(["rope_scaling", "rope_parameters"])] = extreme(rng)
        else:
            config[key] = extreme(rng)
    return config


def changed_header(rng: random.Random, header: dict) -> dict:
    for _ in range(rng.randint(1, 2)):
        key, kind = rng.choice(list(header)), rng.random()
        entry = header[key]
        if kind < 0.15 or not isinstance(entry, dict) or "shape" not in entry:
            header[key] = extreme(rng)
        elif kind < 0.3:
            header[rng.choice(NAMES)] = header.pop(key)
        elif kind < 0.5:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind < 0.7:
            shape = entry["shape"] if isinstance(entry["shape"], list) else []
            entry["shape"] = rng.choice([*SHAPES, shape[::-1], [*shape, 1]])
        else:
            a, b = entry["data_offsets"] if isinstance(entry["data_offsets"], list) else (0, 4)
            entry["data_offsets"] = rng.choice([[b, a], [0, 0], [a, b + 4], [a - 4, b], [2**63, 2**64], [-1, b], [a], "x", None, [a, b, 1]])  # fmt: skip
            return header
    return header


def changed_bytes(rng: random.Random, data: bytes, near: int) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        damaged[rng.randrange(min(len(damaged), near))] ^= 1 << rng.randrange(8)
    return bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])


class Good:
    """A folder that loads, and its parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = Phi4Mini(SMALL)
        model.init_weights(1)
        save_reference(model, folder, stop_ids=(1, 2))
        TINY.save(folder)
        self.weights = (folder / "model.safetensors").read_bytes()
        self.length = int.from_bytes(self.weights[:8], "little")
        self.header = json.loads(self.weights[8 : 8 + self.length])

    def damaged(self, rng: random.Random, to: Path) -> None:
        """Copy the folder with one file changed."""
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.folder, to)
        weights = to / "model.safetensors"
        kind = rng.choice(
            ["json", "json", "raw", "header", "bytes", "length", "index", "tokenizer"]
        )
        name = rng.choice(["config.json", "config.json", "tokenizer_config.json", "tokenizer.json"])
        if kind == "json":
            (to / name).write_text(json.dumps(changed_config(rng, json.loads((to / name).read_text()))))  # fmt: skip
        elif kind == "raw":
            data = (to / name).read_bytes()
            (to / name).write_bytes(rng.choice([*RAW, changed_bytes(rng, data, len(data))]))
        elif kind == "header":
            text = json.dumps(changed_header(rng, json.loads(json.dumps(self.header)))).encode()
            text += b" " * (-len(text) % 8)
            body = self.weights[8 + self.length :]
            weights.write_bytes(len(text).to_bytes(8, "little") + text + body)
        elif kind == "bytes":
            weights.write_bytes(changed_bytes(rng, self.weights, self.length + 58))
        elif kind == "length":
            length = rng.choice([*LENGTHS, self.length - 1, self.length + 1])
            weights.write_bytes(length.to_bytes(8, "little") + self.weights[8:])
        elif kind == "index":
            weights.rename(to / FILES[0])
            index = dict.fromkeys(self.header.keys() - {"__metadata__"}, rng.choice([FILES[0], rng.choice(FILES)]))  # fmt: skip
            if rng.random() < 0.3:
                index[rng.choice(list(index))] = extreme(rng)
            content = rng.choice([{"weight_map": index}, {"weight_map": extreme(rng)}, extreme(rng)])  # fmt: skip
            (to / "model.safetensors.index.json").write_text(json.dumps(content))
        else:
            (to / rng.choice(["special_tokens_map.json", "added_tokens.json"])).write_text(json.dumps(extreme(rng)))  # fmt: skip


@pytest.mark.parametrize(
    "number", [300, pytest.param(5000, marks=pytest.mark.faults)], ids="{:,} folders".format
)
def test_random_folders(number: int, tmp_path: Path) -> None:
    good = Good(tmp_path / "good")

    def case(rng: random.Random) -> str:
        good.damaged(rng, tmp_path / "case")
        load_config(tmp_path / "case")
        load_reference(tmp_path / "case")
        Tokenizer.load(tmp_path / "case").encode("What is 1+1?")
        return "loaded"

    counts = fuzz("folders", number, case)
    assert counts["loaded"] and counts["ValueError"] > number / 3
