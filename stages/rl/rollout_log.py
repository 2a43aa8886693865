"""Stage 4's rollouts on disk: a Parquet table of each step, and the rows of a checkpoint.

rollouts/000012.parquet is of step 12, with a row for each rollout in the order of its groups:

    id, prompt_id      string    the rollout's, and its prompt's in distill/prompts.jsonl
    step               int32     counted from 0
    temperature        float64
    reward             float64
    reason             string    the verifier's; null with the user's own rlvr.reward
    advantage          float64   null if `choose` left the rollout out
    request            int64     checksum of what was asked: prompt, seed, sampling settings, kind of engine
    finish_reason      string    stop, or length for an answer that was cut off
    versions           list      of structs version, start, end (int32), weights (int64): the weights of tokens start to
                                 end - 1, by their number of updates and their checksum
    checksum           int64     of the four fields before and after it
    tokens             list      of int32, with the stop token
    logprobs           list      of float32, of each token as it was drawn
    text               string    the decoded answer
    second             string    verdict of the second check, for the answers that `audit` chose: right, wrong or undecided

A token takes 8 bytes, and its text about 4, 2 compressed: 130 MB for a step of 1,024 answers of 12k tokens. With
rollout.log=false a table lies in checkpoints/rollouts/ instead, for a resumed run, until a checkpoint is newer.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phimini.model.io.json_files import Row, array_of, array_text, atomic_file
from phimini.parallel.checkpoint.save_load import latest_step
from phimini.parallel.ranks.world import World, on_main
from phimini.stages.config.schema import RlvrConfig
from phimini.stages.data.packing import chunks
from phimini.stages.rl.groups import GroupSampler
from phimini.stages.rl.rollouts import ANSWER, FILES, Facts, Rollout, answer_of, on_rank_0
from phimini.stages.rollout.engine import Span
from phimini.stages.run.audits import Audited, audit_counts, write_audit
from phimini.stages.run.stage_folder import Stage

OUTCOME = pa.schema(
    [
        ("id", pa.string()), ("prompt_id", pa.string()), ("step", pa.int32()), ("temperature", pa.float64()),
        ("reward", pa.float64()), ("reason", pa.string()), ("advantage", pa.float64()),
    ]
)  # fmt: skip
TABLE = pa.schema([*OUTCOME, *ANSWER, ("text", pa.string()), ("second", pa.string())])
ROW_GROUP = 64
"""rows that writer and reader have in memory: 10 MB of 12k tokens each"""
KEPT = ("id", "prompt_id", "step", "temperature", "reward", "advantage")
"""fields of a rollout that a checkpoint keeps as they are"""


def write_rollouts(
    stage: Stage,
    step: int,
    groups: list[list[Rollout]],
    chosen: list[Rollout],
    sampler: GroupSampler,
) -> None:
    """Write the table of a step, counted from 0, and delete its journals. Collective.

    chosen: those to train on, with their advantages.
    """
    rollouts, world = [rollout for group in groups for rollout in group], sampler.world
    here = {r.id: r.answer.tokens for r in rollouts if r.answer is not None}
    own = dict(zip(here, sampler.scorer.texts(here.values()), strict=True))
    texts = {id: text for part in world.gather_objects(own) for id, text in part.items()}
    rollouts, advantages = on_rank_0(rollouts, world), {r.id: r.advantage for r in chosen}

    def write() -> None:
        rows = [
            {name: getattr(r, name) for name in OUTCOME.names[:5]}
            | {"reason": r.facts.reason, "advantage": advantages.get(r.id)}
            | {"text": texts[r.id], "second": r.facts.second}
            | sampler.journal.row(r.request, r.answer, r.facts.checksum)
            for r in rollouts
            if r.answer is not None
        ]
        _write_table(stage, step, rows)
        audited = [
            (sampler.problems[r.prompt_id] | {"id": r.id, "response": texts[r.id]}, both)
            for r in rollouts
            if (both := audited_of(r, sampler.config))
        ]
        write_audit(stage, f"{step + 1:06d}", audited)

    on_main(world, write)


def audited_of(rollout: Rollout, config: RlvrConfig) -> Audited | None:
    """Return both verdicts on a rollout, None if the second check was not asked."""
    second = rollout.facts.second
    is_right = None if config.reward is not None else rollout.reward > 0
    return None if second is None else Audited(is_right, second)


def audit_metrics(rollouts: list[Rollout], config: RlvrConfig) -> Row:
    """Return the fields of a step's log about the verdicts that a second check repeated.

    audited_accuracy: the share that it calls right of those that it decided. unconfirmed: the share of all it was asked that
    have a reward above 0 and that it calls wrong. Both are absent where there is none.
    """
    pairs = [(r, both) for r in rollouts if (both := audited_of(r, config))]
    counts = audit_counts([both for _, both in pairs])
    row = {"audited": counts["audited"], "audit_undecided": counts["audited"] - counts["decided"], "audit_disagree": counts["disagree"]}  # fmt: skip
    if counts["decided"]:
        row["audited_accuracy"] = counts["accuracy"]
    if pairs:
        refused = sum(r.reward > 0 and both.second == "wrong" for r, both in pairs)
        row["unconfirmed"] = refused / len(pairs)
    return row


def _write_table(stage: Stage, step: int, rows: list[Row]) -> None:
    name, passing = f"{step + 1:06d}", stage.path / "checkpoints" / "rollouts"
    log = stage.run.rollout.log
    path = (stage.path / "rollouts" if log else passing) / f"{name}.parquet"
    # Every rank waits for this: zstd on all columns would halve the file and triple the time.
    how: dict[str, Any] = {
        "compression": {"text": "lz4"}, "use_dictionary": ["prompt_id", "reason", "finish_reason", "second"],
        "write_statistics": False, "write_page_checksum": True,
    }  # fmt: skip
    with atomic_file(path) as file, pq.ParquetWriter(file, TABLE, **how) as writer:
        for part in chunks(rows, ROW_GROUP):
            columns = [_column(field.type, [row[field.name] for row in part]) for field in TABLE]
            writer.write_table(pa.table(columns, schema=TABLE))
    if log:
        stage.note(f"rollouts/{path.name}", rows=len(rows))
    saved = latest_step(stage.path / "checkpoints") or 0
    for old in passing.glob(FILES):
        is_journal, number = old.suffix == ".arrows", int(old.name.partition(".")[0])
        if number <= saved or (number == step + 1 and is_journal):
            old.unlink()


def _column(kind: pa.DataType, values: list[Any]) -> pa.Array:
    if not isinstance(values[0], np.ndarray):
        return pa.array(values, kind)
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.concatenate(values))


def waiting_rows(rollouts: list[Rollout], world: World) -> list[Row]:
    """Return the rollouts for the checkpoint, which keeps rank 0's rows: only those have the answers. Collective."""
    return [_to_row(rollout) for rollout in on_rank_0(rollouts, world)]


def _to_row(rollout: Rollout) -> dict[str, Any]:
    """Return the rollout as JSON values; with the answer on a rank that has it."""
    row = {name: getattr(rollout, name) for name in KEPT} | {"facts": list(rollout.facts)}
    if rollout.answer is not None:
        row["tokens"] = array_text(rollout.answer.tokens)
        row["logprobs"] = array_text(rollout.answer.logprobs)
    return row


def from_row(row: dict[str, Any], prompts: dict[str, np.ndarray], world: World) -> Rollout:
    """Return a rollout of `waiting_rows`, held by rank 0. prompts: by id."""
    facts = Facts(*row["facts"])
    facts = facts._replace(versions=tuple(Span(*s) for s in facts.versions), holder=0)
    own = {name: row[name] for name in KEPT}
    answer = None
    if world.is_main:
        arrays = array_of(row["tokens"], np.int32), array_of(row["logprobs"], np.float32)
        answer = answer_of(facts, *arrays)
    return Rollout(**own, facts=facts, prompt=prompts[row["prompt_id"]], answer=answer)
