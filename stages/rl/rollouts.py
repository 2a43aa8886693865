"""Scored rollouts, and their way to the ranks that train on them.

Every rank has the facts about every rollout. Its tokens and log-probs, 8 bytes a token, are on the rank that sampled
it, and go from there to the ranks of the replica that trains on it.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from phimini.model.config import ModelConfig
from phimini.model.io.json_files import array_of, array_text
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World, on_every
from phimini.parallel.training.batch import DivergedError, digest
from phimini.stages.data.packing import flops_of, shares
from phimini.stages.rollout.engine import Arrived, Sampled, Span
from phimini.stages.verify.scorer import Answered, Scorer, Second

KEPT = ("id", "prompt_id", "step", "temperature", "reward", "advantage")
"""fields of a rollout that a checkpoint keeps as they are"""


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
    second: Second | None = None
    """verdict of the second check; None if that was not asked"""


def facts_of(completion: Sampled, score: float, holder: int, second: Second | None = None) -> Facts:
    """Return the facts about a completion that is here, on the rank `holder`."""
    c, checksum = completion, checksum_of(completion)
    return Facts(score, len(c.tokens), c.finish_reason, c.versions, checksum, holder, second)


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
    audited: Sequence[bool] | None = None,
) -> tuple[list[Sampled | None], list[Facts | None]]:
    """Return the answers that this rank has, and the facts about all, one for each of `problems`. Collective.

    generate: calls an engine with a function to call when an answer arrives. The facts about an answer that was aborted
    are None. collective: False if only this rank samples. audited: answers whose verdict is checked a second time.
    Raises on every rank as `Scorer.start`.
    """
    scores: dict[int, Callable[[], float]] = {}
    seconds: dict[int, Callable[[], Second]] = {}

    def arrived(number: int, completion: Sampled) -> None:
        problem = problems[number]
        asked = problem["question"], problem["answer"]
        item = Answered(*asked, completion.tokens, completion.finish_reason)
        scores[number] = scorer.start(item)
        if audited is not None and audited[number]:
            seconds[number] = scorer.second(item)

    here = generate(arrived)

    def own_facts() -> dict[int, Facts]:
        held = [(i, completion) for i, completion in enumerate(here) if completion is not None]
        second = lambda i: seconds[i]() if i in seconds else None
        return {i: facts_of(c, scores[i](), world.rank, second(i)) for i, c in held}

    with phase("verify"):
        mine = on_every(world, own_facts) if collective else own_facts()
        parts = world.all_gather_objects(mine) if collective else [mine]
    facts = {i: of_one for part in parts for i, of_one in part.items()}
    return here, [facts.get(i) for i in range(len(problems))]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rollout:
    """One sampled answer with its reward. `advantage` is set once its group is complete."""

    id: str
    prompt_id: str
    step: int
    prompt: np.ndarray
    """(p,) int32"""
    temperature: float
    reward: float
    facts: Facts
    answer: Sampled | None
    """tokens and log-probs; None on ranks that do not have them"""
    advantage: float = 0.0

    def __len__(self) -> int:
        """Return the number of input positions: one fewer than tokens."""
        return len(self.prompt) + self.facts.length - 1

    @property
    def truncated(self) -> bool:
        """True for an answer that was cut off at max_new_tokens."""
        return self.facts.finish_reason == "length"

    def digest(self) -> int:
        """Return a checksum of all that training sees."""
        numbers = self.temperature, self.reward, self.advantage
        facts = self.facts
        spans = [list(span) for span in facts.versions]
        return digest(self.id, self.prompt, facts.checksum, facts.finish_reason, *numbers, spans)

    def age(self, version: int) -> int:
        """Return the staleness: updates up to `version` since the oldest token was sampled."""
        return version - min(span.version for span in self.facts.versions)

    def ages(self, version: int) -> np.ndarray:
        """Return (n,) int64: the staleness of each token of the answer, in updates."""
        spans = self.facts.versions
        sizes = [span.end - span.start for span in spans]
        return np.repeat([version - span.version for span in spans], sizes)

    def to_row(self) -> dict[str, Any]:
        """Return the rollout as JSON values, for a checkpoint; with the answer on a rank that has it."""
        row = {name: getattr(self, name) for name in KEPT} | {"facts": list(self.facts)}
        if self.answer is not None:
            row["tokens"] = array_text(self.answer.tokens)
            row["logprobs"] = array_text(self.answer.logprobs)
        return row


def from_row(row: dict[str, Any], prompts: dict[str, np.ndarray], world: World) -> Rollout:
    """Return the rollout of `Rollout.to_row`, held by rank 0. prompts: by id."""
    score, length, finish_reason, spans, checksum, _, second = row["facts"]
    facts = Facts(score, length, finish_reason, tuple(Span(*s) for s in spans), checksum, 0, second)
    own = {name: row[name] for name in KEPT}
    answer = None
    if world.is_main:
        arrays = array_of(row["tokens"], np.int32), array_of(row["logprobs"], np.float32)
        answer = _answer(facts, *arrays)
    return Rollout(**own, facts=facts, prompt=prompts[row["prompt_id"]], answer=answer)


def without_answers(groups: list[list[Rollout]]) -> list[list[Rollout]]:
    """Return the groups as ranks without the answers have them."""
    return [[replace(rollout, answer=None) for rollout in group] for group in groups]


def costs_of(rollouts: Sequence[Rollout], config: ModelConfig) -> list[int]:
    """Return the FLOPs of each rollout in training."""
    return [flops_of([len(rollout)], config) for rollout in rollouts]


@phase("communication")
def to_trainers(rollouts: Sequence[Rollout], model: Model) -> list[Rollout]:
    """Return the rollouts with the answers of this data rank's share of the batch, as `micro_batches` deals it. Collective.

    The cheapest goes to every rank: one that has too few micro-batches makes an idle one of it.
    """
    world = model.world
    if world.world_size == 1 or not rollouts:
        return list(rollouts)
    costs = costs_of(rollouts, model.config)
    cheapest = min(range(len(rollouts)), key=lambda i: costs[i])
    dealt = shares(costs, world.data_size)
    wanted = [{*dealt[data_rank], cheapest} for data_rank in world.all_gather_objects(world.data_rank)]  # fmt: skip
    return delivered(rollouts, wanted, world)


def delivered(
    rollouts: Sequence[Rollout], wanted: Sequence[set[int]], world: World
) -> list[Rollout]:
    """Return the rollouts with the answers that this rank wants, and no other. Collective.

    wanted: for each rank the indices of rollouts. Raises DivergedError if an answer is not the one that was scored.
    """
    if world.world_size == 1:
        return list(rollouts)
    me, ranks = world.rank, range(world.world_size)
    lengths = [rollout.facts.length for rollout in rollouts]
    routes = {
        (source, target): [i for i in sorted(wanted[target]) if rollouts[i].facts.holder == source]
        for source in ranks
        for target in ranks
        if me in (source, target)
    }
    size = {route: sum(2 * lengths[i] for i in indices) for route, indices in routes.items()}
    answers = [rollouts[i].answer for target in ranks for i in routes[me, target]]
    sent = [part for a in answers if a is not None for part in (a.tokens, a.logprobs.view(np.int32))]  # fmt: skip
    given = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *sent])).to(world.device)
    taken = given.new_empty(sum(size[source, me] for source in ranks))
    sizes = [size[source, me] for source in ranks], [size[me, target] for target in ranks]
    dist.all_to_all_single(taken, given, *sizes)
    arrays, here = taken.cpu().numpy(), {}
    for i in (i for source in ranks for i in routes[source, me]):
        tokens, logprobs, arrays = np.split(arrays, [lengths[i], 2 * lengths[i]])
        here[i] = _answer(rollouts[i].facts, tokens, logprobs.view(np.float32))
        if checksum_of(here[i]) != rollouts[i].facts.checksum:
            raise DivergedError(f"{rollouts[i].id}: rank {me} got other tokens than were scored")
    return [replace(rollout, answer=here.get(i)) for i, rollout in enumerate(rollouts)]


def _answer(facts: Facts, tokens: np.ndarray, logprobs: np.ndarray) -> Sampled:
    return Sampled(
        tokens=tokens,
        logprobs=logprobs,
        finish_reason=facts.finish_reason,  # pyright: ignore[reportArgumentType]
        versions=facts.versions,
    )
