"""Facts of each question over all shards: rollouts, correct ones, and the labels of a model, 18 bytes a question."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from phimini.model.io.json_files import Row, atomic_file
from phimini.stages.config.cleaning import DOMAINS
from phimini.stages.config.data_steps import TeacherConfig
from phimini.stages.corpus.shards import read_back
from phimini.stages.corpus.steps import Named
from phimini.stages.data.row_fields import text_hash

UNKNOWN = -1
FACTS = np.dtype([("question", "<i8"), ("tried", "<i4"), ("passed", "<i4"), ("domain", "i1"), ("level", "i1")])  # fmt: skip
"""question: a hash of its text. domain: a place in DOMAINS. UNKNOWN where no valid label is there"""


def place_of(question: str) -> int:
    return int.from_bytes(text_hash(question), "little", signed=True)


def counted(given: Iterable[Named], path: Path) -> Iterator[Named]:
    """Yield the rows of a shard, and then write the counts of its questions into `path`."""
    tried: Counter[int] = Counter()
    passed: Counter[int] = Counter()
    for name, row in given:
        if name != "dropped" or row["reason"] == "repetition":
            place = place_of(row["question"])
            tried[place] += 1
            passed[place] += row["correct"]
        yield name, row
    counts = [(place, number, passed[place], UNKNOWN, UNKNOWN) for place, number in tried.items()]
    _save(path, np.array(counts, FACTS))


def summed(parts: Iterable[Path], path: Path) -> np.ndarray:
    """Return the facts of all questions from the counts of the shards, in order of the hash, and write them into `path`."""
    counts = np.concatenate([np.load(part) for part in parts])
    questions, places = np.unique(counts["question"], return_inverse=True)
    facts = np.zeros(len(questions), FACTS)
    facts["question"], facts["domain"], facts["level"] = questions, UNKNOWN, UNKNOWN
    for name in ("tried", "passed"):
        np.add.at(facts[name], places, counts[name])
    _save(path, facts)
    return facts


def labelled(facts: np.ndarray, shards: Sequence[Path], config: TeacherConfig, answers: Path, path: Path) -> None:  # fmt: skip
    """Add a model's labels of the questions, each of which is asked once, and write the facts into `path`. Errors as in `ask`."""
    from phimini.stages.corpus.second_look import Label, replies  # late: it needs aiohttp

    def questions() -> Iterator[Row]:
        is_new = np.ones(len(facts), bool)
        for row in (row for shard in shards for row in read_back(shard)):
            number = _number_of(facts, place_of(row["question"]))
            if is_new[number]:
                is_new[number] = False
                yield {"id": str(facts["question"][number]), "question": f"\n{row['question']}"}

    for id, label in replies(config, "clean.label", questions, answers, Label):
        number = _number_of(facts, int(id))
        if label is not None:
            facts["domain"][number] = DOMAINS.index(label.domain)
            facts["level"][number] = label.level
    _save(path, facts)


def _number_of(facts: np.ndarray, place: int) -> int:
    return int(np.searchsorted(facts["question"], place))


def annotated(given: Iterable[Row], facts: np.ndarray, model: str | None) -> Iterator[Row]:
    """Yield rows with `tried` and `passed` of their question and, where `model` gave a valid label, its family and level."""
    for row in given:
        fact = facts[_number_of(facts, place_of(row["question"]))]
        row |= {"tried": int(fact["tried"]), "passed": int(fact["passed"])}
        if fact["domain"] != UNKNOWN:
            row["label"] = {"model": model, "family": row["family"], "level": row["level"]}
            row |= {"family": DOMAINS[fact["domain"]], "level": int(fact["level"])}
        yield row


def _save(path: Path, facts: np.ndarray) -> None:
    with atomic_file(path) as file:
        np.save(file, facts)
