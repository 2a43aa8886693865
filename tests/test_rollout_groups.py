"""Groups of rollouts as stage 4 asks for them: how many, of which prompts, with which seeds."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rollout_cases import LONG

from phimini.model.sampler import SamplingParams
from phimini.model.tokenizer import train_tiny_tokenizer
from phimini.parallel.launch import run_ranks
from phimini.parallel.layout import Layout
from phimini.parallel.world import initialize
from phimini.stages import rollout_groups
from phimini.stages.config import override
from phimini.stages.recipes import tiny
from phimini.stages.rollout_engine import Sampled, Span
from phimini.stages.rollout_groups import Rollout, Sampler


class Seeded:
    """An engine whose answer is its seed."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def generate_groups(
        self, prompts: list, params: SamplingParams, seeds: list[int], groups: list, wanted: Any
    ) -> list[Sampled]:
        self.calls.append(len(prompts))
        return [
            Sampled(
                tokens=[(seed >> 8 * i) % 256 % 200 for i in range(7)],
                logprobs=[-1.0] * 7,
                finish_reason="stop",
                versions=(Span(0, 0, 7),),
            )
            for seed in seeds
        ]


def sampled(
    ids: list[str], right: Mapping[str, set[int]], words: list[str]
) -> tuple[list[list[Rollout]], list[int]]:
    """The groups, and how many answers each call of the engine gave. right: which of a prompt's answers are."""
    run = override(tiny(), words)
    asked: Counter[str] = Counter()

    def reward(response: str, finish_reason: str, problem: dict) -> float:
        asked[problem["id"]] += 1
        return 1.0 if asked[problem["id"]] - 1 in right.get(problem["id"], ()) else -1.0

    rollout_groups.reward = reward
    tokenizer = train_tiny_tokenizer(["What is 1 + 1?"] * 3, vocab_size=256)
    problems = {id: {"id": id, "question": f"What is {id}?", "answer": "1"} for id in ids}
    engine: Any = Seeded()
    sampler = Sampler(run, initialize(Layout(), LONG), engine, tokenizer, problems)
    return sampler.sample_groups(ids, 5, 1.0), engine.calls


def test_a_prompt_twice_in_a_step_gives_no_rollout_twice() -> None:
    groups, _ = run_ranks(sampled, 1, ["a", "b", "a"], {}, ["rlvr.oversample_to=16"])[0]
    rollouts = [rollout for group in groups for rollout in group]
    assert len(rollouts) == len({r.id for r in rollouts}) == len({tuple(r.response) for r in rollouts})  # fmt: skip
    assert [{r.prompt_id for r in group} for group in groups] == [{"a"}, {"b"}]
