"""Division of a source's questions: held out, for validation, prompts of stage 4; the rest is trained on.

The questions wait in a temporary database on the disk: those of ten million rollouts do not fit into memory.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from phimini.model.io.json_files import Row
from phimini.stages.config.schema import DistillConfig
from phimini.stages.data.decontaminate import Questions
from phimini.stages.data.row_fields import text_hash

_FIELDS = ("family", "level", "question", "answer", "origin", "source", "licence")


class Aside:
    """The questions that no stage trains on; `of` returns the set that a question is of, also in other words."""

    def __init__(self, heldout: Sequence[Row], validation: Sequence[Row] = ()) -> None:
        self._sets = [("heldout", row["id"]) for row in heldout]
        self._sets += [("validation", row["id"]) for row in validation]
        self._questions = Questions(row["question"] for row in (*heldout, *validation))
        self.of = lru_cache(maxsize=1000)(self._of)  # a question's rollouts follow one another

    def _of(self, question: str) -> tuple[str, str] | None:
        """Return the name of a set and the id of its question, or None for a question to train on."""
        match = next(self._questions.matches(question), None)
        return None if match is None else self._sets[match]


class AskedQuestions:
    """The different questions of a source, in an order that depends on `heldout_seed` and their texts alone.

    So a question that is held out stays so when others are added. `note` counts the verdicts on each one's rollouts.
    """

    def __init__(self, rows: Iterable[Row], config: DistillConfig) -> None:
        self._config = config
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(
            "PRAGMA journal_mode=OFF; BEGIN; CREATE TABLE asked "
            "(place BLOB PRIMARY KEY, row, tried DEFAULT 0, correct DEFAULT 0) WITHOUT ROWID"
        )
        for row in rows:
            problem = {"id": row.get("problem_id", row["id"])}
            problem |= {field: row[field] for field in _FIELDS if field in row}
            values = self._place(row["question"]), json.dumps(problem)
            self._db.execute("INSERT OR IGNORE INTO asked (place, row) VALUES (?, ?)", values)

    def _place(self, question: str) -> bytes:
        return text_hash(f"held out {self._config.heldout_seed}", question)

    def divide(self) -> tuple[list[Row], list[Row]]:
        """Return the held-out and the validation questions, the first in the order; paraphrases of one count once.

        Raises ValueError if they leave none to train on.
        """
        config, chosen, seen = self._config, [], Questions()
        aside = config.num_heldout + config.num_validation
        for row in self._rows("SELECT row FROM asked ORDER BY place"):
            if row["question"] in seen:
                continue
            if len(chosen) == aside:
                return chosen[: config.num_heldout], chosen[config.num_heldout :]
            seen.add(row["question"])
            chosen.append(row)
        raise ValueError(
            f"distill.source={config.source}: {len(chosen)} different questions; num_heldout={config.num_heldout} and "
            f"num_validation={config.num_validation} leave none to train on"
        )

    def note(self, row: Row) -> None:
        """Count the verdict on a rollout. Rows of `clean` have the counts of their question, some of whose rollouts are gone."""
        counted = "UPDATE asked SET tried = tried + 1, correct = correct + ? WHERE place = ?"
        values = [row["correct"], self._place(row["question"])]
        if {"tried", "passed"} <= row.keys():
            counted = "UPDATE asked SET tried = ?, correct = ? WHERE place = ?"
            values[:1] = row["tried"], row["passed"]
        self._db.execute(counted, values)

    def prompts(self) -> list[Row]:
        """Return `num_prompts` questions to train on whose pass rate is in the window of the config.

        "drop prompts whose group accuracy exceeds a threshold, e.g., 50%" (a summary of arXiv 2504.21233, stage 4): here by
        the teacher's rollouts, before the policy's own are sampled. All pass rates are in the default window. Questions that
        are set aside, in whatever words, have no verdict noted and so no pass rate.
        """
        config = self._config
        found = self._rows(
            "SELECT row FROM asked WHERE CAST(correct AS REAL) / tried BETWEEN ? AND ? ORDER BY place",
            (config.min_pass_rate, config.max_pass_rate),
        )
        chosen, seen = [], Questions()
        for row in found:
            if len(chosen) < config.num_prompts and row["question"] not in seen:
                seen.add(row["question"])
                chosen.append(row)
        return chosen

    def _rows(self, query: str, values: tuple = ()) -> Iterator[Row]:
        return (json.loads(row) for (row,) in self._db.execute(query, values))
