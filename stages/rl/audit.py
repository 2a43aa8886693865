"""Audit of rewards: some of a step's answers, judged a second time by a verifier that has no part in the reward.

The second verdict is math-verify's on the whole response, as lighteval uses it (`verify/lenient.py`). It reads another
text than the reward's verifier, which looks at the last box alone, and shares no code with it. A policy that learns to
please the reward raises the share of rewarded answers that the audit refuses.
"""

from itertools import chain, zip_longest
from typing import Any

from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World
from phimini.stages.rl.groups import GroupSampler
from phimini.stages.rl.rollouts import Rollout
from phimini.stages.verify.symbolic import lenient


@phase("verify")
def audit(
    groups: list[list[Rollout]], sampler: GroupSampler, number: int, world: World
) -> dict[str, Any]:
    """Return `audited_accuracy` and `unconfirmed` of up to `number` answers: the first of each group, then the second. Collective.

    audited_accuracy: the share that has a reward above 0 and is right by the audit. unconfirmed: the share that has such a
    reward and is not. Each rank judges the answers that it has. Nothing without answers.
    """
    in_turn = chain.from_iterable(zip_longest(*groups))
    asked = [rollout for rollout in in_turn if rollout is not None][:number]
    own = {
        r.id: is_confirmed(sampler, r) for r in asked if r.reward > 0 and r.answer is not None
    }  # fmt: skip
    if not asked:
        return {}
    found = [verdict for part in world.all_gather_objects(own) for verdict in part.values()]
    right = sum(found)
    return {
        "audited_accuracy": right / len(asked),
        "unconfirmed": (len(found) - right) / len(asked),
    }


def is_confirmed(sampler: GroupSampler, rollout: Rollout) -> bool:
    """Return the second verdict on an answer that is on this rank. Raises ImportError without math-verify."""
    assert rollout.answer is not None, "the rank that has the answer judges it"
    response = sampler.tokenizer.decode(rollout.answer.tokens)
    return lenient.compare(response, sampler.problems[rollout.prompt_id]["answer"]) == "equal"
