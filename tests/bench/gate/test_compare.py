"""Verdicts on synthetic runs: planted faults fail, equal runs pass, and unchecked rows do not pass."""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gate_cases import CPU, HERE, row

from phimini.bench.gate import compare as module
from phimini.bench.gate.bless import bless, together
from phimini.bench.gate.bless import main as bless_main
from phimini.bench.gate.compare import Limits, Report, compare, main
from phimini.bench.gate.environment import Environment
from phimini.bench.gate.paired_ratio import Rounds
from phimini.bench.gate.rows import Row, read_all, write


def alone(slow: float = 1.0, environment: Environment = HERE, **changes: Any) -> Row:
    return row(slow, environment, **{"reference": None, "reference_samples": []} | changes)


def verdicts(report: Report) -> list[str]:
    return [j.verdict for j in report.judgements]


OTHER_TORCH = dataclasses.replace(HERE, versions=HERE.versions | {"torch": "2.14.0"})
OTHER_DRIVER = dataclasses.replace(HERE, driver="590.1")
OTHER_CAP = dataclasses.replace(HERE, power_cap_w=350.0)
# name: (base, new, verdicts, status)
CASES: dict[str, tuple[list[Row], list[Row], list[str], int]] = {
    "same": ([row()], [row()], ["ok"], 0),
    "4 % slower": ([row()], [row(1.04)], ["ok"], 0),
    "10 % slower": ([row()], [row(1.10)], ["slower"], 1),
    "10 % less throughput": ([row(unit="tokens/s")], [row(0.9, unit="tokens/s")], ["slower"], 1),
    "more throughput": ([row(unit="tokens/s")], [row(1.5, unit="tokens/s")], ["faster"], 0),
    "twice as fast": ([row()], [row(0.5)], ["faster"], 0),
    "absolutely slower on an equal GPU": ([row()], [row(machine=1.12)], ["slower"], 1),
    "the same behind another driver": ([row()], [row(machine=1.12, environment=OTHER_DRIVER)], ["ok"], 0),
    "the same under another power cap": ([row()], [row(machine=2.0, environment=OTHER_CAP)], ["ok"], 0),
    "a CPU's clock is nobody's fault": ([row(environment=CPU)], [row(machine=1.5, environment=CPU)], ["ok"], 0),
    "slower on a slower CPU": ([row(environment=CPU)], [row(1.1, machine=1.5, environment=CPU)], ["slower"], 1),
    "no reference, slower": ([alone(environment=CPU)], [alone(1.12, CPU)], ["slower"], 1),
    "no reference, 6 % slower": ([alone(environment=CPU)], [alone(1.06, CPU)], ["ok"], 0),
    "no reference, another machine": ([alone()], [alone(1.0, OTHER_CAP)], ["no baseline"], 3),
    "2 % more memory": ([row()], [row(peak_bytes=102 * 2**20)], ["ok", "more memory"], 1),
    "0.9 % more memory": ([row()], [row(peak_bytes=int(100.9 * 2**20))], ["ok"], 0),
    "less memory": ([row()], [row(peak_bytes=2**20)], ["ok"], 0),
    "pages of a CPU": ([row(environment=CPU, peak_bytes=2**20)], [row(environment=CPU, peak_bytes=2**21)], ["ok"], 0),
    "memory no longer measured": ([row()], [row(peak_bytes=None)], ["ok", "no baseline"], 3),
    "slower and larger": ([row()], [row(1.2, peak_bytes=2**30)], ["slower", "more memory"], 1),
    "wrong": ([row()], [row(correct=False, samples=[], reference_samples=[])], ["wrong"], 1),
    "wrong and new": ([], [row(correct=False, samples=[], reference_samples=[])], ["wrong"], 1),
    "no base": ([], [row()], ["no baseline"], 3),
    "a new row": ([row()], [row(), row(case={"op": "new"})], ["ok", "no baseline"], 3),
    "a row is gone": ([row(), row(case={"op": "old"})], [row()], ["ok", "gone"], 1),
    "another device": ([row()], [row(environment=CPU)], ["no baseline"], 3),
    "another torch": ([row()], [row(1.5, environment=OTHER_TORCH)], ["stale baseline"], 3),
    "other threads": ([row()], [row(environment=dataclasses.replace(HERE, threads=2))], ["stale baseline"], 3),
    "another reference": ([row()], [row(reference="liger")], ["stale baseline"], 3),
    "three rounds": ([row()], [row(2.0, samples=[2.0] * 3, reference_samples=[2.0] * 3)], ["too few rounds"], 3),
    "a peer is a yardstick": ([row(), alone(provider="eager")], [row(), alone(9.0, provider="eager")],
                              ["ok", "yardstick"], 0),
    "only yardsticks": ([alone(provider="eager")], [alone(provider="eager")], ["yardstick"], 3),
    "nothing": ([], [], [], 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, new, expected, status = CASES[name]
    report = compare(base, new)
    assert (verdicts(report), report.status) == (expected, status), report.text(verbose=True)
    if new:  # the command says the same of files
        paths = [tmp_path / "base.jsonl", tmp_path / "new.jsonl"]
        if base:
            write(paths[0], base)
        write(paths[1], new)
        assert main([str(p) for p in paths]) == status
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith({0: "PASS: ", 1: "FAIL: ", 3: "NO VERDICT: "}[status])


def test_a_failure_names_row_values_and_limit() -> None:
    text = compare([row()], [row(1.1)]).text()
    assert "slower         kernels:op=rope:phimini:ms: ratio to eager 0.5 (" in text
    assert "+10.0 % time, limit 5 %" in text and text.endswith("FAIL: 1 slower")


def test_a_package_of_the_reference_makes_a_baseline_stale() -> None:
    newer = dataclasses.replace(HERE, versions=HERE.versions | {"liger-kernel": "0.9.0"})
    of_liger, of_eager = (
        compare([row(reference=r)], [row(environment=newer, reference=r)])
        for r in ("liger", "eager")
    )
    assert (verdicts(of_liger), verdicts(of_eager)) == (["stale baseline"], ["ok"])
    assert "liger-kernel was 0.8.5, is 0.9.0" in of_liger.text()


def test_wide_bands_pass_as_noisy_and_say_so() -> None:
    wild = [0.7, 1.0, 1.3, 0.8, 1.2, 1.0, 0.9, 1.1]
    report = compare([row(samples=wild)], [row(1.04, samples=wild)])
    assert (verdicts(report), report.status) == (["noisy"], 0)
    assert "bands too wide to show one of 10 %" in report.text()
    assert verdicts(compare([row(samples=wild)], [row(samples=[1.08 * s for s in wild])])) == [
        "noisy"
    ]


def test_limits_and_partial_runs() -> None:
    assert verdicts(compare([row()], [row(1.09)], Limits(ratio=0.08, absolute=9.0))) == ["slower"]
    assert verdicts(compare([row()], [row(1.09)], Limits(ratio=0.10, absolute=9.0))) == ["ok"]
    never = Limits(when_absolute="never")
    assert verdicts(compare([row()], [row(machine=2.0)], never)) == ["ok"]
    always = Limits(when_absolute="always")
    assert verdicts(
        compare([row(environment=CPU)], [row(machine=2.0, environment=CPU)], always)
    ) == ["slower"]
    assert verdicts(compare([row(), row(case={"op": "old"})], [row()], partial=True)) == ["ok"]


# --- noisy runs ------------------------------------------------------------------------------------
Pair = tuple[float, float]
Noise = Callable[[random.Random], Iterator[Pair]]


def still(generator: random.Random) -> Iterator[Pair]:
    """Logarithms of what one round adds to both providers' time, for every round."""
    while True:
        yield 0.0, 0.0


def normal(sd: float) -> Noise:
    def rounds(generator: random.Random) -> Iterator[Pair]:
        while True:
            yield generator.gauss(0, sd), generator.gauss(0, sd)

    return rounds


def heavy(sd: float) -> Noise:
    """Student's t with 3 degrees of freedom: some rounds are many deviations off."""

    def draw(generator: random.Random) -> float:
        squares = sum(generator.gauss(0, 1) ** 2 for _ in range(3))
        return sd * generator.gauss(0, 1) / math.sqrt(squares)  # t / sqrt(3) has deviation 1

    def rounds(generator: random.Random) -> Iterator[Pair]:
        while True:
            yield draw(generator), draw(generator)

    return rounds


def disturbed(sd: float, share: float) -> Noise:
    """Normal, and `share` of the samples take 1.1 to 1.6 times as long."""

    def draw(generator: random.Random) -> float:
        hit = generator.uniform(0.1, 0.47) if generator.random() < share else 0.0
        return generator.gauss(0, sd) + hit

    def rounds(generator: random.Random) -> Iterator[Pair]:
        while True:
            yield draw(generator), draw(generator)

    return rounds


def neighbour(sd: float) -> Noise:
    """Normal, while another process comes and goes for some 5 samples and slows them by some 20 %."""

    def rounds(generator: random.Random) -> Iterator[Pair]:
        here = False
        while True:
            pair = []
            for _ in range(2):
                here = generator.random() < (0.8 if here else 0.05)
                pair.append(generator.gauss(0, sd) + (generator.gauss(0.2, 0.05) if here else 0))
            yield pair[0], pair[1]

    return rounds


NOISES: dict[str, Noise] = {
    "normal 2 %": normal(0.02), "normal 5 %": normal(0.05), "normal 10 %": normal(0.10), "heavy 5 %": heavy(0.05),
    "heavy 10 %": heavy(0.10), "disturbed 5 %, 1 in 7": disturbed(0.05, 0.15), "neighbour 5 %": neighbour(0.05),
}  # fmt: skip
PLACE = 0.01
"""what runs of a row differ by whatever the rounds (`bench/gate/paired_ratio.py`, RUN_TO_RUN)"""


def noisy_row(
    generator: random.Random,
    noise: Noise,
    slow: float = 1.0,
    number: int = 0,
    rounds: Rounds | None = None,
) -> Row:
    """As a bench measures it, as many rounds as it takes, while the machine's clock wanders by some 10 %."""
    rounds = rounds or Rounds()
    clock, place = generator.gauss(0, 0.1), generator.gauss(0, PLACE)
    ours: list[float] = []
    eager: list[float] = []
    for mine, theirs in noise(generator):
        if rounds.enough(ours, eager, 0.0):
            break
        clock = 0.9 * clock + generator.gauss(0, 0.04)
        ours.append(slow * math.exp(clock + place + mine))
        eager.append(1.7 * math.exp(clock + theirs))
    return row(environment=CPU, case={"op": str(number)}, samples=ours, reference_samples=eager)


def share_of(verdict: str, base: list[Row], new: list[Row]) -> float:
    return sum(
        compare([b], [n]).judgements[0].verdict == verdict for b, n in zip(base, new, strict=True)
    ) / len(new)


@pytest.mark.parametrize("name", NOISES)
def test_a_planted_slow_down_is_caught_and_nothing_else(name: str) -> None:
    """200 runs: at least 19 in 20 of those that are 10 % slower fail, and the others, also faster ones, never fail."""
    generator, noise = random.Random(name), NOISES[name]
    base, same, slower = (
        [noisy_row(generator, noise, slow) for _ in range(200)] for slow in (1.0, 1.0, 1.1)
    )
    assert share_of("slower", base, slower) >= 0.95
    assert share_of("slower", base, same) == 0 and share_of("slower", slower, base) == 0


def test_one_slow_row_of_ten_is_named_and_nine_are_not() -> None:
    generator, noise = random.Random(1), disturbed(0.02, 0.05)
    run = lambda slow: [noisy_row(generator, noise, slow if n == 0 else 1.0, n) for n in range(10)]
    for _ in range(20):
        report = compare(run(1.0), run(1.1))
        slower = [j.key for j in report.judgements if j.verdict == "slower"]
        assert slower == ["kernels:op=0:phimini:ms"] and report.status == 1
    reports = [compare(run(1.0), run(1.0)) for _ in range(40)]
    assert [r.text() for r in reports if r.status] == []


def test_the_clock_alone_would_have_raised_alarms() -> None:
    """The drift is large enough to matter: with absolute times, equal runs fail."""
    generator, always = random.Random(2), Limits(ratio=9.0, when_absolute="always")
    pairs = [[noisy_row(generator, still) for _ in range(2)] for _ in range(40)]
    reports = [compare([base], [new], always) for base, new in pairs]
    assert sum(r.status == 1 for r in reports) >= 3


def test_too_few_rounds_for_the_noise_are_noisy_and_no_alarm() -> None:
    generator, few = random.Random(3), Rounds(at_least=8, at_most=8)
    runs = [[noisy_row(generator, normal(0.1), rounds=few) for _ in range(2)] for _ in range(200)]
    found = Counter(compare([base], [new]).judgements[0].verdict for base, new in runs)
    assert found["noisy"] > 195 and not found["slower"], found


# --- files -----------------------------------------------------------------------------------------
def test_schema_change_and_unreadable_files_have_their_own_status(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, new = tmp_path / "base.jsonl", tmp_path / "new.jsonl"
    write(base, [row()])
    write(new, [row()])
    base.write_text(base.read_text().replace('"schema": 2', '"schema": 1'))
    assert main([str(base), str(new)]) == 4
    assert f"schema change: {base}, line 1: schema: expected 2, got 1" in capsys.readouterr().err
    base.write_text("{")
    assert main([str(base), str(new)]) == 2
    assert f"{base}, line 1: malformed JSON" in capsys.readouterr().err
    assert main([str(base), str(tmp_path / "none.jsonl")]) == 2
    write(new, [row(), row(environment=CPU, case={"op": "x"})])
    assert main([str(new)]) == 2
    assert "expected rows of one device" in capsys.readouterr().err


def test_bless_then_compare_by_device(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    new, baselines = tmp_path / "new.jsonl", tmp_path / "baselines"
    write(new, [row(), row(case={"op": "swiglu"}), row(bench="train")])
    arguments = [str(new), "--baselines", str(baselines)]
    assert main(arguments) == 3  # nothing is blessed yet
    assert bless_main([*arguments, "--reason", "first"]) == 0
    assert main(arguments) == 0
    folder = baselines / HERE.slug
    assert sorted(p.name for p in folder.iterdir()) == ["kernels.jsonl", "train.jsonl"]

    write(new, [row(1.3)])
    assert main([*arguments, "--partial"]) == 1
    assert bless_main([*arguments, "--reason", "slower, but right"]) == 0
    assert main([*arguments, "--partial"]) == 0
    rows, blessings = read_all(folder / "kernels.jsonl")
    assert sorted(r.case["op"] for r in rows) == ["rope", "swiglu"]
    assert [(b["reason"], b["rows"]) for b in blessings] == [("first", 2), ("slower, but right", 1)]
    capsys.readouterr()


def test_bless_replaces_a_file_of_another_schema_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (path,) = bless([row(case={"op": "old"})], "first", tmp_path)
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 1'))
    assert bless([row()], "second", tmp_path) == [path]
    rows, blessings = read_all(path)
    assert ([r.case["op"] for r in rows], [b["reason"] for b in blessings]) == (
        ["rope"],
        ["second"],
    )
    assert "the old file is replaced" in capsys.readouterr().err


def test_what_differs_between_runs_of_one_code_is_no_slow_down(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for path, moved in zip(paths, (1.2, 1.0, 0.85), strict=True):
        write(path, [row(moved, CPU)])
    assert (
        bless_main([*map(str, paths), "--reason", "three", "--baselines", str(tmp_path / "b")]) == 0
    )
    (base,) = read_all(tmp_path / "b" / CPU.slug / "kernels.jsonl")[0]
    assert base.samples == row(1.0).samples
    assert base.run_to_run == pytest.approx(math.log(1.2 / 0.85) / 2, rel=0.01)
    assert verdicts(compare([base], [row(1.2, CPU)])) == ["noisy"]
    assert verdicts(compare([base], [row(1.4, CPU)])) == ["slower"]
    alone = dataclasses.replace(base, run_to_run=0.0)
    assert verdicts(compare([alone], [row(1.2, CPU)])) == ["slower"]
    wrong = row(environment=CPU, correct=False, samples=[], reference_samples=[])
    assert together([[row(environment=CPU)], [wrong]]) == [wrong]
    capsys.readouterr()


def test_an_installed_phimini_asks_for_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    new = tmp_path / "new.jsonl"
    write(new, [row(environment=CPU)])
    installed = dataclasses.replace(CPU, commit=None)
    monkeypatch.setattr("phimini.bench.gate.bless.environment", lambda: installed)
    assert bless_main([str(new), "--reason", "x"]) == 2
    assert "--baselines: expected a folder of your project" in capsys.readouterr().err
    assert bless_main([str(new), "--reason", "x", "--baselines", str(tmp_path / "b")]) == 0
    capsys.readouterr()


REFUSED = {
    "no reason": ([row()], " ", "reason: expected a sentence, got nothing"),
    "dirty": ([row(environment=dataclasses.replace(HERE, dirty=True))], "x", "measured with uncommitted changes"),
    "wrong": ([row(correct=False, samples=[], reference_samples=[])], "x", "a wrong result"),
    "few rounds": ([row(samples=[1.0], reference_samples=[1.0])], "x", "expected at least 5 rounds, got 1"),
    "two devices": ([row(), row(environment=CPU, case={"op": "x"})], "x", "rows of one device, got .*some-cpu"),
    "no rows": ([], "x", "expected rows of one device, got no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bless_refuses(name: str, tmp_path: Path) -> None:
    rows, reason, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        bless(
            [row(bench="a"), *rows] if name in ("wrong", "few rounds") else rows, reason, tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_committed_baselines_can_be_read_and_were_measured_clean() -> None:
    root = Path(str(module.__file__)).resolve().parents[1] / "baselines"
    paths = sorted(root.glob("*/*.jsonl"))
    assert {path.stem for path in paths} >= {"data", "kernels", "rollout", "train", "weight-sync"}
    for path in paths:
        rows, blessings = read_all(path)
        assert rows and blessings, path
        for r in rows:
            assert (
                r.environment and r.environment.slug == path.parent.name and not r.environment.dirty
            )
        assert all(b["reason"].strip() for b in blessings)
