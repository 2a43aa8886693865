"""Run pytest with a JSON line per test, written when the test ends: `python -m phimini.bench.gpu_day.pytest_rows PATH ...`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest


class Rows:
    """Pytest plugin that appends the outcome of every test to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:  # set-up and end of a test
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}  # fmt: skip
        if report.failed:
            row["error"] = str(report.longrepr)[-2000:]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main(path: str, *arguments: str) -> int:
    root = Path(__file__).resolve().parents[2]
    words = ["-q", "-p", "no:cacheprovider", "-c", str(root / "pyproject.toml"), "--rootdir", str(root)]  # fmt: skip
    return int(pytest.main([*words, *arguments], plugins=[Rows(Path(path))]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
