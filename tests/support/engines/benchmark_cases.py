"""A small model, self-made questions in the public layouts of the benchmarks, and evaluations that are killed."""

import csv
import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from phimini.model.config import preset
from phimini.model.io.chat import TEMPLATES
from phimini.model.io.huggingface import save_reference
from phimini.model.io.json_files import write_rows
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.model.reference import Phi4Mini
from phimini.stages.benchmarks.journal import Journal
from phimini.stages.benchmarks.questions import BENCHMARKS
from phimini.stages.rollout.engine import LocalEngine

ADDITIONS = [(17, 25), (30, 41), (8, 9)]
SMALL = ["k=4", "max_new_tokens=12", "rollout.max_batch=4"]
OTHER_REQUEST = "Please solve the following problem step by step, with the answer within \\boxed{}."


def additions() -> list[tuple[str, str]]:
    return [(f"What is {a} + {b}?", str(a + b)) for a, b in ADDITIONS]


def write_data(folder: Path) -> Path:
    """Write three questions of each benchmark, in the layout and format of a public copy."""
    folder.mkdir()
    verl = [
        {"prompt": [{"role": "user", "content": f"{OTHER_REQUEST}\n{q}"}], "reward_model": {"ground_truth": a, "style": "rule"}}
        for q, a in additions()
    ]  # fmt: skip
    write_parquet(folder / "aime24.parquet", verl * 4)  # one copy repeats its rows
    prompt = [{"prompt": f"{q}\n{BENCHMARKS['aime25'].request}", "answer": int(a)} for q, a in additions()]  # fmt: skip
    write_rows(folder / "aime25.jsonl", prompt)
    math = [
        {"problem": q, "solution": f"\\boxed{{{a}}}", "answer": a, "subject": f"Subject {i % 2}", "level": i + 1, "unique_id": f"m/{i}"}
        for i, (q, a) in enumerate(additions())
    ]  # fmt: skip
    (folder / "math500").mkdir()
    write_rows(folder / "math500" / "test.jsonl", math)
    with (folder / "gpqa_diamond.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)), "Subdomain", "Record ID"])  # fmt: skip
        rows.writeheader()
        for i, (q, a) in enumerate(additions()):
            rows.writerow({"Question": f"{q}\nTake your time, please.", "Correct Answer": a, "Incorrect Answer 1": "1, or 2", "Incorrect Answer 2": "3",
                           "Incorrect Answer 3": '"four"', "Subdomain": "Sums", "Record ID": f"g{i}"})  # fmt: skip
    write_rows(folder / "gsm8k_test.jsonl", [{"question": q, "answer": f"Add them.\n#### {a}"} for q, a in additions()])  # fmt: skip
    olympiad = [{"id": i, "question": q, "final_answer": [a, "$x$"], "subfield": "Algebra"} for i, (q, a) in enumerate(additions())]  # fmt: skip
    write_rows(folder / "olympiadbench.jsonl", olympiad)
    aqua = [{"question": q, "options": ["A)1", f"B){a}"], "rationale": "Add.", "correct": "B"} for q, a in additions()]  # fmt: skip
    write_rows(folder / "aqua_rat.jsonl", aqua)
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_model(folder: Path, max_positions: int = 512) -> Path:
    """Write a Hugging Face folder with random weights."""
    texts = [
        f'"{b.request} {q} Take your time, please. \\boxed{{{a}}}'
        for b in BENCHMARKS.values()
        for q, a in additions()
    ]
    tokenizer = train_tiny_tokenizer(texts * 3)
    config = dataclasses.replace(preset("tiny"), num_layers=1, max_positions=max_positions)
    model = Phi4Mini(config)
    model.init_weights(1)
    save_reference(model, folder, stop_ids=tokenizer.stop_ids)
    tokenizer.save(folder, chat_template=TEMPLATES["reasoning"])
    return folder


def evaluation_words(given: Path, out: Path, *more: str, names: str = "math500") -> list[str]:
    return ["evaluate", f"{given}/model", f"benchmarks={names}", f"data={given}/data", f"out={out}", *SMALL, *more]  # fmt: skip


def journalled(out: Path) -> list[list[Any]]:
    """Return the samples in all journals, without a torn line."""
    lines = [line for path in sorted(out.glob("samples/*")) for line in path.read_bytes().split(b"\n")[1:-1]]  # fmt: skip
    return [json.loads(line) for line in lines]


def rows(out: Path, name: str = "math500") -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(out / f"{name}.parquet").to_pylist()


def log_of_seeds(path: Path, kind: Any = LocalEngine) -> None:
    """Let an engine write down the seeds that it is asked for."""
    generate = kind.generate

    def noted(engine: Any, prompts: Any, params: Any, seeds: list[int], *args: Any) -> Any:
        path.write_text(json.dumps(seeds))
        return generate(engine, prompts, params, seeds, *args)

    kind.generate = noted


def killed_at(number: int, torn: bool, seeds: Path, kind: Any = LocalEngine) -> Callable[[], None]:
    """Return a `prepare` that kills the process after so many samples, or with half a line of the next one written."""

    def prepare() -> None:
        log_of_seeds(seeds, kind)
        write, left = Journal.write, [number]

        def counted(journal: Any, *args: Any) -> None:
            if torn and not left[0]:
                journal._file.write(b'["m/2", 1, "half')
                os.kill(os.getpid(), signal.SIGKILL)
            write(journal, *args)
            left[0] -= 1
            if not torn and not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.write = counted  # pyright: ignore[reportAttributeAccessIssue]

    return prepare
