"""The harness times what is right, in turns, and says what it cost."""

import json
import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phimini.bench.gate import rows
from phimini.bench.gate.paired_ratio import Rounds
from phimini.bench.ops import harness, kernels
from phimini.bench.ops.harness import QUICK, Case, Timing, run_case

COLUMNS = [
    "op", "provider", "pass", "shape", "dtype", "device", "ms_p20", "ms_p50", "ms_p80", "cpu_seconds",
    "peak_extra_bytes", "max_relative_error", "percent_of_peak", "samples",
]  # fmt: skip
FAST = Timing(rounds=Rounds(at_least=4, seconds=0.0))


@pytest.fixture(autouse=True)
def small_cache_filler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_cache_filler", lambda device: torch.ones(4, device=device))


def make_case(**changes: Any) -> Case:
    settings: dict[str, Any] = dict(
        op="square",
        shape={"N": 100},
        inputs={"x": torch.randn(100)},
        providers={"ours": lambda x: x * x, "eager": lambda x: x.square()},
        reference=lambda x: x.square(),
        min_bytes={"fwd": 800, "bwd": 1200, "fwd+bwd": 2000},
        min_flops={"fwd": 100, "bwd": 200, "fwd+bwd": 300},
    )
    return Case(**settings | changes)


def test_rows_have_every_column_and_ordered_quantiles() -> None:
    rows = run_case(make_case(), FAST)
    assert [(row["provider"], row["pass"]) for row in rows] == [
        (provider, which) for which in ("fwd", "bwd", "fwd+bwd") for provider in ("ours", "eager")
    ]
    for row in rows:
        assert list(row) == COLUMNS
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["cpu_seconds"] > 0
        assert row["max_relative_error"] < 1e-6
        assert row["percent_of_peak"] is None  # no peak is known for a CPU
    assert rows == json.loads(json.dumps(rows))


def test_a_json_file_has_the_plain_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert kernels.main(["swiglu", "--quick", "--json", str(path)]) == 0
    assert all(list(row) == COLUMNS[:-1] for row in json.loads(path.read_text()))


def test_ratios_and_the_target_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case(
        providers={"phimini": lambda x: x * x, "eager": lambda x: x.square()}, target="at most 0.5"
    )
    harness.print_rows(case, run_case(case, FAST))
    printed = capsys.readouterr().out
    assert printed.count("phimini / eager: cpu_seconds ") == 3
    assert "target, not a result: at most 0.5" in printed


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "value": lambda x: x * x + 0.01,
    "one element": lambda x: torch.cat([(x * x)[:-1], x[-1:]]),
    "NaN": lambda x: x * x * torch.where(torch.arange(len(x)) == 7, torch.nan, 1.0),
    "gradient alone": lambda x: x * x.detach(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_result_is_not_timed(wrong: str) -> None:
    case = make_case(providers={"ours": WRONG[wrong], "eager": torch.square})
    for row in run_case(case, FAST):
        timed = row["ms_p50"] is not None
        assert timed == (row["provider"] == "eager"), row
        if not timed:
            error = row["max_relative_error"]
            assert error is None if wrong == "NaN" else error > 1e-4


def test_each_provider_may_have_its_own_limit() -> None:
    case = make_case(providers={"ours": lambda x: x * x + 1e-3}, error_limits={"ours": 1e-2})
    assert all(row["ms_p50"] is not None for row in run_case(case, FAST))


def test_providers_take_turns_and_start_in_turn() -> None:
    called: list[str] = []

    def provider(name: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            called.append(name)
            return x * x

        return run

    providers = {name: provider(name) for name in "abc"}
    case = make_case(providers=providers, min_bytes={"fwd": 1}, min_flops={"fwd": 1})
    run_case(case, Timing(rounds=Rounds(at_least=3, at_most=3), sample_ms=0.0))
    assert "".join(called[-9:]) == "abcbcacab"


@pytest.mark.parametrize(
    "providers, held",
    [("a", "aa"), ("ab", "ab"), (["eager", "a"], ["eager", "a"]), (["phimini", "a"], ["phimini", "a"]),
     (["a", "eager", "phimini"], ["phimini", "eager"])],
)  # fmt: skip
def test_rounds_go_on_until_the_ratio_of_two_providers_is_known(
    providers: list[str], held: list[str]
) -> None:
    """Never of one with itself, which is known at once."""
    times = {name: float(i) for i, name in enumerate(providers, 1)}
    seen: list[tuple[list[float], ...]] = []

    class Once(Rounds):
        def enough(
            self, samples: Sequence[float], reference: Sequence[float], spent_s: float
        ) -> bool:
            seen.append((list(samples), list(reference)))
            return True

    case = make_case(providers={name: lambda x: x * x for name in providers})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_sample", lambda call, *_: (0.0, call))
        patch.setattr(harness, "_call", lambda case, fn, *_: times[names[fn]])
        names = {fn: name for name, fn in case.providers.items()}
        calls = harness._Calls(case, "fwd", list(providers))
        harness._alternate(calls, Timing(rounds=Once(at_least=1)))
    assert seen == [tuple([times[name]] for name in held)]


def test_an_op_in_place_disturbs_nobody() -> None:
    x = torch.randn(100)
    kept = x.clone()
    ours = lambda x: (x.clone() if x.requires_grad else x).mul_(2)
    providers = {"ours": ours, "eager": lambda x: 2 * x}
    case = make_case(inputs={"x": x}, providers=providers, reference=lambda x: 2 * x)
    rows = run_case(case, FAST)
    assert torch.equal(x, kept)
    assert all(row["max_relative_error"] == 0 for row in rows)


def test_frozen_inputs_and_several_outputs() -> None:
    case = make_case(
        inputs={"x": torch.randn(10), "scale": torch.randn(10), "index": torch.arange(10)},
        providers={"ours": lambda x, scale, index: (x * scale, x[index], None)},
        reference=lambda x, scale, index: (x * scale, x[index]),
        frozen=("scale",),
    )
    assert run_case(case, FAST)[0]["max_relative_error"] < 1e-6


def test_16_bit_inputs_are_compared_with_fp32() -> None:
    case = make_case(inputs={"x": torch.randn(100).bfloat16()})
    row = run_case(case, FAST)[0]
    assert row["dtype"] == "bfloat16" and 1e-4 < row["max_relative_error"] < 1e-2


def test_peak_memory_is_what_a_call_holds_at_once() -> None:
    size = 32 * 2**20

    def hungry(x: Tensor) -> Tensor:
        one, two = torch.ones(size // 4), torch.ones(size // 4)
        return x * x + (one + two)[0] * 0

    case = make_case(providers={"ours": hungry, "eager": torch.square})
    rows = {row["provider"]: row["peak_extra_bytes"] for row in run_case(case, FAST)}
    assert abs(rows["ours"] - 3 * size) < 0.05 * size
    assert rows["eager"] < 0.05 * size


def test_percent_of_peak_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    inputs = {"x": torch.randn(4).bfloat16()}
    by_bytes = make_case(inputs=inputs, min_bytes={"fwd": int(3.35e9)}, min_flops={"fwd": 1})
    assert harness.percent_of_peak(by_bytes, "fwd", 2.0) == pytest.approx(50.0)
    by_flops = make_case(inputs=inputs, min_bytes={"fwd": 1}, min_flops={"fwd": int(989e9)})
    assert harness.percent_of_peak(by_flops, "fwd", 4.0) == pytest.approx(25.0)
    in_fp32 = make_case(min_bytes={"fwd": 1}, min_flops={"fwd": 1})
    assert harness.percent_of_peak(in_fp32, "fwd", 1.0) is None


def test_short_calls_are_repeated_within_a_sample() -> None:
    count = 0

    def ours(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * x

    case = make_case(providers={"ours": ours}, min_bytes={"fwd": 1}, min_flops={"fwd": 1})
    run_case(case, Timing(rounds=Rounds(at_least=2, at_most=2), sample_ms=2.0))
    assert count > 20


def test_a_case_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="Case square: min_bytes and min_flops: expected the same"):
        make_case(min_flops={"fwd": 1})


def test_the_command_times_an_op_and_writes_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    assert kernels.main(["swiglu", "--quick", "--json", str(path)]) == 0
    written = rows.read(path)
    assert {row.provider for row in written} >= {"phimini", "eager"}
    for row in written:
        assert row.bench == "kernels" and row.correct and len(row.samples) >= QUICK.rounds.at_least
        assert row.value is not None and row.value.p50 > 0 and row.error is not None
        ours = row.provider == "phimini"
        assert (row.reference == "eager" and row.ratio is not None) == ours
        assert math.isfinite(row.info["ms_p50"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " phimini / " not in line]
    assert len(lines) == len(written)
    with pytest.raises(ValueError, match="unknown op 'swigloo'; expected one of"):
        kernels.main(["swigloo"])


def test_a_case_whose_library_raises_leaves_the_rows_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(x: Tensor) -> Tensor:
        raise AttributeError("no such kernel")

    ours = {"phimini": lambda x: x * x, "eager": lambda x: x.square()}
    cases = [make_case(op=op, providers=ours | more) for op, more in
             (("first", {}), ("bad", {"liger": raises}), ("last", {}))]  # fmt: skip
    module = types.SimpleNamespace(timed_cases=lambda device, quick: cases)
    monkeypatch.setattr(kernels, "bench_modules", lambda ops: [module])
    monkeypatch.setattr(kernels, "QUICK", FAST)
    path = tmp_path / "rows.jsonl"
    assert kernels.main(["--quick", "--json", str(path)]) == 1
    assert {row.case["op"] for row in rows.read(path)} == {"first", "last"}
    printed = capsys.readouterr()
    assert "bad {'N': 100}: FAILED" in printed.out and "no such kernel" in printed.err
