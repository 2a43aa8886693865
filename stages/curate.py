"""Curation: the training sets of the stages, chosen from the verified rollouts.

Writes `curate/`: `midtrain.jsonl` (all verified-correct rollouts, repeated texts once), `sft.jsonl` (a compact subset of
it, balanced over families and levels) and `pairs.jsonl` (a correct and a rejected teacher rollout of
the same question, for stage 3's pairs as in the paper).
"""

import random
from collections import defaultdict
from pathlib import Path

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import read_rows, write_rows
from phimini.stages.config.schema import CurateConfig, RunConfig
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import ROLLOUT_FIELDS, has_ended
from phimini.stages.run.outputs import SUMMARY
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
    rollouts = read_rows(Path(run.out) / "distill" / "rollouts.jsonl", ROLLOUT_FIELDS)
    correct = distinct([row for row in rollouts if row["correct"]])
    subset = balanced_subset(correct, run.curate, derive(run.seed, "curate"))
    if not subset:
        raise ValueError(
            f"curate.level_weights: no level of the {len(correct)} correct rollouts has a weight above 0"
        )
    pairs = teacher_pairs(rollouts)
    _check_pairs(run, len(pairs))
    write_rows(stage.path / "midtrain.jsonl", correct)
    write_rows(stage.path / "sft.jsonl", subset)
    write_rows(stage.path / "pairs.jsonl", pairs)
    stage.finish({"midtrain": len(correct), "sft": len(subset), "pairs": len(pairs)})
    return stage.path


def _check_pairs(run: RunConfig, num_pairs: int) -> None:
    if run.rollout_dpo.pairs == "teacher" and not num_pairs:
        raise ValueError(
            "rollout_dpo.pairs=teacher: no question has a correct and an incorrect rollout, e.g. because the rollouts "
            "were filtered; add incorrect ones, or sample the pairs with rollout_dpo.pairs=policy"
        )


def distinct(rows: list[dict]) -> list[dict]:
    """Return the rows without later copies of the same response to the same question."""
    first = {(row["problem_id"], row["response"]): row for row in reversed(rows)}
    return [row for row in rows if first[row["problem_id"], row["response"]] is row]


def balanced_subset(rows: list[dict], config: CurateConfig, seed: int) -> list[dict]:
    """Return `sft_examples` rows: equal over families, by `level_weights` over levels, with many different questions.

    A cell of family and level with too few rows gives all it has; the others add the difference in proportion to their
    weight. seed: of the random choice within a cell.
    """
    rng = random.Random(seed)
    cells: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        cells[row["family"], row["level"]].append(row)
    for cell in cells.values():
        rng.shuffle(cell)
        asked: dict[str, int] = defaultdict(int)
        order = []
        for row in cell:
            order.append((asked[row["problem_id"]], len(order), row))
            asked[row["problem_id"]] += 1
        cell[:] = [row for _, _, row in sorted(order, key=lambda item: item[:2])]
    weights = {cell: level_weight(config, cell[1]) for cell in cells}
    quotas = water_fill(
        {cell: len(members) for cell, members in cells.items()}, weights, config.sft_examples
    )
    chosen = [row for cell in sorted(cells, key=str) for row in cells[cell][: quotas[cell]]]
    rng.shuffle(chosen)
    return chosen


def level_weight(config: CurateConfig, level: int) -> float:
    """Return the weight of a level. Raises ValueError for a level without one."""
    if not 0 <= level < len(config.level_weights):
        raise ValueError(
            f"curate.level_weights has {len(config.level_weights)} values; a rollout has level {level}"
        )
    return config.level_weights[level]


def water_fill(sizes: dict, weights: dict, total: int) -> dict:
    """Return whole-number quotas in proportion to weight, at most each group's size, that add up to min(total, all)."""
    quotas = dict.fromkeys(sizes, 0)
    left = min(total, sum(size for cell, size in sizes.items() if weights[cell] > 0))
    while left:
        open_cells = [cell for cell in sizes if quotas[cell] < sizes[cell] and weights[cell] > 0]
        scale = left / sum(weights[cell] for cell in open_cells)
        given = 0
        for cell in open_cells:
            add = min(int(scale * weights[cell]), sizes[cell] - quotas[cell])
            quotas[cell] += add
            given += add
        if not given:  # fewer left than cells: one each, the heaviest first
            for cell in sorted(open_cells, key=lambda c: (-weights[c], str(c)))[:left]:
                quotas[cell] += 1
                given += 1
        left -= given
    return quotas


def teacher_pairs(rollouts: list[dict]) -> list[dict]:
    """Return rows of pairs per question, a correct and a rejected rollout each; no text is used twice.

    `rejected_ended` is False for an answer that was cut off. An answer that was cut off before its first word is left out.
    """
    questions: dict[str, dict[bool, list[dict]]] = defaultdict(lambda: {True: [], False: []})
    for row in distinct(rollouts):
        if row["response"] or has_ended(row):
            questions[row["problem_id"]][row["correct"]].append(row)
    return [
        {
            "id": f"{chosen['id']}|{rejected['id']}",
            "problem_id": problem_id,
            "family": chosen["family"],
            "level": chosen["level"],
            "question": chosen["question"],
            "answer": chosen["answer"],
            "chosen": chosen["response"],
            "rejected": rejected["response"],
            "rejected_ended": has_ended(rejected),
            "source": "teacher",
        }
        for problem_id, verdicts in questions.items()
        for chosen, rejected in zip(verdicts[True], verdicts[False], strict=False)
    ]
