"""A teacher behind an endpoint that fails in every way, or whose client is killed: each answer is there once and asked for once."""

import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rollout_cases import LONG, reference
from rollout_processes import until
from vllm_process import ForkedServer, find_metadata

from phimini.model.io.chat import TEMPLATES
from phimini.model.io.checked_files import read_sealed
from phimini.model.io.huggingface import save_reference
from phimini.model.io.json_files import read_rows, write_rows
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.stages.cli import main
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.curate import curate
from phimini.stages.data import teacher
from phimini.stages.data.check_rows import check_files
from phimini.stages.data.teacher import Journal
from phimini.stages.distill import distill
from phimini.stages.rollout.launch import free_port

KEY = "sk-a-secret"
FAULTS = ("500", "stall", "empty", "no choices", "half", "429", "hang up", "control", "fewer", "more", "thoughts")  # fmt: skip


class Endpoint(ThreadingHTTPServer):
    """An endpoint that answers a sum, and has a fault for a question's first requests."""

    daemon_threads = True

    def __init__(self, faults: Callable[[str, int], str] = lambda question, number: "") -> None:
        self.faults, self.lock = faults, threading.Lock()
        self.seen: dict[str, list[float]] = defaultdict(list)
        """times of the requests of each question"""
        self.told: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.delay_s = 0.0
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/chat/completions" and asked["model"] == "sums"
        if self.headers["authorization"] != f"Bearer {KEY}":
            return self.say(401, f"wrong key: {self.headers['authorization']}".encode())
        instruction, _, question = asked["messages"][0]["content"].partition("\n")
        assert "\\boxed" in instruction and asked["temperature"] == 0.6
        with server.lock:
            fault = server.faults(question, len(server.seen[question]))
            server.seen[question].append(time.monotonic())
            server.told[fault] += 1
        time.sleep(server.delay_s)
        self.answer(fault, question, asked)

    def answer(self, fault: str, question: str, asked: dict[str, Any]) -> None:
        number = asked["n"] + {"fewer": -1, "more": 2}.get(fault, 0)
        a, b = map(int, re.findall(r"\d+", question))
        choices = []
        for k in range(number):
            right = (asked["seed"] + k) % 3 > 0
            text = f"{asked['seed']}.{k}: \\boxed{{{a + b if right else 1}}}"
            text = {"empty": " ", "control": f"{text}<|end|>"}.get(fault, text)
            message = {"content": text} | (
                {"reasoning_content": " add "} if fault == "thoughts" else {}
            )
            choices.append({"index": k, "message": message, "finish_reason": "stop" if k < 2 else "length"})  # fmt: skip
        usage = {"prompt_tokens": 7, "completion_tokens": 10 * number, "total_tokens": 0}
        body = json.dumps({"choices": [] if fault == "no choices" else choices, "usage": usage}).encode()  # fmt: skip
        if fault == "stall":
            time.sleep(4)
        elif fault == "hang up":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault in ("500", "429"):
            return self.say(int(fault), b"later", {"retry-after": "1"} if fault == "429" else {})
        if fault == "half":
            return self.say(200, body[: len(body) // 2])
        if fault not in ("stall", "no choices"):
            with self.server.lock:  # pyright: ignore[reportAttributeAccessIssue]
                self.server.tokens.update(usage)  # pyright: ignore[reportAttributeAccessIssue]
        elif fault == "no choices":
            self.server.tokens.update(usage)  # pyright: ignore[reportAttributeAccessIssue]
        self.say(200, body)

    def say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has given the request up, or was killed
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIMINI_TEACHER_KEY", KEY)
    monkeypatch.setattr(teacher, "FIRST_WAIT_S", 0.01)


def run_of(folder: Path, url: str, *more: str, number: int = 40) -> RunConfig:
    rows = [{"id": f"q{n}", "question": f"What is {n} + {3 * n}?", "answer": str(4 * n), "licence": "MIT"} for n in range(100, 100 + number)]  # fmt: skip
    write_rows(folder / "questions.jsonl", rows)
    words = [
        f"distill.source={folder / 'questions.jsonl'}", f"out={folder / 'run'}", "distill.teacher.model=sums", f"distill.teacher.url={url}",
        "distill.num_heldout=6", "distill.num_validation=4", "distill.rollouts_per_problem=4", "curate.sft_examples=20",
        "distill.teacher.concurrency=8",
    ]  # fmt: skip
    return override(tiny(), [*words, *more])


def check_answers(run: RunConfig, number: int = 34) -> list[dict[str, Any]]:
    """Return the answers, after a check that each question that is not held out has four different ones, in order."""
    folder = Path(run.out) / "distill"
    rows = read_rows(folder / "teacher" / "rollouts.jsonl", {})
    held = {row["id"] for row in read_rows(folder / "heldout.jsonl", {})}
    asked = [f"q{n}" for n in range(100, 106 + number) if f"q{n}" not in held]
    assert [row["id"] for row in rows] == [f"{id}/{k}" for id in asked for k in range(4)]
    texts = [row["response"] for row in rows if row["response"]]
    assert len(set(texts)) == len(texts), "an answer is taken twice"
    assert [p.name for p in (folder / "teacher").iterdir()] == ["rollouts.jsonl"]
    return rows


def test_no_fault_loses_or_doubles_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = lambda question: int(re.findall(r"\d+", question)[0])
    server = Endpoint(lambda question, n: FAULTS[(place(question) + 4 * n) % len(FAULTS)] if n < 3 else "")  # fmt: skip
    prices = ["distill.teacher.prompt_price=500000", "distill.teacher.answer_price=1000000"]
    run = run_of(tmp_path, server.url, "distill.teacher.per_request=4", "distill.teacher.timeout_s=2", *prices)  # fmt: skip
    distill(run)
    rows = check_answers(run)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("distill: sums: "))
    printed = {name: int(n.replace(",", "")) for name, n in re.findall(r"(?:: |, )([A-Za-z0-9 ]+?) ([\d,]+)(?=,|$)", line)}  # fmt: skip
    told = server.told
    assert all(told[fault] for fault in FAULTS), told
    expected = {
        "answers": len(rows), "requests": told.total(), "HTTP 500": told["500"], "HTTP 429": told["429"], "empty text": told["empty"],
        "a control token": told["control"], "no choices": told["no choices"], "malformed reply": told["half"],
        "ServerDisconnectedError": told["hang up"], "no answer within 2 s": told["stall"],
        "prompt tokens": server.tokens["prompt_tokens"], "answer tokens": server.tokens["completion_tokens"],
        "cut off": sum(row["finish_reason"] == "length" for row in rows),
    }  # fmt: skip
    assert {name: printed.get(name) for name in expected} == expected, line
    cost = server.tokens["prompt_tokens"] / 2 + server.tokens["completion_tokens"]
    assert line.endswith(f"cost {cost:,.2f}"), line
    assert KEY not in said
    verified = read_rows(tmp_path / "run" / "distill" / "rollouts.jsonl", {})
    assert {row["verdict"] for row in verified} == {"equal", "different", "cut off"}
    row = next(row for row in verified if row["correct"] and row["response"].startswith("<think>\nadd\n</think>\n\n"))  # fmt: skip
    assert (row["teacher"], row["licence"], row["origin"]) == ("sums", "MIT", f"{tmp_path / 'questions.jsonl'}:{int(row['problem_id'][1:]) - 99}")  # fmt: skip
    assert row["sampling"] == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 16384, "seed": row["sampling"]["seed"]}  # fmt: skip
    curate(run)
    files = read_sealed(tmp_path / "run" / "distill" / "summary.json")["files"]
    assert "teacher/rollouts.jsonl" in files
    assert not [p for p in tmp_path.rglob("*.*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_a_rate_limit_holds_every_request_back(tmp_path: Path) -> None:
    server = Endpoint(lambda question, n: "429" if question.startswith("What is 105") and n == 0 else "")  # fmt: skip
    server.delay_s = 0.02
    run = run_of(tmp_path, server.url, "distill.num_heldout=2", number=30)
    distill(run)
    assert server.told["429"] == 1, "its question is not held out"
    (limited,) = [times[0] for q, times in server.seen.items() if q.startswith("What is 105")]
    others = [t - limited for times in server.seen.values() for t in times]
    assert [t for t in others if t > 1.0] and not [t for t in others if 0.4 < t < 0.95]


def test_an_endpoint_that_stays_empty_gives_an_answer_that_was_cut_off(tmp_path: Path) -> None:
    server = Endpoint(lambda question, n: "empty" if question.startswith("What is 11") else "")
    run = run_of(tmp_path, server.url, "distill.teacher.attempts=3")
    distill(run)
    empty = [row for row in check_answers(run) if row["question"].startswith("What is 11")]
    assert empty and {(row["response"], row["finish_reason"]) for row in empty} == {("", "length")}
    assert {len(times) for q, times in server.seen.items() if q.startswith("What is 11")} == {12}


def test_a_refusal_and_a_lost_endpoint_end_the_command_and_the_next_one_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Endpoint(lambda question, n: "500" if question.startswith("What is 12") else "")
    run = run_of(tmp_path, server.url)
    words = ["distill", "tiny", *[f"distill.{k}={v}" for k, v in {
        "source": run.distill.source, "teacher.model": "sums", "teacher.url": server.url, "num_heldout": 6, "num_validation": 4,
        "rollouts_per_problem": 4, "teacher.attempts": 3, "teacher.concurrency": 2}.items()], f"out={run.out}", "curate.sft_examples=20"]  # fmt: skip
    monkeypatch.setenv("PHIMINI_TEACHER_KEY", "sk-wrong")
    assert main(words) == 2
    said = capsys.readouterr()
    assert "refuses the question" in said.err and "HTTP 401: wrong key: Bearer ***" in said.err
    assert "sk-wrong" not in said.err + said.out
    monkeypatch.setenv("PHIMINI_TEACHER_KEY", KEY)
    assert main(words) == 1
    assert re.search(r"3 attempts at the question 'q12\d' failed, the last one: HTTP 500; the answers so far are kept", capsys.readouterr().err)  # fmt: skip
    assert main([*words, "distill.teacher.temperature=0.5"]) == 2
    assert "distill.teacher.temperature=0.6, now it is 0.5" in capsys.readouterr().err
    before = server.told[""]
    server.faults = lambda question, number: ""
    assert main([*words, "distill.teacher.concurrency=4"]) == 0
    rows = check_answers(run)
    assert server.told[""] == len(rows) and 0 < before < len(rows), "none is asked for again"


def test_the_questions_are_checked_before_any_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distill.teacher.model=sums: expected distill.source to have its questions, got generator"):  # fmt: skip
        override(tiny(), ["distill.teacher.model=sums"])
    run = run_of(tmp_path, "http://127.0.0.1:9/v1")
    path = tmp_path / "questions.jsonl"
    assert check_files(run, path, None, lambda prompts: None, print) == []
    with path.open("a") as file:
        file.write('{"question": "What?", "answer": "1", "level": 3}\n')
    [message] = check_files(run, path, None, lambda prompts: None, print)
    assert "line 41, field 'level': expected 0 to 2" in message
    with pytest.raises(ValueError, match="line 41, field 'level': expected 0 to 2"):
        distill(run)


# --- kills ----------------------------------------------------------------------------------------
def test_a_killed_run_asks_for_what_is_missing_and_gives_the_same_bytes(tmp_path: Path) -> None:
    server = Endpoint()
    whole = run_of(tmp_path, server.url, f"out={tmp_path / 'whole'}")
    distill(whole)
    server.delay_s = 0.05
    run = run_of(tmp_path, server.url)
    journal = tmp_path / "run" / "distill" / "teacher" / "rollouts.journal"
    total = len(check_answers(whole))
    for share in (0.2, 0.6):
        process = multiprocessing.get_context("fork").Process(target=distill, args=(run,))
        process.start()
        until(lambda share=share: journal.exists() and journal.read_bytes().count(b"\n") > share * total)  # fmt: skip
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with journal.open("ab") as file:
            file.write(journal.read_bytes()[:100])  # a torn line
    kept = journal.read_bytes().count(b"\n")
    time.sleep(0.5)  # the requests that the kill left
    before = server.told.total()
    distill(run)
    assert server.told.total() - before == total - kept
    for name in ("teacher/rollouts", "rollouts", "validation", "prompts", "heldout", "dropped"):
        ours, theirs = ((Path(r.out) / "distill" / f"{name}.jsonl").read_bytes() for r in (run, whole))  # fmt: skip
        assert ours == theirs, name


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    path.write_bytes(b'{"question": "q", "id": "1"}\n\0\0\0\n')
    with pytest.raises(ValueError, match=r"a.journal: malformed line at byte 29"):
        Journal(path)


# --- the real thing -------------------------------------------------------------------------------
@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[str]:
    """Serve a tiny export by a plain `vllm serve`, without our plugin; yield the address of its endpoint."""
    folder = tmp_path / "model"
    tokenizer = train_tiny_tokenizer(["What is 1 + 1? Please reason step by step"] * 9, vocab_size=256)  # fmt: skip
    save_reference(reference(LONG, 1), folder, stop_ids=tokenizer.stop_ids)
    tokenizer.save(folder, chat_template=TEMPLATES["instruct"])
    find_metadata()
    port = free_port("127.0.0.1")
    words = ["vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny",
             "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager",
             "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048", "--kv-cache-memory-bytes", str(1 << 25),
             "--generation-config", "vllm", "--uvicorn-log-level", "warning"]  # fmt: skip
    own = {"VLLM_PLUGINS": "", "VLLM_API_KEY": KEY, "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    server = ForkedServer(words, dict(os.environ) | own)

    def is_up() -> bool:
        assert server.poll() is None, "vllm serve ended"
        with socket.socket() as asking:
            return asking.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(is_up, 300)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its core too, which without our plugin outlives it
        server.wait(10)


@pytest.mark.vllm
def test_a_real_vllm_serve_is_asked(
    vllm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"q{n}", "question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(12)]  # fmt: skip
    write_rows(tmp_path / "questions.jsonl", rows)
    run = override(tiny(), [
        f"distill.source={tmp_path / 'questions.jsonl'}", f"out={tmp_path / 'run'}", "distill.teacher.model=tiny", f"distill.teacher.url={vllm}",
        "distill.num_heldout=2", "distill.num_validation=2", "distill.rollouts_per_problem=3", "distill.teacher.per_request=2",
        "distill.teacher.max_tokens=12", "distill.teacher.temperature=1",
    ])  # fmt: skip
    with pytest.raises(ValueError, match="distill: rollouts: none of the 24 that are left is correct"):  # fmt: skip
        distill(run)  # it has random weights
    answers = read_rows(tmp_path / "run" / "distill" / "teacher" / "rollouts.jsonl", {})
    assert len({row["id"] for row in answers}) == len(answers) == 30
    assert len({row["response"] for row in answers}) > 25, "each has a seed of its own"
    assert {row["finish_reason"] for row in answers} <= {"stop", "length"}
    said = capsys.readouterr().out
    tokens = int(re.findall(r"answer tokens (\d+)", said)[0])
    assert 30 <= tokens <= 30 * 12 and re.search(r"answers 30,.* requests 20", said), said
    wrong = override(run, ["distill.teacher.model=other", f"out={tmp_path / 'other'}"])
    with pytest.raises(ValueError, match=r"refuses the question 'q\d+': HTTP 404: .*`other` does not exist"):  # fmt: skip
        distill(wrong)
