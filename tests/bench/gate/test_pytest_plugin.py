"""The plugin as a user's CI has it: pytest on a folder of theirs, against baselines of theirs."""

import dataclasses
from pathlib import Path

import pytest

from phimini.bench.gate.bless import bless
from phimini.bench.gate.environment import environment
from phimini.bench.gate.rows import read

CONFTEST = 'pytest_plugins = ["phimini.bench.gate.pytest_plugin"]\n'
TESTS = """
import json
from pathlib import Path
import pytest
from phimini.bench.gate.rows import Row

def row(size):
    factor = json.loads((Path(__file__).parent / "factor.json").read_text())
    return Row(bench="mine", case={"T": size}, provider="mine", unit="ms", samples=[factor * 2.0] * 15,
                    reference="eager", reference_samples=[2.0] * 15)

@pytest.mark.bench
def test_speed(bench_gate):
    bench_gate([row(64)])

@pytest.mark.bench(ratio=0.5)
def test_speed_with_a_wide_limit(bench_gate):
    bench_gate([row(4096)])

def test_something_else():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_speed.py").write_text(TESTS)
    return tmp_path


def run(
    project: Path, capsys: pytest.CaptureFixture, factor: float, *words: str
) -> tuple[int, str]:
    """pytest's exit status and output."""
    (project / "factor.json").write_text(str(factor))
    status = pytest.main(
        [str(project), f"--rootdir={project}", "-c", "/dev/null", "-p", "no:cacheprovider", "--strict-markers", "-q",
         f"--confcutdir={project}", f"--bench-baselines={project / 'perf'}", *words]
    )  # fmt: skip
    return int(status), capsys.readouterr().out


def test_fails_without_a_baseline_then_passes_then_finds_a_slow_down(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    saved = project / "rows.jsonl"
    status, out = run(
        project, capsys, 1.0, "-m", "bench", "-k", "not wide", f"--bench-save={saved}"
    )
    assert status == 1 and "no baseline    mine:T=64:mine:ms: no row of this key in the base" in out
    assert "NO VERDICT: 1 no baseline" in out and "1 failed, 2 deselected" in out

    assert run(project, capsys, 1.0, f"--bench-save={saved}")[0] == 1
    committed = [
        dataclasses.replace(r, environment=dataclasses.replace(environment(), dirty=False))
        for r in read(saved)
    ]
    assert [r.case["T"] for r in committed] == [64, 4096]  # the rows of failed tests too
    bless(committed, "first", project / "perf")
    status, out = run(project, capsys, 1.0)
    assert status == 0 and "3 passed" in out

    status, out = run(project, capsys, 1.1)
    assert status == 1 and "1 failed, 2 passed" in out
    assert "slower         mine:T=64:mine:ms: ratio to eager" in out and "limit 5 %" in out

    status, out = run(project, capsys, 0.5)
    assert status == 0 and "3 passed" in out
