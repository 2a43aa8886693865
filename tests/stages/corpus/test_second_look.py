"""The judge and the labels of `phimini clean`: each is asked once whatever fails, and rows stay as they are after an invalid reply."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from corpus_cases import digests, rows_in

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import read_rows, write_rows
from phimini.stages.cli import main
from phimini.stages.config.cleaning import JUDGE, LABEL
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.corpus.second_look import Judgement, Label, parsed
from phimini.stages.data import teacher
from phimini.stages.distill import distill
from phimini.stages.report.datasets import trace

KEY = "sk-a-secret"
RIGHT = '{"verdict": "right", "reason": "in words"}'
INVALID_JUDGEMENTS = {
    3: "It is right.", 4: f"```json\n{RIGHT}\n```", 5: '{"verdict": "maybe", "reason": "x"}', 6: '{"verdict": "right"}'
}  # fmt: skip
INVALID_LABELS = {7: '{"domain": "sums", "level": 2}', 8: '{"domain": "algebra", "level": 5}', 9: "algebra, 2"}  # fmt: skip


class Endpoint(ThreadingHTTPServer):
    """A judge that finds `value` right, and a labeller; `faults(number, before)` is of a question's next request."""

    daemon_threads = True

    def __init__(self, faults: Callable[[int, int], str]) -> None:
        self.faults, self.lock = faults, threading.Lock()
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        assert self.headers["authorization"] == f"Bearer {KEY}"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][0]["content"]
        number = int(re.findall(r"What is (\d+)", text)[0])
        with server.lock:
            fault = server.faults(number, server.asked[text])
            server.asked[text] += 1
            server.answered[text] += not fault
        if text.startswith(LABEL):
            reply = INVALID_LABELS.get(number, f'<think>hm</think>{{"domain": "algebra", "level": {number % 5}}}')  # fmt: skip
        else:
            assert text.startswith(f"{JUDGE}\n\nQuestion:\nWhat is {number} + 1?\n\nReference answer:\n{number + 1}\n")  # fmt: skip
            right = "value" in text
            reply = RIGHT if right else '{"verdict": "wrong", "reason": "another number"}'
            reply = INVALID_JUDGEMENTS.get(number, reply) if right else reply
        choice = {"message": {"content": reply}, "finish_reason": "stop"}
        data = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}).encode()  # fmt: skip
        if fault == "stall":
            time.sleep(1.5)
        try:
            self.send_response(500 if fault == "500" else 200)
            self.end_headers()
            self.wfile.write(data[:40] if fault == "half" else data)
        except OSError:  # the client has given the request up
            pass

    def log_message(self, *_: Any) -> None:
        pass


def command(folder: Path, server: Endpoint) -> list[str]:
    rows = [
        {"id": f"r{n}.{kind}", "question": f"What is {n} + 1?", "answer": str(n + 1), "response": response, "family": "given", "level": 1}
        for n in range(24)
        for kind, response in {
            "right": f"\\boxed{{{n + 1}}}", "wrong": f"\\boxed{{{n}}}", "words": f"\\boxed{{\\text{{the value {n + 1}}}}}", "cut": "so",
        }.items()
    ]  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    each = ["model=m", f"url={url}", "attempts=4", "timeout_s=1", "concurrency=8"]
    return ["clean", str(folder / "rows.jsonl"), str(folder / "out"), "near.remove=false", "shard_mb=0.004",
            *[f"{name}.{word}" for name in ("judge", "label") for word in each]]  # fmt: skip


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIMINI_TEACHER_KEY", KEY)
    monkeypatch.setattr(teacher, "FIRST_WAIT_S", 0.01)


def test_no_fault_loses_a_reply_and_an_invalid_one_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ("500", "half", "stall")
    server = Endpoint(lambda number, before: kinds[number % 3] if before < 1 and number < 12 else "")  # fmt: skip
    words = command(tmp_path, server)
    assert main(words) == 0
    assert set(server.answered.values()) == {1}, "asked again after an answer"
    assert len(server.answered) == 24 * 2 + 24, "two wrong rows that are whole, and a label, of each question"  # fmt: skip
    out = tmp_path / "out"
    rows = {row["id"]: row for row in rows_in(out / "rows")}
    row = rows["r20.words"]
    assert row["judge"] == {"model": "m", "verdict": "right", "reason": "in words", "verifier": "not a number"}  # fmt: skip
    assert (row["correct"], row["verdict"], row["tried"], row["passed"]) == (True, "judged right", 4, 2)  # fmt: skip
    assert (row["family"], row["level"], row["label"]) == ("algebra", 0, {"model": "m", "family": "given", "level": 1})  # fmt: skip
    assert rows["r20.wrong"]["judge"]["verdict"] == "wrong" and not rows["r20.wrong"]["correct"]
    assert "judge" not in rows["r20.right"] and "judge" not in rows["r20.cut"]
    for number in INVALID_JUDGEMENTS:
        row = rows[f"r{number}.words"]
        assert (row["correct"], row["verdict"], row["judge"]["verdict"], row["passed"]) == (False, "not a number", None, 1)  # fmt: skip
    for number in INVALID_LABELS:
        row = rows[f"r{number}.right"]
        assert (row["family"], row["level"], row.get("label")) == ("given", 1, None)
    report = read_sealed(out / "report.json")
    assert report["judge"] == {"invalid reply": 4, "right": 20, "wrong": 24}
    assert report["labels"] == {"valid": 21, "invalid reply": 3, "algebra": 21}
    said = capsys.readouterr().out
    assert "clean: judge: invalid reply 4, right 20, wrong 24" in said and "HTTP 500" in said and KEY not in said  # fmt: skip
    assert not [p for p in out.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]

    settings = [f"distill.source={out / 'rows'}", "distill.num_heldout=3", "distill.num_validation=2", "curate.level_weights=1,1,1,1,1"]  # fmt: skip
    for accept, verdict in {"true": "judged right", "false": "not a number"}.items():
        run = override(tiny(), [*settings, f"out={tmp_path / accept}", f"distill.accept_judged={accept}"])  # fmt: skip
        rollouts = {row["id"]: row for row in read_rows(distill(run) / "rollouts.jsonl", {})}
        id = next(id for id, row in rollouts.items() if id.endswith("words") and row["judge"]["verdict"])  # fmt: skip
        assert (rollouts[id]["verdict"], rollouts[id]["correct"]) == (verdict, accept == "true")
        assert "clean: judge m after not a number: right in words" in trace(run, id)


def test_a_lost_endpoint_ends_the_command_and_the_next_asks_for_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Endpoint(lambda number, before: "")
    assert main(command(tmp_path, whole)) == 0
    expected = digests(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    server = Endpoint(lambda number, before: "500" if number == 17 else "")
    words = command(tmp_path, server)
    assert main(words) == 1
    assert re.search(r"clean.judge: http.*: 4 attempts at the question 'r17\.\w+' failed, the last one: HTTP 500", capsys.readouterr().err)  # fmt: skip
    kept = server.answered.total()
    server.faults = lambda number, before: ""
    assert main(words) == 0
    assert 0 < kept < server.answered.total() == whole.answered.total()
    assert max(server.answered.values()) == 1
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("text", ["", "right", "{}", f"{RIGHT} indeed", RIGHT.replace("right", "Right"), RIGHT[:-1], f"[{RIGHT}]", '{"verdict": "right", "reason": ""}', '{"verdict": "right", "reason": "x", "more": 1}'])  # fmt: skip
def test_any_other_text_is_no_judgement(text: str) -> None:
    assert parsed(Judgement, text) is None
    assert parsed(Judgement, f"<think>{text}</think>\n {RIGHT}\n") == Judgement("right", "in words")


@pytest.mark.parametrize("text", ['{"domain": "algebra", "level": "2"}', '{"domain": "Algebra", "level": 2}', '{"domain": "algebra", "level": -1}', '{"domain": "algebra", "level": 2.5}'])  # fmt: skip
def test_any_other_text_is_no_label(text: str) -> None:
    assert parsed(Label, text) is None
    assert parsed(Label, '{"domain": "number theory", "level": 4}') == Label("number theory", 4)
