"""Sampled answers and their scores: each answer is scored once, as it arrives, on the rank that has it."""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World, on_every
from phimini.parallel.training.batch import digest
from phimini.stages.rollout.engine import Arrived, Sampled, Span
from phimini.stages.verify.scorer import Answered, Scorer


class Facts(NamedTuple):
    """The facts about one answer that every rank has; its tokens and log-probs are on the rank `holder`."""

    score: float
    length: int
    """tokens"""
    finish_reason: str
    versions: tuple[Span, ...]
    checksum: int
    """of tokens and log-probs"""
    holder: int


def facts_of(completion: Sampled, score: float, holder: int) -> Facts:
    """Return the facts about a completion that is here, on the rank `holder`."""
    c, checksum = completion, checksum_of(completion)
    return Facts(score, len(c.tokens), c.finish_reason, c.versions, checksum, holder)


def checksum_of(completion: Sampled) -> int:
    """Return a checksum of tokens and log-probs, for accidents; twice as fast as `digest` of them."""
    return digest(zlib.crc32(completion.tokens.data), zlib.crc32(completion.logprobs.data))


def sample_and_score(
    generate: Callable[[Arrived], list[Sampled | None]],
    problems: Sequence[dict],
    scorer: Scorer,
    world: World,
    *,
    collective: bool = True,
) -> tuple[list[Sampled | None], list[Facts | None]]:
    """Return the answers that this rank has, and the facts about all, one for each of `problems`. Collective.

    generate: calls an engine with a function to call when an answer arrives. The facts about an answer that was aborted
    are None. collective: False if only this rank samples. Raises on every rank as `Scorer.start`.
    """
    scores: dict[int, Callable[[], float]] = {}

    def arrived(number: int, completion: Sampled) -> None:
        problem = problems[number]
        asked = problem["question"], problem["answer"]
        scores[number] = scorer.start(Answered(*asked, completion.tokens, completion.finish_reason))

    here = generate(arrived)

    def own_facts() -> dict[int, Facts]:
        held = [(i, completion) for i, completion in enumerate(here) if completion is not None]
        return {i: facts_of(completion, scores[i](), world.rank) for i, completion in held}

    with phase("verify"):
        mine = on_every(world, own_facts) if collective else own_facts()
        parts = world.all_gather_objects(mine) if collective else [mine]
    facts = {i: of_one for part in parts for i, of_one in part.items()}
    return here, [facts.get(i) for i in range(len(problems))]
