"""Model cards from the records of a run, and pushes to a hub on the loopback: what it is sent, and what is said without it."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from benchmark_cases import write_model
from huggingface_hub import ModelCard

from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.publish.card import write_card
from phimini.stages.rollout.launch import free_port
from phimini.stages.run.outputs import write_summary
from phimini.stages.run.stage_folder import settings

TOKEN = "hf_SecretOfThisTest"
REPO = "someone/phimini-tiny"
COUNTS = {
    "distill": {"rollouts": 1200, "correct": 1000, "dropped": 7, "prompts": 300}, "curate": {"midtrain": 1000, "sft": 500},
    "base": {}, "midtrain": {"steps": 40, "tokens": 40_960, "seconds": 30.5}, "sft": {"steps": 20, "tokens": 10_000, "seconds": 100.0},
}  # fmt: skip
SCORES = {
    "num_problems": 504, "num_samples": 8, "greedy": {"accuracy": 0.625, "ci95": [0.58, 0.67]}, "mean_at_8": 0.75,
    "ci95": [0.71, 0.79], "pass_at_8": 0.9, "truncated": 0.01, "response_length": 61.4,
    "settings": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 160, "judge": None},
}  # fmt: skip


def made(folder: Path, *words: str) -> RunConfig:
    """Write the records of a run up to stage 2, with a random model of one layer in each stage."""
    run = override(tiny(), [f"out={folder}", "seed=3", *words])
    for name, counts in COUNTS.items():
        if name not in ("distill", "curate"):
            write_model(folder / name / "model")
        write_summary(folder / name, {"id": f"id-{name}", "settings": settings(run, name)} | counts)
    for name in ("base", "sft"):
        (folder / "evaluate").mkdir(exist_ok=True)
        write_sealed(folder / "evaluate" / f"{name}.json", {"stage": name, "model_id": f"id-{name}"} | SCORES)  # fmt: skip
    return run


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    made(tmp_path / "runs" / "small")
    return tmp_path / "runs" / "small" / "sft"


def test_a_card_says_what_the_records_say(stage: Path) -> None:
    text = write_card(stage).read_text()
    for words in (
        "# small-sft\n", "trained with PhiMini from random weights, up to the stage SFT of the recipe", "arithmetic problems of a few kinds",
        "Held-out problems of the run, 504 of them", "| SFT | 75.0\xa0% [71.0, 79.0] | 62.5\xa0% [58.0, 67.0] | 90.0\xa0% | 1.0\xa0% | 61 |",
        "8 samples of each problem at temperature 0.6 and top-p 0.95, at most 160 tokens", "1,200 rollouts, 1,000 of them correct by the verifier; 7 rows",
        "| SFT | 20 | 10,000 | 1.7 min |", "| Mid-training | 40 | 40,960 | 30 s |", "\nsft.optimizer.lr=0.0008\n", "\nseed=3\n",
        "ends at `<|end|>` or `<|endoftext|>`", "- Later stages of the recipe are not part of this model: Rollout DPO, RL.",
        "- No published benchmark was run on it.", "- This is one run, with seed 3: another seed may differ", "no test of safety",
    ):  # fmt: skip
        assert words in text, words
    assert "Mid-training | 75" not in text, "it has no evaluation"
    head: Any = ModelCard.load(stage / "model" / "README.md").data
    assert head.library_name == "transformers" and head.model_name == "small-sft"
    (score,) = head.eval_results
    assert (score.metric_name, score.metric_value, score.dataset_name) == ("mean@8", 75.0, "held-out problems of the run")  # fmt: skip


def test_scores_of_another_model_are_left_out(stage: Path) -> None:
    summary = {k: v for k, v in read_sealed(stage / "summary.json").items() if k != "files"}
    write_summary(stage, summary | {"id": "made again"})
    text = write_card(stage).read_text()
    assert "| Base | 75" in text and "| SFT | 75" not in text
    assert "- This model was not evaluated on the run's held-out problems." in text


@pytest.mark.parametrize("same", [True, False], ids=["of this model", "of another"])
def test_benchmarks_of_exactly_this_model_are_shown(same: bool, stage: Path) -> None:
    sha256 = read_sealed(stage / "summary.json")["files"]["model/model.safetensors"]["sha256"]
    folder = stage.parent / "benchmarks" / "sft"
    folder.mkdir(parents=True)
    row = {"num_questions": 30, "k": 64, "strict": [0.5, 0.4, 0.6], "lenient": [0.55, 0.45, 0.65]}
    write_sealed(folder / "benchmarks.json", {"files": {"model.safetensors": sha256 if same else "0"}, "benchmarks": {"aime24": row}})  # fmt: skip
    text = write_card(stage).read_text()
    assert (
        "| aime24 | 30 | 64 | 50.0\xa0% [40.0, 60.0] | 55.0\xa0% [45.0, 65.0] |" in text
    ) == same
    assert ("No published benchmark" in text) == (not same)


def test_a_card_names_no_folder_and_no_address_of_the_machine(tmp_path: Path) -> None:
    private = [f"base={tmp_path}/models/mine", f"chat_template={tmp_path}/chat.jinja", f"distill.source={tmp_path}/rows.jsonl",
               "distill.teacher.url=http://inside.example:8000/v1", "distill.teacher.model=org/big", f"model={tmp_path}/config.json"]  # fmt: skip
    made(tmp_path / "run", *private)
    text = write_card(tmp_path / "run" / "sft").read_text()
    assert str(tmp_path) not in text and "inside.example" not in text
    for shown in ("from `mine`", "chat_template=chat.jinja", "Source: `rows.jsonl`", "distill.teacher.model=big", "model=config.json"):  # fmt: skip
        assert shown in text, shown
    assert "No licence of the training data is recorded" in text and "arithmetic" not in text
    assert "data that its base model was trained on were not compared" in text


# --- push ----------------------------------------------------------------------------------------
class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub that a push of small files asks for, with a log of what it was sent."""

    log: list[tuple[str, str, dict | list]]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines() if line]
        self.log.append((self.path, self.headers.get("Authorization", ""), lines))
        answer: dict = {"error": "Invalid user token."}
        if self.status == 200:
            answer = {"url": f"http://{self.headers['Host']}/{REPO}", "name": REPO}
            if "/preupload/" in self.path:
                answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]]}  # fmt: skip
            elif "/commit/" in self.path:
                answer = {"commitUrl": f"http://{self.headers['Host']}/{REPO}/commit/1", "commitOid": "1", "hookOutput": "", "success": True}  # fmt: skip
        text = json.dumps(answer).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """Serve a hub, and yield its address and its handler."""
    handler = type("OfOneTest", (Hub,), {"log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def push(*words: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `phimini push` with an environment of its own: the client reads it when it is imported."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(home)}
    command = [sys.executable, "-P", "-W", "ignore", "-m", "phimini.stages.cli", "push", *words]
    return subprocess.run(command, env=own | variables, capture_output=True, text=True, timeout=120)


def test_a_push_sends_the_models_files_and_the_card(stage: Path, hub: tuple[str, type[Hub]], tmp_path: Path) -> None:  # fmt: skip
    url, handler = hub
    (stage / "model" / "notes.txt").write_text("mine")
    done = push(str(stage), f"repo={REPO}", home=tmp_path / "hf", HF_ENDPOINT=url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"sent: {url}/{REPO}/commit/1" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert {key for _, key, _ in handler.log if key} == {f"Bearer {TOKEN}"}
    (asked,) = (lines for path, _, lines in handler.log if path == "/api/repos/create")
    assert asked[0]["visibility"] == "private"
    (sent,) = (lines for path, _, lines in handler.log if "/commit/" in path)
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in sent if line["key"] == "file"}  # fmt: skip
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    assert sorted(files) == names, "nothing else that lies in the folder"
    assert all(content == (stage / "model" / name).read_bytes() for name, content in files.items())
    assert sent[0]["value"]["summary"] == "sft of small"


def test_a_hub_that_refuses_is_one_sentence(stage: Path, hub: tuple[str, type[Hub]], tmp_path: Path) -> None:  # fmt: skip
    url, handler = hub
    handler.status = 401
    done = push(str(stage), f"repo={REPO}", home=tmp_path / "hf", HF_ENDPOINT=url, HF_TOKEN=TOKEN)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert (
        re.match(f"phimini: push: {url}/{REPO}: .*401.*", done.stderr) and TOKEN not in done.stderr
    )


OFFLINE = {
    "offline": ({"HF_HUB_OFFLINE": "1"}, [], "nothing is sent: offline; it would go to https://huggingface.co/" + REPO),
    "dry run": ({}, ["--dry-run"], "nothing is sent: --dry-run; it would go to https://huggingface.co/" + REPO),
    "no network": ({"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:PORT"}, [], "nothing is sent: the Hub cannot be reached"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OFFLINE)
def test_without_a_connection_it_says_what_it_would_send(kind: str, stage: Path, tmp_path: Path) -> None:  # fmt: skip
    variables, more, line = OFFLINE[kind]
    port = str(free_port("127.0.0.1"))
    variables = {name: value.replace("PORT", port) for name, value in variables.items()}
    done = push(str(stage), f"repo={REPO}", *more, home=tmp_path / "hf", **variables)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout and TOKEN not in done.stdout + done.stderr
    for file in (stage / "model").iterdir():
        assert f"{file.stat().st_size:,} bytes  {file.name}\n" in done.stdout
    assert " bytes in 6 files\n" in done.stdout and "README.md" in done.stdout


BAD = {
    "no repo": (["runs/small/sft"], "push: expected repo=OWNER/NAME, got None"),
    "bad repo": (["runs/small/sft", "repo=me/a--b..c"], "Cannot have -- or .. in repo_id"),
    "no token": (["runs/small/sft", f"repo={REPO}"], "push: expected the Hub's token in the environment variable HF_TOKEN"),
    "not a stage": (["runs/small", f"repo={REPO}"], "runs/small: expected the folder of a stage in a run, e.g. runs/tiny/rlvr, one of base, midtrain"),
    "not there": (["runs/other/sft", f"repo={REPO}"], "runs/other/sft: expected the folder of a stage in a run"),
    "not complete": (["runs/small/rlvr", f"repo={REPO}"], "runs/small/rlvr is not complete; run `phimini rlvr` first"),
    "no model": (["runs/small/base", f"repo={REPO}"], "runs/small/base/model: the exported model is missing"),
    "damaged": (["runs/small/midtrain", f"repo={REPO}"], "model.safetensors: has 0 bytes, expected [0-9,]+ bytes: the file is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence(kind: str, stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    from phimini.stages.cli import main

    words, message = BAD[kind]
    (stage.parent / "rlvr" / "model").mkdir(parents=True)
    (stage.parent / "base" / "model" / "config.json").unlink()
    (stage.parent / "midtrain" / "model" / "model.safetensors").write_bytes(b"")
    if kind in ("no token", "bad repo", "no repo"):
        made(stage.parent)
    monkeypatch.chdir(stage.parents[2])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["push", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said
