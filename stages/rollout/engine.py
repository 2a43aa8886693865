"""What a rollout engine is: token ids in, sampled token ids, their log-probs and the weights' version out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from phimini.model.sampler import Completion, SamplingParams
from phimini.parallel.megatron.builder import Model
from phimini.parallel.weight_sync.sync import SyncReport

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

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of earlier prompts; `sync` and `load` do so by themselves."""
        ...

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Sampled]:
        """One completion per prompt, in order. It depends on prompt, params, seed and weights, on nothing else."""
        ...

    def generate_groups(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        groups: list[str],
        wanted: int | None,
    ) -> Sequence[Sampled | None]:
        """As `generate`; an engine that can stop early leaves None for what a group of `wanted` did without."""
        ...


@runtime_checkable
class SyncedEngine(Protocol):
    """An engine outside the trainer's own code, whose weights arrive by a weight sync."""

    last_sync: SyncReport | None
    asleep: bool
    """it has rested and given up its weights: `sync` comes before `generate`"""

    def as_sent(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A model's tensors as a sync sends them: in the engine's precision."""
        ...


def check_temperature(field: str, value: float) -> None:
    """vLLM 0.32 samples at 0.01 what is asked for below, and says so in its log only; above 2 it refuses."""
    if value > 2 or 0 < value < 0.01:
        raise ValueError(
            f"{field}={value:g}: vLLM samples at 0 or from 0.01 to 2; rollout.engine=local has no such limits"
        )


def check_prompts(
    prompts: list[list[int]],
    seeds: list[int],
    params: SamplingParams,
    vocab_size: int,
    max_model_len: int,
) -> None:
    """What no engine can sample: ValueError, for a prompt with the number of the first."""
    if len(seeds) != len(prompts):
        raise ValueError(
            f"seeds: expected one for each of {len(prompts)} prompts, got {len(seeds)}"
        )
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
