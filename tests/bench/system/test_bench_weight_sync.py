"""Contents of the rows of `phimini bench weight-sync` and `rollout`; test_json_schemas.py has their fields."""

from typing import Any

from phimini.bench.gate.rows import Row
from phimini.bench.system import rollout, weight_sync


def test_a_sync_says_what_its_checksums_take() -> None:
    numbers = dict.fromkeys((*weight_sync.PHASES, *weight_sync.SHARES), 0.25)
    row = numbers | {
        "model": "tiny", "transport": "shm", "layout": "tp2", "bytes": 8, "parameters": 2, "total_ms": [2.0, 3.0],
        "copy_ms": [1.0, 1.0], "peak_extra_bytes": 9, "bucket_bytes": 16,
    }  # fmt: skip
    assert weight_sync.to_row(row).info["checksum_share"] == 0.25
    assert "checksums 25.0 %, verify 25.0 %" in weight_sync.line(row)


def test_a_rollout_as_a_plain_row() -> None:
    case: dict[str, Any] = {"batch": 4, "prompt_tokens": 32, "new_tokens": 64}
    rates = {"tokens_per_second": 9.0, "tokens_per_cpu_second": 8.0}
    right = Row(bench="rollout", case=case, provider="phimini", unit="tokens/cpu_s", samples=[8.0], error=1e-6,
                     info=rates)  # fmt: skip
    assert rollout.plain(right)["engine"] == "local"
    wrong = Row(bench="rollout", case=case, provider="vllm", unit="tokens/cpu_s", samples=[], correct=False,
                     error=0.5, info=rates)  # fmt: skip
    assert rollout.plain(wrong)["engine"] == "colocated"
    assert rollout.plain(wrong)["tokens_per_second"] is None, "no speed of a wrong answer"
