"""Rollout engines: token ids in, sampled token ids, their log-probs and the weights' version out.

The local engine samples with the reference model on every rank, each its share of the prompts; a
sample depends on its prompt, its seed and the weights only, so the number of ranks changes nothing.
vLLM's are in `rollout_vllm.py` (in the training ranks) and `rollout_separate.py` (processes of their own).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from phimini.model.config import ModelConfig
from phimini.model.huggingface import load_reference
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import Completion, SamplingParams, sample
from phimini.parallel.builder import Model
from phimini.parallel.weights import to_hf
from phimini.parallel.world import World
from phimini.stages.config import RunConfig

LOADED = -1
"""version of weights that came from a folder"""


class Span(NamedTuple):
    """Tokens start to end - 1 of a completion were sampled from the weights of `version`."""

    version: int
    """how many updates the trainer had made; LOADED for weights from a folder"""
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Completion):
    """A completion that says whose it is; several spans if weights changed while it was sampled."""

    versions: tuple[Span, ...]


class RolloutEngine(Protocol):
    """Who samples. Every method is called by all ranks together and returns the same on each."""

    def load(self, directory: Path) -> None:
        """Take the weights of a Hugging Face folder."""
        ...

    def sync(self, model: Model) -> None:
        """Take the trainer's weights; their version is `model.num_updates`. Raises WeightSyncError."""
        ...

    def rest(self) -> None:
        """Training comes next: give up what it needs. After it, `sync` comes before `generate`."""
        ...

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Sampled]:
        """One completion per prompt, in order. It depends on prompt, params, seed and weights, on nothing else."""
        ...


class LocalEngine:
    """The reference model's sampler, embedded in the training ranks."""

    def __init__(self, config: ModelConfig, world: World, max_batch: int) -> None:
        self._model = Phi4Mini(config).to(world.device).eval()
        self._world = world
        self._max_batch = max_batch
        self._version = LOADED

    def load(self, directory: Path) -> None:
        self._model.load_state_dict(load_reference(directory).state_dict())
        self._version = LOADED

    def sync(self, model: Model) -> None:
        own = self._model.state_dict()
        seen = set()
        for name, tensor in to_hf(model):
            own[name].copy_(tensor)
            seen.add(name)
        missing = own.keys() - seen - {"lm_head.weight"}
        assert not missing, f"weight sync left out {sorted(missing)}"
        self._version = model.num_updates

    def rest(self) -> None:
        pass

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Sampled]:
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
        tagged = [
            Sampled(
                tokens=c.tokens,
                logprobs=c.logprobs,
                finish_reason=c.finish_reason,
                versions=(Span(self._version, 0, len(c.tokens)),),
            )
            for c in done
        ]
        parts = self._world.all_gather_objects(dict(zip(mine, tagged, strict=True)))
        everyone = {index: completion for part in parts for index, completion in part.items()}
        return [everyone[i] for i in range(len(prompts))]


def check_prompts(
    prompts: list[list[int]], params: SamplingParams, vocab_size: int, max_model_len: int
) -> None:
    """ValueError names the first prompt that is empty, too long for the engine or has an unknown token."""
    for i, prompt in enumerate(prompts):
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"prompt {i}: expected token ids from 0 to {vocab_size - 1}, got {prompt[:8]}"
            )
        if len(prompt) + params.max_new_tokens > max_model_len:
            raise ValueError(
                f"prompt {i}: {len(prompt)} tokens and {params.max_new_tokens} new ones exceed the engine's "
                f"{max_model_len}; raise rollout.max_model_len"
            )


def build_engine(run: RunConfig, config: ModelConfig, world: World) -> RolloutEngine:
    """Raises ValueError where the config asks for what is not there, e.g. vLLM."""
    if run.rollout.engine == "vllm":
        from phimini.stages.rollout_vllm import colocated_vllm

        return colocated_vllm(run, config, world)
    return LocalEngine(config, world, run.rollout.max_batch)
