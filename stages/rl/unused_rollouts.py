"""Why stage 4 did not train on what it sampled: counts over its steps, and the error where no step made an update."""

from phimini.stages.config.schema import RlvrConfig
from phimini.stages.rl.groups import Rollout
from phimini.stages.rl.remedies import is_too_easy


def is_masked(rollout: Rollout, config: RlvrConfig) -> bool:
    """Whether a rollout that was cut off is left out of its group."""
    return rollout.truncated and config.truncated == "masked"


def count_unused(
    unused: dict[str, int], groups: list[list[Rollout]], row: dict, config: RlvrConfig
) -> None:
    """Add a step, of which `row` is the log's, to the counts of groups and rollouts by why they were not trained on."""
    rewards = [[r.reward for r in group if not is_masked(r, config)] for group in groups]
    most = config.max_accuracy if config.rebalance else 1.0
    for name, number in {
        "groups": len(groups),
        "all_cut_off": sum(not group for group in rewards),
        "all_wrong": sum(bool(group) and max(group) < 0 for group in rewards),
        "too_easy": sum(bool(group) and is_too_easy(group, most) for group in rewards),
        "too_stale": row["too_stale"],
    }.items():
        unused[name] = unused.get(name, 0) + number


def no_update(unused: dict[str, int], waiting: int, config: RlvrConfig, max_staleness: int) -> str:
    """The error of a stage whose model is still the one that it began with."""
    return (
        f"rlvr: no update was made in {config.steps} steps. Of {unused['groups']} groups {unused['all_wrong']} had no right "
        f"answer, {unused['too_easy']} were too easy (all right, or above rlvr.max_accuracy with rlvr.rebalance) and "
        f"{unused['all_cut_off']} were cut off at rlvr.max_new_tokens={config.max_new_tokens}; {unused['too_stale']} rollouts "
        f"were older than rollout.max_staleness={max_staleness} updates; {waiting} usable rollouts were left at the end, "
        f"fewer than rlvr.min_rollouts={config.min_rollouts}"
    )
