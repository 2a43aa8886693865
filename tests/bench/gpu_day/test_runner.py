"""The GPU day's processes: limits, rows at every moment, and no process left behind."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from phimini.bench.gpu_day.parts import PARTS, Part

DRIVER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
from pathlib import Path
from phimini.bench.gpu_day.parts import Part
from phimini.bench.gpu_day.runner import RowFile, run_parts
out, seconds, parts = Path(sys.argv[1]), float(sys.argv[2]), eval(sys.argv[3])
rows = RowFile(out / "rows.jsonl", {"mode": "test"})
for outcome in run_parts(parts, rows, out / "log.txt", time.monotonic() + seconds, rehearse=True, values={"gpus": 0}):
    print(outcome.part, outcome.status, flush=True)
"""
WRITES = "import json, sys, time; f = open(sys.argv[1], 'a')\nfor i in range(40): f.write(json.dumps({'i': i}) + chr(10)); f.flush(); time.sleep(0.005)"
HANGS = (
    "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # MARK'], start_new_session=True)\n"
    "print('now I hang', flush=True)\ntime.sleep(600)"
)


def part(name: str, code: str, needs: tuple[str, ...] = (), share: float = 1.0) -> Part:
    words = ("-c", code.replace("{", "{{").replace("}", "}}"), "{rows}")
    return Part(
        name=name, what=name, command=words, rehearsal=words, share=share, rehearsal_needs=needs
    )


def driven(out: Path, seconds: float, parts: list[Part]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(out), str(seconds), repr(parts)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def ends(out: Path) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in rows_of(out) if row["kind"] == "end"}


def left_behind(mark: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(mark in word for word in p.info["cmdline"] or [])]  # fmt: skip


def test_a_failed_a_hung_and_a_missing_part_stop_no_other(tmp_path: Path) -> None:
    mark = f"of {tmp_path.name} {os.getpid()}"
    parts = [
        part("first", WRITES),
        part("fails", "print('why'); raise SystemExit(3)"),
        part("hangs", HANGS.replace("MARK", mark), share=0.05),  # ten seconds
        part("absent", WRITES, needs=("no_such_module.inner", "os")),
        part("last", WRITES),
    ]
    started = time.monotonic()
    process = driven(tmp_path, 300, parts)
    printed, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert time.monotonic() - started < 300
    by_part = ends(tmp_path)
    status = {name: row["status"] for name, row in by_part.items()}
    assert status == {"first": "ok", "fails": "failed", "hangs": "timed out", "absent": "not installed: no_such_module.inner", "last": "ok"}  # fmt: skip
    assert [line.split()[0] for line in printed.splitlines()] == [p.name for p in parts]
    assert by_part["fails"]["rc"] == 3 and "why" in by_part["fails"]["said"]
    assert by_part["hangs"]["rc"] is None
    assert "now I hang" in by_part["hangs"]["said"] and "Current thread" in by_part["hangs"]["said"]
    assert by_part["hangs"]["seconds"] >= by_part["hangs"]["limit_s"] - 0.1
    for name in ("first", "last"):
        assert [r["row"]["i"] for r in rows_of(tmp_path) if r["kind"] == "row" and r["part"] == name] == list(range(40))  # fmt: skip
        assert by_part[name]["rows"] == 40
    starts = {row["part"]: row for row in rows_of(tmp_path) if row["kind"] == "start"}
    assert starts.keys() == by_part.keys() - {"absent"}
    assert not left_behind(mark), "a process in a session of its own outlived its part"


def test_a_part_s_unused_time_goes_to_the_later_ones(tmp_path: Path) -> None:
    process = driven(tmp_path, 300, [part(name, "pass") for name in ("one", "two")])
    assert process.wait(300) == 0
    one, two = (ends(tmp_path)[name]["limit_s"] for name in ("one", "two"))
    assert one < 150 and two > 200


def test_without_time_a_part_is_not_started(tmp_path: Path) -> None:
    process = driven(tmp_path, 2, [part("one", "pass")])
    assert process.wait(300) == 0
    assert ends(tmp_path)["one"]["status"] == "no time left"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_whenever_it_is_killed_every_line_is_json_and_the_part_ends(
    number: signal.Signals, tmp_path: Path
) -> None:
    mark = f"loop of {tmp_path.name} {os.getpid()}"
    endless = WRITES.replace("range(40)", "range(10**6)").replace("0.005", "0.001") + f"  # {mark}"
    process = driven(tmp_path, 600, [part("writes", endless)])
    path = tmp_path / "rows.jsonl"
    while not path.exists() or path.read_text().count('"row"') < 20:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.random() / 4)
    process.send_signal(number)
    process.communicate(timeout=120)
    rows = rows_of(tmp_path)
    assert path.read_text().endswith("\n") and rows[0]["kind"] == "start"
    assert [r["row"]["i"] for r in rows if r["kind"] == "row"] == list(range(sum(r["kind"] == "row" for r in rows)))  # fmt: skip
    if number == signal.SIGINT:
        assert rows[-1]["kind"] == "end" and rows[-1]["status"] == "stopped"
    deadline = time.monotonic() + 60
    while (found := left_behind(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in found if pid != process.pid] == []


def test_the_parts_are_the_issue_s_in_its_order_and_each_command_can_be_named() -> None:
    assert [p.name for p in PARTS] == [
        "tests", "kernels", "step", "fp8", "recipe", "vllm-sync", "vllm-mismatch", "ranks", "layouts",
    ]  # fmt: skip
    values = {"rows": "r", "folder": "f", "gpus": 1, "recompute": "full"}
    for one in PARTS:
        for words in (one.command, one.rehearsal or ()):
            assert not [w for w in words if "{" in w.format_map(values)]
    assert dataclasses.replace(PARTS[-1], gpus=99, needs=()).missing(False, 1) == "not possible: it needs 99 GPUs, here 1"  # fmt: skip
