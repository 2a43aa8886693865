"""Samples of each stage's training, read from its folder and its inputs through the code that makes its micro-batches."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import Row, numbered_rows, read_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.training.batch import IGNORE, Document, pack
from phimini.stages.data.packing import Example, Rows, documents
from phimini.stages.data.row_fields import PROBLEM_FIELDS, encode_problems
from phimini.stages.data.token_files import TokenSet
from phimini.stages.report.datasets import checked
from phimini.stages.report.viewer.samples import Sample, Text, texts_of
from phimini.stages.rl.loss import weight_of
from phimini.stages.rl.pairs import LOGPS, read_pairs

T = TypeVar("T")
ROLLOUT_FIELDS = {"id": str, "prompt_id": str, "step": int, "temperature": float, "reward": float}
MOST_SAMPLES = 1000
MOST_STEPS = 20
"""of stage 4, whose steps have a file each"""


def settings_of(folder: Path) -> Row:
    """Return the settings that a stage was begun with."""
    whole = folder / "summary.json"
    return read_sealed(whole if whole.exists() else folder / "begun.json")["settings"]


def steps_of(folder: Path) -> int:
    """Return the number of steps in a stage's log."""
    return sum(1 for _ in (folder / "metrics.jsonl").open("rb"))


def drawn(items: Sequence[T], number: int = MOST_SAMPLES) -> list[T]:
    """Return a random choice of `number` items, or all, in random order."""
    return random.Random(0).sample(items, min(number, len(items)))


def packed_rows(out: Path) -> Iterator[Sample]:
    """Yield rows of stage 1 in random order, each with its documents."""
    folder, settings = out / "midtrain", settings_of(out / "midtrain")["midtrain"]
    load = lambda name: np.load(checked(out, f"midtrain/packing/{name}.npy"), mmap_mode="r")
    rows = Rows(load("documents"), load("ends"))
    examples = _tokens(out, "midtrain", loss_on_question=settings["loss_on_question"])
    for place, step, row in _taken(load("steps"), steps_of(folder)):
        of_row = [examples[i] for i in rows[row]]
        yield _sample(f"step {step + 1}, row {row + 1}", place, of_row)


def _tokens(out: Path, name: str, *, loss_on_question: bool = False) -> TokenSet:
    """Return a set of token files; each document is checked when it is read, and here their indices are."""
    for index in sorted((out / "tokenize" / name).glob("*.idx")):
        checked(out, f"tokenize/{name}/{index.name}")
    return TokenSet(
        out / "tokenize" / name, Path("curate", f"{name}.jsonl"), loss_on_question=loss_on_question
    )


def examples(out: Path) -> Iterator[Sample]:
    """Yield examples of stage 2 in random order."""
    folder = out / "sft"
    tokens = _tokens(out, "sft")
    order = np.load(checked(out, "sft/packing/steps.npy"), mmap_mode="r")
    for place, step, row in _taken(order, steps_of(folder)):
        yield _sample(f"step {step + 1}, {tokens.name_of(row)}", place, [tokens[row]])


def _taken(order: np.ndarray, steps: int) -> Iterator[tuple[int, int, int]]:
    """Yield (place, step, item) of some of the items that the first steps took. order: (steps, items of a step)."""
    size = order.shape[1]
    for place in drawn(range(steps * size)):
        yield place, place // size, int(order[place // size, place % size])


def _sample(id: str, place: int, of_row: Sequence[Example]) -> Sample:
    texts = texts_of(pack(documents(of_row)), [example.id for example in of_row])
    trained = sum(example.num_targets for example in of_row)
    size = sum(len(text.tokens) for text in texts)
    facts = {"documents": f"{len(of_row)}", "tokens": f"{size:,}", "with loss": f"{trained:,}"}
    return Sample(id=id, place=place, texts=texts, facts=facts)


def pairs(out: Path, tokenizer: Tokenizer) -> Iterator[Sample]:
    """Yield the pairs of stage 3 in random order, those with log-probs first."""
    folder = out / "rollout_dpo"
    made = settings_of(folder)
    config = made["rollout_dpo"]
    own = config["pairs"] == "policy"
    path = checked(out, "rollout_dpo/pairs.jsonl" if own else "curate/pairs.jsonl")
    found = read_pairs(path, tokenizer, tokenizer.chat_template, config["pairs_per_prompt"])
    written = (folder / LOGPS).exists()
    logps = np.load(checked(out, f"rollout_dpo/{LOGPS}")) if written else np.empty((0, 2, 2))
    first = range(len(logps)) if len(logps) else range(len(found))
    for number in drawn(first):
        pair = found[number]
        sides = [pair.chosen, pair.rejected]
        texts = texts_of(pack(documents(sides)), ["chosen", "rejected"])
        yield Sample(
            id=pair.chosen.id.removeprefix(f"{out}/").removesuffix(" (chosen)"),
            place=number,
            texts=texts,
            facts=_margin(logps[number], config["beta"]) if len(logps) else {},
        )


def _margin(logps_22: np.ndarray, beta: float) -> dict[str, str]:
    """Return implicit rewards and margin from log-probs (before and after, chosen and rejected)."""
    chosen, rejected = (beta * (logps_22[1] - logps_22[0])).tolist()
    margin = chosen - rejected
    before, after = (" / ".join(f"{x:.1f}" for x in side) for side in logps_22)
    return {
        "margin": f"{margin:+.3f}",
        "preferred": "the chosen" if margin > 0 else "the rejected",
        "reward, chosen / rejected": f"{chosen:+.3f} / {rejected:+.3f}",
        "log-prob before": before,
        "log-prob after": after,
    }


def rollouts(out: Path, tokenizer: Tokenizer) -> Iterator[Sample]:
    """Yield rollouts of stage 4: of some steps the first groups, in random order of the steps."""
    problems = read_rows(checked(out, "distill/prompts.jsonl"), PROBLEM_FIELDS)
    settings = settings_of(out / "rlvr")
    prompts = encode_problems(tokenizer, problems, tokenizer.chat_template)
    answers = {problem["id"]: problem["answer"] for problem in problems}
    for file in drawn(sorted((out / "rlvr" / "rollouts").glob("[!.]*")), MOST_STEPS):
        rows = numbered_rows(checked(out, f"rlvr/rollouts/{file.name}"), ROLLOUT_FIELDS)
        for number, row in islice(rows, MOST_SAMPLES // MOST_STEPS):
            prompt = np.array(prompts[row["prompt_id"]], np.int32)
            text, facts = _logged(row, prompt, settings["rlvr"])
            yield Sample(
                id=f"step {row['step'] + 1}, {row['id']}",
                place=row["step"] * MOST_SAMPLES + number,
                texts=[text],
                verdict="right" if row["reward"] > 0 else "wrong",
                reason=row.get("reason") or "",
                facts={"reward": f"{row['reward']:+g}", "reference": answers[row["prompt_id"]]} | facts,
            )  # fmt: skip


def _logged(row: Row, prompt: np.ndarray, config: Row) -> tuple[Text, dict[str, str]]:
    """Return a rollout of the log's tokens, with its facts. One that was not trained on has no loss weight."""
    answer, advantage = np.array(row["tokens"], np.int32), row["advantage"]
    trained = advantage is not None
    weight = weight_of(config["normalizer"], len(answer), config["max_new_tokens"])
    before = np.zeros(len(prompt) - 1)
    whole = lambda values: np.concatenate([before, np.broadcast_to(values, len(answer))])
    document = Document(
        tokens=np.concatenate([prompt, answer[:-1]]),
        targets=np.concatenate([np.full(len(before), IGNORE), answer]),
        token_fields={
            "old_logp": whole(row["logprobs"]),
            "advantage": whole(advantage if trained else np.nan),
            "weight": whole(weight * trained),
        },
    )
    updates = sorted({span["version"] for span in row["versions"]})
    facts = {
        "trained on": f"with advantage {advantage:+.3f}" if trained else "no",
        "ended": {"stop": "by itself", "length": "cut off"}[row["finish_reason"]],
        "temperature": f"{row['temperature']:.3g}",
        "sampled after update": ", ".join(map(str, updates)),
    }
    return texts_of(pack([document]), [row["prompt_id"]])[0], facts
