"""The blocks of datatrove's pipelines: our steps, as they run in process, and MinHash on words that keep their numbers."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.writers.parquet import ParquetWriter
from xxhash import xxh3_64_intdigest

from phimini.model.io.json_files import Row, read_rows
from phimini.stages.config.cleaning import CleanOptions
from phimini.stages.corpus.questions import annotated, counted, labelled, summed
from phimini.stages.corpus.shards import SCHEMA, Shard, columns, read_back, rows_of
from phimini.stages.corpus.steps import (
    Named,
    dropped,
    routed,
    verified,
    without_excerpts,
    without_loops,
)
from phimini.stages.data.decontaminate import Excerpts
from phimini.stages.data.row_index import sequence_hashes
from phimini.stages.data.set_aside import Aside
from phimini.stages.verify.scorer import Scorer

_WORD = re.compile(r"\w+|[^\w\s]")
# A language of datatrove whose words need no other package; we split words ourselves.
_NO_LANGUAGE = "ace_Arab"


class Step(PipelineStep):
    """A step over the pairs of a set and a row: `function(pairs, rank)`; the first of a pipeline gets None."""

    type = "phimini"

    def __init__(self, name: str, function: Callable[[Any, int], Iterable[Named]]) -> None:
        self.name, self.function = name, function
        super().__init__()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        pairs = data and ((doc.metadata["set"], doc.metadata["row"]) for doc in data)
        for name, row in self.function(pairs, rank):
            self.stat_update(name)
            # Only correct rows are compared: a wrong answer that is nearly the same is the other end of a pair.
            text = f"{row['question']}\n{row['response']}" if row.get("correct") else ""
            yield Document(text=text, id=row["id"], metadata={"set": name, "row": row})


class Signature(MinhashDedupSignature):
    """Signatures of texts by the hashes of sequences of words, numbers and signs, which datatrove would leave out."""

    def __init__(self, folder: str, config: MinhashConfig) -> None:
        super().__init__(folder, config, _NO_LANGUAGE)

    def get_shingles(self, text: str) -> np.ndarray:
        words = _WORD.findall(text.lower())
        hashes = {word: xxh3_64_intdigest(word) for word in set(words)}
        return sequence_hashes(
            np.fromiter(map(hashes.__getitem__, words), np.uint64), self.config.n_grams
        ).reshape(-1, 1)


def read(shards: list[Shard], options: CleanOptions) -> Step:
    return Step("read", lambda _, rank: (("rollouts", row) for row in rows_of(shards[rank], options)))  # fmt: skip


def decontaminate(options: CleanOptions, heldout: Path) -> Step:
    """Drop rows that ask or quote a question of a file of held-out ones."""

    def run(pairs: Iterable[Named], _: int) -> Iterable[Named]:
        rows = read_rows(heldout, {})
        asked = ((row["id"], row["question"]) for row in rows)
        excerpts = Excerpts(asked, options.heldout_words, masked=options.heldout_masked)
        return without_excerpts(routed(pairs, Aside(rows)), excerpts)

    return Step("decontaminate", run)


def verify() -> Step:
    return Step("verify", lambda pairs, _: verified(pairs, Scorer("clean"), 0))


def repetition(most: float | None) -> Step:
    return Step("repetition", lambda pairs, _: without_loops(pairs, most))


def judge(options: CleanOptions, answers: Path) -> Step:
    def look(pairs: Iterable[Named], rank: int) -> Iterable[Named]:
        from phimini.stages.corpus.second_look import judged  # late: it needs aiohttp

        return judged(pairs, options.judge, answers / f"judge-{rank:05d}.jsonl")

    return Step("judge", look)


def count(folder: Path) -> Step:
    return Step("count", lambda pairs, rank: counted(pairs, folder / f"{rank:05d}.npy"))


def read_checked(folder: Path) -> Step:
    """Read the rows that an earlier step has written for the same rank."""
    return Step("read", lambda _, rank: (("rollouts", row) for row in read_back(folder / f"{rank:05d}.parquet")))  # fmt: skip


def write(folder: Path, reason: str | None = None) -> ParquetWriter:
    """Write rows into a folder for each set. reason: of rows that are dropped here."""

    def adapted(_writer: ParquetWriter, document: Document) -> dict[str, Any]:
        row = document.metadata["row"]
        return columns(row if reason is None else dropped(row, reason)[1])

    name = "${set}" if reason is None else "dropped"
    return ParquetWriter(
        str(folder), f"{name}/${{rank}}.parquet", compression="zstd", adapter=adapted, batch_size=256, max_file_size=-1, schema=SCHEMA
    )  # fmt: skip


def gather(options: CleanOptions, work: Path, answers: Path, num_shards: int) -> Step:
    """Sum the counts of the questions, and ask for their labels."""

    def run(_: None, _rank: int) -> Iterable[Named]:
        parts = [work / "counts" / f"{rank:05d}.npy" for rank in range(num_shards)]
        facts = summed(parts, work / "questions.npy")
        if options.label.model is not None:
            shards = [work / "checked" / "rollouts" / f"{rank:05d}.parquet" for rank in range(num_shards)]  # fmt: skip
            labelled(facts, shards, options.label, answers / "labels.jsonl", work / "questions.npy")
        return ()

    return Step("questions", run)


def annotate(facts: Path, model: str | None) -> Step:
    def run(pairs: Iterable[Named], _: int) -> Iterable[Named]:
        rows: Iterator[Row] = (row for _, row in pairs)
        found = np.load(facts, mmap_mode="r")
        return (("rollouts", row) for row in annotated(rows, found, model))

    return Step("annotate", run)


def at_the_end(function: Callable[[], None]) -> Step:
    """Call a function in a task of its own."""

    def run(_: None, _rank: int) -> Iterable[Named]:
        function()
        return ()

    return Step("report", run)
