"""Random rows in a user's files: the dry run's check, distill and curate either work or name what is wrong."""

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz import fuzz, text, value

from phimini.model.config import preset
from phimini.stages.config.recipes import recipe_config
from phimini.stages.config.schema import override
from phimini.stages.curate import curate
from phimini.stages.data.own_rows import SETS
from phimini.stages.distill import distill
from phimini.stages.dry_run import check_inputs

FIELDS = ["question", "answer", "response", "problem_id", "id", "family", "level", "source", "finish_reason"]  # fmt: skip
LINES = [b"null", b"[]", b"1", b"NaN", b'{"question": NaN}', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 3000, b"\xef\xbb\xbf{}", b"1" * 5000, b""]  # fmt: skip


def row(rng: random.Random, number: int, share: float) -> dict[str, Any]:
    made = {
        "question": f"Ask {number} for {rng.randint(1, 99)}", "answer": str(rng.randint(1, 3)), "problem_id": f"p{number}",
        "response": f"so \\boxed{{{rng.choice('123')}}}", "id": f"q{number}", "family": "f", "level": rng.randint(0, 2),
    }  # fmt: skip
    if rng.random() < share:
        for field in rng.choices(FIELDS, k=rng.randint(1, 3)):
            if rng.random() < 0.2:
                made.pop(field, None)
            else:
                made[field] = value(rng)
    if rng.random() < share / 3:
        made[text(rng)] = value(rng)
    return made


def line(rng: random.Random, number: int, share: float) -> bytes:
    """Return a row as JSON, with a bad one at a probability of about `share`."""
    written = json.dumps(row(rng, number, share), ensure_ascii=rng.random() < 0.5)
    data = written.encode("utf8", "surrogatepass")
    kind = rng.random() / max(share, 1e-9)
    if kind < 0.05:
        return data[: rng.randrange(len(data) + 1)]
    if kind < 0.1:
        return bytes(c ^ (1 << rng.randrange(8)) if rng.random() < 0.02 else c for c in data)
    return rng.choice(LINES) if kind < 0.15 else data


@pytest.mark.parametrize(
    "number", [400, pytest.param(20_000, marks=pytest.mark.faults)], ids="{:,} rows".format
)
def test_random_rows(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power cuts here
    rows = 0

    def file(rng: random.Random, path: Path, most: int) -> None:
        nonlocal rows
        share = rng.choice((0, 0.02, 0.2))
        lines = [line(rng, i, share) for i in range(rng.randint(0, most))]
        rows += len(lines)
        path.write_bytes(b"\n".join(lines) + rng.choice([b"", b"\n", b"\n\n", b"\r\n"]))

    def case(rng: random.Random) -> str:
        shutil.rmtree(tmp_path, ignore_errors=True)
        (tmp_path / "given").mkdir(parents=True)
        source = tmp_path / "given"
        if rng.random() < 0.5:
            source = tmp_path / "rows.jsonl"
            file(rng, source, 16)
        else:
            for name in SETS:
                if rng.random() < 0.97:
                    file(rng, source / f"{name}.jsonl", 6)
        words = [f"out={tmp_path}/run", f"distill.source={source}", "distill.num_heldout=2", "distill.num_validation=2"]  # fmt: skip
        run = override(recipe_config("tiny"), [*words, "curate.sft_examples=8"])
        found = check_inputs(run, preset("tiny"))
        for problem in found:
            problem.encode()
        with contextlib.redirect_stdout(io.StringIO()):
            distill(run)
            curate(run)
        assert not found, f"distill took what the dry run refuses: {found}"
        return "curated"

    counts = fuzz("rows", number // 10, case)
    print(f"{rows:,} rows")
    assert rows >= number * 0.8 and counts["curated"] and counts["ValueError"]
