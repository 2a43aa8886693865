"""The pool of prompts that stage 4 trains on, chosen before the first step by sampling answers to candidates."""

from collections import defaultdict
from typing import Any

from phimini.model.io.json_files import read_json, write_json
from phimini.parallel.ranks.world import World, on_main
from phimini.stages.config.schema import RlvrConfig
from phimini.stages.rl.groups import GroupSampler, Rollout, check_room
from phimini.stages.rl.remedies import is_too_easy, select_uniform_length
from phimini.stages.run.stage_folder import Stage


def select_prompts(
    stage: Stage, sampler: GroupSampler, config: RlvrConfig, world: World
) -> list[str]:
    """Return the ids of the prompts whose answers have like lengths (remedy 1), after rounds of sampling. Collective.

    Prompts that are too easy are left out: remedy 2 would drop them at every step. Those without a right answer stay:
    remedy 2 oversamples them. Written to `pool.json`, which a resumed run reads.
    Raises ValueError as `pool_of` and `check_room`.
    """
    path = stage.path / "pool.json"
    if found := on_main(world, lambda: read_json(path) if path.name in stage.made else None):
        return found["kept"]
    candidates = list(sampler.problems)[-config.probe_prompts :]
    check_room({id: sampler.prompts[id] for id in candidates}, config, "rlvr")
    seen: dict[str, list[Rollout]] = defaultdict(list)
    for round in range(config.probe_rounds):
        asked = [(id, k) for id in candidates for k in range(config.probe_rollouts)]
        for rollout in sampler.sample(asked, round, config.start_temperature, "probe"):
            seen[rollout.prompt_id].append(rollout)
    found = pool_of(seen, config)

    def write() -> None:
        write_json(path, found)
        stage.record(path.name)

    on_main(world, write)
    return found["kept"]


def pool_of(seen: dict[str, list[Rollout]], config: RlvrConfig) -> dict[str, Any]:
    """Return `kept`, the ids of the prompts to train on, and how many were left out and why.

    seen: rollouts by prompt id. The length of an answer that was cut off is not known, so a prompt whose answers were
    all cut off is left out: their lengths would look uniform.
    Raises ValueError if no answer is right, or no prompt is left.
    """
    probed = f"of {len(seen)} probed prompts"
    answers = [rollout for rollouts in seen.values() for rollout in rollouts]
    cut = sum(rollout.truncated for rollout in answers)
    if not any(rollout.reward > 0 for rollout in answers):
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
        lengths = {id: [len(r.response) for r in rollouts] for id, rollouts in left.items()}
        kept = select_uniform_length(lengths, config.keep_share)
    return {"probed": len(seen), "too_easy": easy, "unfinished": unfinished, "kept": kept}
