"""The pool of prompts that stage 4 trains on, chosen before the first step by sampling answers to candidates."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phimini.model.io.json_files import Row, read_json, read_rows, write_json
from phimini.parallel.ranks.world import World, on_main
from phimini.stages.config.schema import RlvrConfig
from phimini.stages.rl.groups import GroupSampler, check_room
from phimini.stages.rl.remedies import is_too_easy, select_uniform_length
from phimini.stages.rl.slices import in_slices
from phimini.stages.run.progress import StepProgress
from phimini.stages.run.stage_folder import Stage

PROBE_FIELDS = {"prompt_id": str, "length": int, "reward": float, "truncated": bool}


class Probed(NamedTuple):
    """One answer of the probe."""

    length: int
    """tokens"""
    reward: float
    truncated: bool


def select_prompts(
    stage: Stage, sampler: GroupSampler, config: RlvrConfig, world: World
) -> list[str]:
    """Return the ids of the prompts whose answers have like lengths (remedy 1), after rounds of sampling. Collective.

    Prompts that are too easy are left out: remedy 2 would drop them at every step. Those without a right answer stay:
    remedy 2 oversamples them. The answers' lengths and rewards go to files of `probe/`, the pool to `pool.json`: a resumed
    run reads those. Raises ValueError as `pool_of` and `check_room`, and for files of another probe.
    """
    path = stage.path / "pool.json"
    if found := on_main(world, lambda: read_json(path) if path.name in stage.made else None):
        return found["kept"]
    candidates = list(sampler.problems)[-config.probe_prompts :]
    check_room({id: sampler.prompts[id] for id in candidates}, config, "rlvr")

    def rows_of(part: list[str], progress: StepProgress, round: int) -> list[Row]:
        asked = [(id, k) for id in part for k in range(config.probe_rollouts)]
        return [
            {
                "prompt_id": r.prompt_id,
                "length": r.facts.length,
                "reward": r.reward,
                "truncated": r.truncated,
            }
            for r in sampler.sample(
                asked, round, config.start_temperature, "probe", progress=progress
            )
        ]

    files = [
        file
        for round in range(config.probe_rounds)
        for file in in_slices(
            stage, f"probe/{round + 1}", candidates, config.probe_rollouts, world,
            lambda part, progress, round=round: rows_of(part, progress, round),
        )
    ]  # fmt: skip

    def write() -> list[str]:
        seen: dict[str, list[Probed]] = defaultdict(list)
        for row in (row for file in files for row in read_rows(file, PROBE_FIELDS)):
            seen[row["prompt_id"]].append(Probed(row["length"], row["reward"], row["truncated"]))
        number = config.probe_rounds * config.probe_rollouts
        if {id: len(answers) for id, answers in seen.items()} != dict.fromkeys(candidates, number):
            raise ValueError(
                f"{files[0].parent.parent}: expected {number} answers to each of {len(candidates)} prompts; use --redo"
            )
        found = pool_of(seen, config)
        write_json(path, found)
        stage.record(path.name)
        return found["kept"]

    return on_main(world, write)


def pool_of(seen: Mapping[str, Sequence[Probed]], config: RlvrConfig) -> dict[str, Any]:
    """Return `kept`, the ids of the prompts to train on, and how many were left out and why.

    seen: answers by prompt id. The length of an answer that was cut off is not known, so a prompt whose answers were
    all cut off is left out: their lengths would look uniform.
    Raises ValueError if no answer is right, or no prompt is left.
    """
    probed = f"of {len(seen)} probed prompts"
    answers = [answer for of_prompt in seen.values() for answer in of_prompt]
    cut = sum(answer.truncated for answer in answers)
    if not any(answer.reward > 0 for answer in answers):
        raise ValueError(
            f"rlvr: {probed} none is answered right in {len(answers)} answers, {cut} of them cut off at "
            f"max_new_tokens={config.max_new_tokens}; the stage-3 model is too weak for them"
        )
    most = config.max_accuracy if config.rebalance else 1.0
    left = {id: rs for id, rs in seen.items() if not is_too_easy([r.reward for r in rs], most)}
    easy = len(seen) - len(left)
    if config.uniform_length:
        left = {id: rs for id, rs in left.items() if not all(r.truncated for r in rs)}
    unfinished = len(seen) - easy - len(left)
    if not left:
        raise ValueError(
            f"rlvr: {probed} {easy} are too easy (more than {most:g} of their answers right, or all) and {unfinished} were "
            f"never answered to the end within max_new_tokens={config.max_new_tokens}; none is left to train on"
        )
    kept = list(left)
    if config.uniform_length:
        lengths = {id: [answer.length for answer in of_prompt] for id, of_prompt in left.items()}
        kept = select_uniform_length(lengths, config.keep_share)
    return {"probed": len(seen), "too_easy": easy, "unfinished": unfinished, "kept": kept}
