"""Prompts by id to groups of scored rollouts: what stage 4 trains on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phimini.model.io.chat import encode_prompt
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import Completion, SamplingParams
from phimini.parallel.ranks.collective_errors import on_main
from phimini.parallel.ranks.timing import count, phase
from phimini.parallel.ranks.world import World
from phimini.parallel.training.same_data import digest
from phimini.stages.config.schema import RlvrConfig, RolloutDpoConfig, RunConfig
from phimini.stages.config.seeds import derive
from phimini.stages.rl.mismatch_diagnosis import EXAMINED
from phimini.stages.rl.remedies import is_hard, next_size
from phimini.stages.rollout.engine import RolloutEngine
from phimini.stages.verify.verdict import verify

FEW_TOKENS = 64
"""of an answer that is sampled to be measured"""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer. `advantage` is set once its group is complete."""

    id: str
    prompt_id: str
    step: int
    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    """of the response's tokens, as sampled"""
    temperature: float
    reward: float
    truncated: bool
    versions: list[list[int]]
    """[version, start, end]: which of the trainer's updates each span of the response was sampled after"""
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response) - 1

    def digest(self) -> int:
        """Return a checksum of all that training sees."""
        spans = [list(span) for span in self.versions]
        numbers = self.temperature, self.reward, self.truncated, self.advantage
        return digest(self.id, self.prompt, self.response, self.logprobs, *numbers, spans)

    def age(self, version: int) -> int:
        """Updates since its oldest token was sampled."""
        return version - min(v for v, _, _ in self.versions)

    def ages(self, version: int) -> list[int]:
        """Of each token of the response: updates since it was sampled."""
        return [version - v for v, start, end in self.versions for _ in range(start, end)]


def check_room(
    prompts: Mapping[str, list[int]], config: RlvrConfig | RolloutDpoConfig, stage: str
) -> None:
    """ValueError before anything is sampled: memory is planned for rows of `sequence_length`, and a sampled row cannot be
    dropped any more."""
    for id, prompt in prompts.items():
        if len(prompt) + config.max_new_tokens > config.sequence_length:
            raise ValueError(
                f"prompts.jsonl, {id!r:.60}: {len(prompt)} tokens and {stage}.max_new_tokens={config.max_new_tokens} exceed "
                f"{stage}.sequence_length={config.sequence_length}"
            )


class Sampler:
    """Prompts by id to scored rollouts, identical on every rank."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        problems: dict[str, dict],
        *,
        alone: bool = False,
    ) -> None:
        """alone: one rank samples and judges, and tells the others itself."""
        self.run, self.config, self.world, self.alone = run, run.rlvr, world, alone
        self.engine, self.tokenizer, self.problems = engine, tokenizer, problems
        self.prompts = {
            id: encode_prompt(tokenizer, p["question"], run.chat_template)
            for id, p in problems.items()
        }

    @phase("rollout")
    def sample(
        self,
        asked: list[tuple[str, int]],
        step: int,
        temperature: float,
        purpose: str,
        wanted: int | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Rollout]:
        """One rollout for each (prompt id, index within its group); with `wanted`, a group may stop at so many.

        max_new_tokens: none is `rlvr.max_new_tokens`
        """
        params = SamplingParams(
            temperature=temperature,
            max_new_tokens=max_new_tokens or self.config.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
        )
        seeds = [derive(self.run.seed, "rlvr", purpose, step, id, k) for id, k in asked]
        completions = self.engine.generate_groups(
            [self.prompts[id] for id, _ in asked], params, seeds, [id for id, _ in asked], wanted
        )
        count("samples", sum(c is not None for c in completions))
        count("sampled_tokens", sum(len(c.tokens) for c in completions if c is not None))
        rewards = self.rewards([id for id, _ in asked], completions)
        return [
            Rollout(
                id=f"{purpose}/{step}/{id}/{k}",
                prompt_id=id,
                step=step,
                prompt=self.prompts[id],
                response=completion.tokens,
                logprobs=completion.logprobs,
                temperature=temperature,
                reward=rewards[i],
                truncated=completion.finish_reason == "length",
                versions=[list(span) for span in completion.versions],
            )
            for i, ((id, k), completion) in enumerate(zip(asked, completions, strict=True))
            if completion is not None
        ]

    @phase("verify")
    def rewards(self, ids: list[str], completions: Sequence[Completion | None]) -> list[float]:
        """Return each completion's reward, 0 where there is none; judged by rank 0, the same on every rank. Collective.

        A verdict has a time limit, so ranks that judged each for itself could differ.
        """
        judge = lambda: [
            0.0
            if c is None
            else reward(self.tokenizer.decode(c.tokens), c.finish_reason, self.problems[id])
            for id, c in zip(ids, completions, strict=True)
        ]
        return judge() if self.alone else on_main(self.world, judge)

    def sample_groups(self, ids: list[str], step: int, temperature: float) -> list[list[Rollout]]:
        """A group per prompt; with remedy 2, hard groups grow in rounds, until they are hard no longer or reach
        `oversample_to`.

        A prompt that stands twice in `ids` is sampled once: the second group would have the seeds of the first.
        """
        config = self.config
        groups: dict[str, list[Rollout]] = {id: [] for id in ids}
        first = config.rollouts_per_prompt
        begin, end = 0, math.ceil(first * self.run.rollout.oversample)
        more, wanted = list(groups), first
        while more:
            asked = [(id, k) for id in more for k in range(begin, end)]
            for rollout in self.sample(asked, step, temperature, "rollout", wanted):
                groups[rollout.prompt_id].append(rollout)
            begin, end, wanted = end, next_size(end, config.oversample_to), None
            if not config.rebalance or begin >= end:
                break
            rewards = {id: [rollout.reward for rollout in groups[id]] for id in more}
            more = [id for id in more if is_hard(rewards[id], first, config.max_accuracy)]
        return list(groups.values())

    def sample_few(self, ids: list[str], step: int, temperature: float) -> list[Rollout]:
        """At least EXAMINED short answers, and one for each data rank: to be measured, not trained on."""
        number = max(EXAMINED, self.world.data_size)
        asked = [(ids[i % len(ids)], i // len(ids)) for i in range(number)]
        short = min(FEW_TOKENS, self.config.max_new_tokens)
        return self.sample(asked, step, temperature, "fresh", max_new_tokens=short)


@phase("verify")
def reward(response: str, finish_reason: str, problem: dict) -> float:
    """+1 for a response that ended by itself with the right answer, -1 for any other."""
    return 1.0 if finish_reason == "stop" and verify(response, problem["answer"]) else -1.0
