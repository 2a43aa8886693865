"""A stage's model in a plain `vllm serve` and in transformers: a question in words gets the same greedy tokens as here."""

import contextlib
import json
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from own_model_cases import CHATML, write_own
from vllm_process import ForkedServer, find_metadata

from phimini.model.io.chat import encode_prompt
from phimini.model.io.huggingface import load_reference, save_reference
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams, sample
from phimini.stages.rollout.launch import engine_environment, free_port

pytestmark = pytest.mark.vllm
QUESTIONS = ("What is 2 + 3?", "Solve x - 4 = 11 for x.", "Hello <think> there")


def ask(url: str, question: str) -> dict:
    body = {"model": "own", "messages": [{"role": "user", "content": question}], "temperature": 0.0, "max_tokens": 40, "return_token_ids": True}  # fmt: skip
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def test_a_served_export_answers_a_conversation_as_we_do(tmp_path: Path) -> None:
    write_own(tmp_path)
    folder, tokenizer = tmp_path / "export", Tokenizer.load(tmp_path / "llama")
    model = load_reference(tmp_path / "llama")
    save_reference(model, folder, stop_ids=tokenizer.stop_ids)
    tokenizer.save(folder, chat_template=CHATML)
    find_metadata()
    port = free_port("127.0.0.1")
    words = [
        "vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "own", "--dtype",
        "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 25), "--max-num-seqs", "4",
    ]  # fmt: skip
    server = ForkedServer(words, engine_environment("", str(tmp_path), "") | {"VLLM_PLUGINS": "", "VLLM_API_KEY": ""})  # fmt: skip
    try:
        end = time.monotonic() + 300
        while time.monotonic() < end and server.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            time.sleep(0.1)
        params = SamplingParams(temperature=0.0, max_new_tokens=40, stop_ids=tokenizer.stop_ids)
        for question in QUESTIONS:
            found = ask(f"http://127.0.0.1:{port}", question)
            prompt = encode_prompt(tokenizer, question, CHATML)
            (answer,) = sample(model, [prompt], params, [0])
            assert found["prompt_token_ids"] == prompt
            assert found["choices"][0]["token_ids"] == answer.tokens.tolist() != []
    finally:
        server.kill()
        server.wait()
