"""`phimini bench weight-sync` and `bench rollout` write what they promise: plain rows of the named fields, or comparable ones."""

import json
from pathlib import Path

from phimini.bench import rollout, weight_sync
from phimini.bench.rows import measured

SYNC = (
    "transport, layout, parameters, bytes, gather_s, pack_s, transfer_s, load_s, verify_s, total_s, "
    "peak_extra_bytes"
)
ROLLOUT = (
    "engine, batch, prompt_tokens, new_tokens, tokens_per_second, tokens_per_cpu_second, "
    "max_abs_dlogp"
)


def test_a_sync_as_a_plain_row_and_as_a_comparable_one(tmp_path: Path) -> None:
    numbers = dict.fromkeys((*weight_sync.PHASES, *weight_sync.SHARES), 0.25)
    row = numbers | {
        "model": "tiny", "transport": "shm", "layout": "tp2", "bytes": 8, "parameters": 2, "total_ms": [2.0, 3.0],
        "copy_ms": [1.0, 1.0], "peak_extra_bytes": 9, "bucket_bytes": 16,
    }  # fmt: skip
    comparable, plain = weight_sync.to_row(row), weight_sync.plain(row)
    weight_sync.write_either(tmp_path / "rows.json", [comparable], [plain])
    assert [list(r) for r in json.loads((tmp_path / "rows.json").read_text())] == [SYNC.split(", ")]
    weight_sync.write_either(tmp_path / "rows.jsonl", [comparable], [plain])
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines[-1]["bench"] == "weight-sync" and lines[-1]["info"]["checksum_share"] == 0.25
    assert "checksums 25.0 %, verify 25.0 %" in weight_sync.line(row)


def test_a_rollout_as_a_plain_row() -> None:
    case = {"batch": 4, "prompt_tokens": 32, "new_tokens": 64}
    rates = {"tokens_per_second": 9.0, "tokens_per_cpu_second": 8.0}
    right = measured(bench="rollout", case=case, provider="phimini", unit="tokens/cpu_s", samples=[8.0], error=1e-6,
                     info=rates)  # fmt: skip
    assert list(rollout.plain(right)) == ROLLOUT.split(", ")
    assert rollout.plain(right)["engine"] == "local"
    wrong = measured(bench="rollout", case=case, provider="vllm", unit="tokens/cpu_s", samples=[], correct=False,
                     error=0.5, info=rates)  # fmt: skip
    assert rollout.plain(wrong)["tokens_per_second"] is None, "no speed of a wrong answer"
