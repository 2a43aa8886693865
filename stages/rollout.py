"""Rollout engines: token ids in, sampled token ids and their log-probs out.

The local engine samples with the reference model on every rank, each its share of the prompts; a
sample depends on its prompt, its seed and the weights only, so the number of ranks changes nothing.
"""

from pathlib import Path
from typing import Protocol

from phimini.model.config import ModelConfig
from phimini.model.huggingface import load_reference
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import Completion, SamplingParams, sample
from phimini.parallel.builder import Model
from phimini.parallel.weights import to_hf
from phimini.parallel.world import World
from phimini.stages.config import RunConfig


class RolloutEngine(Protocol):
    """Who samples. Every method is called by all ranks together and returns the same on each."""

    def load(self, directory: Path) -> None:
        """Take the weights of a Hugging Face folder."""
        ...

    def sync(self, model: Model) -> None:
        """Take the trainer's weights."""
        ...

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Completion]:
        """One completion per prompt, in order."""
        ...


class LocalEngine:
    """The reference model's sampler, embedded in the training ranks."""

    def __init__(self, config: ModelConfig, world: World, max_batch: int) -> None:
        self._model = Phi4Mini(config).to(world.device).eval()
        self._world = world
        self._max_batch = max_batch

    def load(self, directory: Path) -> None:
        self._model.load_state_dict(load_reference(directory).state_dict())

    def sync(self, model: Model) -> None:
        own = self._model.state_dict()
        seen = set()
        for name, tensor in to_hf(model):
            own[name].copy_(tensor)
            seen.add(name)
        missing = own.keys() - seen - {"lm_head.weight"}
        assert not missing, f"weight sync left out {sorted(missing)}"

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Completion]:
        # Prompts of like length side by side, so that every rank gets like work.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        mine = order[self._world.rank :: self._world.world_size]
        done = sample(
            self._model,
            [prompts[i] for i in mine],
            params,
            [seeds[i] for i in mine],
            max_batch=self._max_batch,
        )
        parts = self._world.all_gather_objects(dict(zip(mine, done, strict=True)))
        everyone = {index: completion for part in parts for index, completion in part.items()}
        return [everyone[i] for i in range(len(prompts))]


def build_engine(run: RunConfig, config: ModelConfig, world: World) -> RolloutEngine:
    return LocalEngine(config, world, run.rollout.max_batch)
