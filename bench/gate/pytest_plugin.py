"""A pytest plugin that makes speed a test in the CI of any project: a marker, a fixture and two options.

pytest finds it by itself where phimini is installed. It imports torch only when a test asks for `bench_gate`.

    # test_speed.py
    from phimini.bench.gate.rows import Row

    @pytest.mark.bench
    def test_my_kernel_is_as_fast_as_it_was(bench_gate):
        bench_gate([Row(bench="mine", case={"T": 4096}, provider="mine", unit="ms", samples=ours,
                        reference="eager", reference_samples=eager)])

Run it with `pytest -m bench`. `bench_gate(rows)` compares the rows with `--bench-baselines DIR` (perf/baselines) as
`phimini bench compare` does, and fails with its table. A row without a baseline, with a stale one or with too few rounds
fails too, because nothing was checked. `--bench-save PATH` writes the rows of all tests, failed or not, to one file, and
`phimini bench bless PATH --baselines DIR --reason TEXT` makes them the baseline. The marker sets the limits of a test:
`@pytest.mark.bench(ratio=0.03, memory=0.05)`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from phimini.bench.gate.rows import Row

_SAVED: "pytest.StashKey[list[Row]]" = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("phimini bench")
    group.addoption("--bench-baselines", type=Path, default=Path("perf/baselines"), metavar="DIR",
                    help="baselines by device, as `phimini bench bless` writes them")  # fmt: skip
    group.addoption("--bench-save", type=Path, metavar="PATH", help="write all measured rows here")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "bench(ratio, absolute, memory): measure, and compare with a baseline"
    )
    config.stash[_SAVED] = []


@pytest.fixture
def bench_gate(request: pytest.FixtureRequest) -> "Callable[[Iterable[Row]], None]":
    """Return a function that fails the test unless every one of its rows passes."""
    from phimini.bench.gate.compare import Limits, baseline_of, compare
    from phimini.bench.gate.environment import environment

    marker = request.node.get_closest_marker("bench")
    limits = Limits(**(marker.kwargs if marker else {}))

    def gate(rows: "Iterable[Row]") -> None:
        here = environment()
        new = [r if r.environment else dataclasses.replace(r, environment=here) for r in rows]
        request.config.stash[_SAVED] += new
        base = baseline_of(new, Path(str(request.config.getoption("--bench-baselines"))))
        report = compare(base, new, limits, partial=True)  # other tests measure the other rows
        if report.status:
            pytest.fail(report.text(), pytrace=False)

    return gate


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, rows = session.config.getoption("--bench-save"), session.config.stash[_SAVED]
    if path is not None and rows:
        from phimini.bench.gate.rows import write

        write(path, rows)
