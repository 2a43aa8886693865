"""Curation: the training sets of the stages, chosen from the verified rollouts by the rules of `data/selection.py`.

Writes `curate/`: `midtrain.jsonl` (all verified-correct rollouts, repeated texts once), `sft.jsonl` (a compact subset of
it, balanced over families and levels), `pairs.jsonl` (a correct and a rejected teacher rollout of the same question,
for stage 3's pairs as in the paper) and `steps.npy` (what became of each rollout, for `phimini data`). The rollouts are read
twice, once into an index of 34 bytes a row, so they may exceed the memory.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import Row, atomic_file, write_rows
from phimini.stages.config.schema import RunConfig
from phimini.stages.data import selection
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import has_ended, is_correct
from phimini.stages.data.row_index import RowIndex, index_rows
from phimini.stages.run.outputs import SUMMARY
from phimini.stages.run.progress import tracked, work
from phimini.stages.run.stage_folder import Stage


def curate(run: RunConfig, *, redo: bool = False) -> Path:
    """Write the training sets into curate/ and return the folder. Not collective: one process calls it.

    Raises ValueError if stage 2 or 3 would find no row to train on.
    """
    stage = Stage.open(run, "curate", redo=redo)
    if stage.complete:
        _check_pairs(run, read_sealed(stage.path / SUMMARY)["pairs"])
        return stage.path
    stage.prepare(redo=redo)
    config, rollouts = run.curate, Path(run.out) / "distill" / "rollouts.jsonl"
    number = read_sealed(rollouts.with_name(SUMMARY))["rollouts"]
    with work("curate index", number, run.out) as progress:
        loops = config.max_repetition is not None
        index = index_rows(rollouts, with_repetition=loops, note=progress.advance)
    correct = selection.verified(index)
    seed = derive(run.seed, "curate")
    subset = selection.balanced_subset(index, correct, config, seed)
    if not len(subset):
        raise ValueError(
            f"curate.level_weights: no level of the {len(correct)} correct rollouts has a weight above 0"
        )
    pairs = selection.preference_pairs(index, config, seed)
    kept = np.ones(len(pairs), bool)
    copied = lambda name, places: tracked(places, work(f"curate {name}", len(places), run.out))
    index.copy(copied("midtrain.jsonl", correct), stage.path / "midtrain.jsonl")
    index.copy(copied("sft.jsonl", subset), stage.path / "sft.jsonl")
    write_rows(stage.path / "pairs.jsonl", pair_rows(index, copied("pairs.jsonl", pairs), kept))
    pairs = pairs[kept]
    _check_pairs(run, len(pairs))
    with atomic_file(stage.path / "steps.npy") as file:
        np.save(file, steps_of(index, correct, subset, pairs, config.max_repetition))
    counts = {"midtrain": len(correct), "sft": len(subset), "pairs": len(pairs)}
    stage.finish(counts | {"refused_pairs": int((~kept).sum())})
    return stage.path


def _check_pairs(run: RunConfig, num_pairs: int) -> None:
    if run.rollout_dpo.pairs == "teacher" and not num_pairs:
        raise ValueError(
            "rollout_dpo.pairs=teacher: no question has a correct and an incorrect rollout, e.g. because the rollouts "
            "were filtered; add incorrect ones, or sample the pairs with rollout_dpo.pairs=policy"
        )


def pair_rows(index: RowIndex, pairs: Iterable[np.ndarray], kept: np.ndarray) -> Iterator[Row]:
    """Yield the rows of pairs whose ends get the same verdict again, and clear `kept` for the others.

    `rejected_ended` is False for an answer that was cut off.
    """
    rows = index.rows(chain.from_iterable(pairs))
    for number, (chosen, rejected) in enumerate(zip(rows, rows, strict=True)):
        kept[number] = is_correct(chosen) and not is_correct(rejected)
        if kept[number]:
            yield {
                "id": f"{chosen['id']}|{rejected['id']}",
                "problem_id": chosen["problem_id"],
                "family": chosen["family"],
                "level": chosen["level"],
                "question": chosen["question"],
                "answer": chosen["answer"],
                "chosen": chosen["response"],
                "rejected": rejected["response"],
                "rejected_ended": has_ended(rejected),
                "source": "teacher",
            }


def steps_of(
    index: RowIndex,
    correct: np.ndarray,
    subset: np.ndarray,
    pairs: np.ndarray,
    max_repetition: float | None,
) -> np.ndarray:
    """Return the bits of `selection.STEPS` of each rollout, (rollouts,) uint8."""
    is_copy = np.ones(len(index), bool)
    is_copy[selection.distinct(index, np.arange(len(index)))] = False
    loops = index.repetitions > 100 * (1.0 if max_repetition is None else max_repetition)
    steps = np.zeros(len(index), np.uint8)
    members = (correct, subset, pairs[:, 0], pairs[:, 1], is_copy, loops)
    for bit, places in enumerate(members):
        steps[places] |= 1 << bit
    return steps
