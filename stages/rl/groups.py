"""Groups of scored rollouts: sampled answers, one group per prompt, which stage 4 trains on."""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sized
from functools import partial

import numpy as np

from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.timing import count, phase
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import digest
from phimini.stages.config.schema import RlvrConfig, RolloutDpoConfig, RunConfig
from phimini.stages.data.packing import EpochSampler, derive
from phimini.stages.data.row_fields import encode_problems
from phimini.stages.rl.mismatch_diagnosis import EXAMINED
from phimini.stages.rl.remedies import is_hard, next_size, temperature_at
from phimini.stages.rl.rollouts import Journal, Rollout, sample_and_score, without_answers
from phimini.stages.rollout.engine import First, PrefetchingEngine, RolloutEngine
from phimini.stages.rollout.engine import Sampler as EngineSampler
from phimini.stages.rollout.prefetch import Background
from phimini.stages.run.audits import is_audited
from phimini.stages.run.progress import StepProgress
from phimini.stages.verify.scorer import Scorer

SHORT_TOKENS = 64
"""longest answer that is sampled for the mismatch measure only"""


def check_room(
    prompts: Mapping[str, Sized], config: RlvrConfig | RolloutDpoConfig, stage: str
) -> None:
    """Raise ValueError unless each prompt and its longest answer fit into `sequence_length`.

    Called before sampling: memory is planned for rows of that length, and a sampled row cannot be dropped any more.
    """
    for id, prompt in prompts.items():
        if len(prompt) + config.max_new_tokens > config.sequence_length:
            raise ValueError(
                f"prompts.jsonl, {id!r:.60}: {len(prompt)} tokens and {stage}.max_new_tokens={config.max_new_tokens} exceed "
                f"{stage}.sequence_length={config.sequence_length}"
            )


class GroupSampler:
    """A sampler of scored rollouts by prompt id; every rank gets the facts about all, and its own answers."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        engine: EngineSampler,
        tokenizer: Tokenizer,
        problems: dict[str, dict],
        journal: Journal,
    ) -> None:
        self.run, self.config, self.world = run, run.rlvr, world
        self.engine, self.tokenizer, self.problems = engine, tokenizer, problems
        self.journal = journal
        self.collective = True
        """all ranks sample together"""
        judges = run.rollout.judges
        self.scorer = Scorer("rlvr.reward", run.rlvr.reward, judges, tokenizer.decode)
        encoded = encode_problems(tokenizer, list(problems.values()), tokenizer.chat_template)
        self.prompts = {id: np.array(tokens, np.int32) for id, tokens in encoded.items()}

    def alone(self, engine: EngineSampler) -> "GroupSampler":
        """Return this sampler with another engine, for one rank that calls it and tells no other."""
        other = copy.copy(self)
        other.engine, other.collective = engine, False
        return other

    @phase("rollout")
    def sample(
        self,
        asked: list[tuple[str, int]],
        step: int,
        temperature: float,
        purpose: str,
        *,
        group_size: int | None = None,
        journaled: bool = False,
        max_new_tokens: int | None = None,
        progress: StepProgress | None = None,
    ) -> list[Rollout]:
        """Return a rollout for each (prompt id, index within its group) in `asked`.

        purpose: part of ids and seeds. group_size: return only the first so many of each group to end. journaled: take
        what the journal has, and note what arrives. max_new_tokens: default `rlvr.max_new_tokens`. progress: told of each
        answer that arrives.
        """
        params = SamplingParams(
            temperature=temperature,
            max_new_tokens=max_new_tokens or self.config.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
        )
        ids = [id for id, _ in asked]
        prompts = [self.prompts[id].tolist() for id in ids]
        seeds = [derive(self.run.seed, "rlvr", purpose, step, id, k) for id, k in asked]
        how = (
            *self.journal.engine,
            temperature,
            params.top_p,
            params.max_new_tokens,
            params.stop_ids,
        )
        requests = [digest(how, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        first = None if group_size is None else First(ids, dict.fromkeys(ids, group_size))
        generate = partial(self.engine.generate, prompts, params, seeds, first=first)
        if journaled:
            given = prompts, params, seeds, requests, first, self.collective
            generate = partial(self.journal.generate, self.engine, *given)
        answers, facts = sample_and_score(
            generate,
            [self.problems[id] for id in ids],
            self.scorer,
            self.world,
            collective=self.collective,
            progress=progress,
            audited=self._audited(purpose, step, asked),
        )
        rollouts = [
            Rollout(
                id=f"{purpose}/{step}/{id}/{k}",
                prompt_id=id,
                step=step,
                prompt=self.prompts[id],
                temperature=temperature,
                reward=self.reward(of_one.score),
                facts=of_one,
                answer=answer,
                request=request,
            )
            for (id, k), request, answer, of_one in zip(
                asked, requests, answers, facts, strict=True
            )
            if of_one is not None
        ]
        count("samples", len(rollouts))
        count("sampled_tokens", sum(rollout.facts.length for rollout in rollouts))
        return rollouts

    def _audited(self, purpose: str, step: int, asked: list[tuple[str, int]]) -> list[bool]:
        """Return True for each verdict that is checked a second time, of those on answers to train on."""
        run = self.run
        if purpose != "rollout":
            return [False] * len(asked)
        return [is_audited(run.seed, run.audit, "rlvr", step, id, k) for id, k in asked]

    def reward(self, score: float) -> float:
        """Return the reward of a score: that of the user's function as it is, the verifier's as +1 or -1."""
        return score if self.config.reward is not None else 1.0 if score else -1.0

    def sample_groups(self, ids: list[str], step: int, temperature: float) -> list[list[Rollout]]:
        """Return a group of rollouts per prompt.

        With remedy 2 hard groups grow in rounds, until they are not hard any more or reach `oversample_to`. A prompt that
        stands twice in `ids` gets one group: a second would have the same seeds.
        """
        config, oversample = self.config, self.run.rollout.oversample
        groups: dict[str, list[Rollout]] = defaultdict(list)
        size = config.rollouts_per_prompt
        begin, end = 0, math.ceil(size * oversample)
        growing, first = list(dict.fromkeys(ids)), size if oversample > 1 else None
        with self.journal.opened(step):
            while growing:
                asked = [(id, k) for id in growing for k in range(begin, end)]
                for rollout in self.sample(
                    asked, step, temperature, "rollout", group_size=first, journaled=True
                ):
                    groups[rollout.prompt_id].append(rollout)
                begin, end, first = end, next_size(end, config.oversample_to), None
                if not config.rebalance or begin >= end:
                    break
                rewards = {id: [rollout.reward for rollout in groups[id]] for id in growing}
                growing = [id for id in growing if is_hard(rewards[id], size, config.max_accuracy)]
        return list(groups.values())

    def sample_short(self, ids: list[str], step: int, temperature: float) -> list[Rollout]:
        """Return at least EXAMINED short answers, at least one per data rank: for the mismatch measure, not for training."""
        number = max(EXAMINED, self.world.data_size)
        asked = [(ids[i % len(ids)], i // len(ids)) for i in range(number)]
        longest = min(SHORT_TOKENS, self.config.max_new_tokens)
        return self.sample(asked, step, temperature, "fresh", max_new_tokens=longest)


class RolloutSource:
    """The groups of each step, sampled when asked for or, with rollout.asynchronous, while the step before trains.

    pool: ids of the prompts to sample from.
    """

    def __init__(self, sampler: GroupSampler, engine: RolloutEngine, pool: list[str]) -> None:
        self._run, self._world = sampler.run, sampler.world
        self.sampler, self.pool = sampler, pool
        config = sampler.config
        size = min(config.prompts_per_step, len(pool))
        self._prompts = EpochSampler(len(pool), size, derive(sampler.run.seed, "rlvr"))
        self._prefetched: Background[list[list[Rollout]]] | None = None
        self._short: list[Rollout] = []
        if self._run.rollout.asynchronous:
            assert isinstance(engine, PrefetchingEngine), "build_engine allows no other"
            self._on_main = sampler.alone(engine.on_main)

    def temperature(self, step: int) -> float:
        """Return remedy 3's temperature. Like the learning rate it follows the steps, not the updates."""
        config = self._run.rlvr
        if not config.anneal:
            return config.start_temperature
        return temperature_at(step, config.steps, config.start_temperature, config.end_temperature)

    def groups(self, step: int) -> list[list[Rollout]]:
        """Return the groups of `step`, counted from 0, and start to sample the next step's if asynchronous. Collective."""
        if self._prefetched is not None:
            with phase("rollout"):
                groups = self._prefetched.result()
        else:
            groups = self.sampler.sample_groups(*self._plan(step))
        self._prefetched, self._short = None, []
        if self._run.rollout.asynchronous:
            self._prefetch(step)
        return groups

    def on_policy(self) -> list[Rollout]:
        """Return answers of the present weights, for the mismatch measure: short ones, or some for the next step.

        About EXAMINED of them, from all over the groups, at least one per data rank. Only if asynchronous. Collective.
        """
        if self._short:
            return self._short
        assert self._prefetched is not None, "before the last step the next one's answers come"
        rollouts = [rollout for group in self._prefetched.result() for rollout in group]
        return rollouts[:: max(1, len(rollouts) // max(EXAMINED, self._world.data_size))]

    def wait(self) -> None:
        """Wait until the engine is idle. Collective."""
        if self._prefetched is not None:
            self._prefetched.result()

    def _plan(self, step: int) -> tuple[list[str], int, float]:
        """Return the arguments of `sample_groups`."""
        ids = [self.pool[i] for i in self._prompts.batch(step)]
        return ids, step, self.temperature(step)

    def _prefetch(self, step: int) -> None:
        is_last = step + 1 == self._run.rlvr.steps
        if self._run.rollout.partial or is_last:
            self._short = self.sampler.sample_short(*self._plan(step))
        if not is_last:
            plan = self._plan(step + 1)
            sample = lambda: self._on_main.sample_groups(*plan)
            self._prefetched = Background(self._world, sample, without_answers)
