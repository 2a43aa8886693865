"""Speed as a test, in anybody's CI: a marker, a fixture and two options for pytest.

    # conftest.py, at the root of the tests
    pytest_plugins = ["phimini.bench.gate.pytest_plugin"]

    # test_speed.py
    from phimini.bench.gate.rows import measured

    @pytest.mark.bench
    def test_my_kernel_is_as_fast_as_it_was(bench_gate):
        bench_gate([measured(bench="mine", case={"T": 4096}, provider="mine", unit="ms", samples=ours,
                             reference="eager", reference_samples=eager)])

Run with `pytest -m bench`. `bench_gate(rows)` holds the rows to `--bench-baselines DIR` (perf/baselines) as `phimini
bench compare` does and fails with its table; so does a row without a baseline, a stale one, or too few rounds:
nothing was checked, which is no pass. `--bench-save PATH` keeps the rows of all tests, failed or not, in one file:
`phimini bench bless PATH --baselines DIR --reason TEXT` makes them the baseline. Limits of one test are the marker's:
`@pytest.mark.bench(ratio=0.03, memory=0.05)`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from phimini.bench.gate.compare import Limits, baseline_of, compare
from phimini.bench.gate.environment import environment
from phimini.bench.gate.rows import Row, write

_SAVED = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("phimini bench")
    group.addoption("--bench-baselines", type=Path, default=Path("perf/baselines"), metavar="DIR",
                    help="baselines by device, as `phimini bench bless` writes them")  # fmt: skip
    group.addoption("--bench-save", type=Path, metavar="PATH", help="write all measured rows here")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "bench(ratio, absolute, memory): measures, and holds what it measured to a baseline",
    )
    config.stash[_SAVED] = []


@pytest.fixture
def bench_gate(request: pytest.FixtureRequest) -> Callable[[Iterable[Row]], None]:
    """`bench_gate(rows)` fails the test unless every row passes; rows are those of `rows.measured`."""
    marker = request.node.get_closest_marker("bench")
    limits = Limits(**(marker.kwargs if marker else {}))

    def gate(rows: Iterable[Row]) -> None:
        here = environment()
        new = [r if r.environment else dataclasses.replace(r, environment=here) for r in rows]
        request.config.stash[_SAVED] += new
        base = baseline_of(new, Path(str(request.config.getoption("--bench-baselines"))))
        report = compare(base, new, limits, partial=True)  # other tests have the other rows
        if report.status:
            pytest.fail(report.text(), pytrace=False)

    return gate


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, rows = session.config.getoption("--bench-save"), session.config.stash[_SAVED]
    if path is not None and rows:
        write(path, rows)
