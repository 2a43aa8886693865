"""Rollout engines: their protocols, and the local engine.

Token ids go in; sampled token ids, their log-probs and the weights' version come out, as arrays. The local engine samples
with the reference model; each rank samples its share of the prompts. A completion depends only on its prompt, seed and
the weights, so the number of ranks does not change it. It stays on the rank that has it first. The vLLM engines are in `colocated_vllm.py` (inside the training
ranks) and `separate_vllm.py` (processes of `vllm serve`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.io.huggingface import load_reference
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import Completion, SamplingParams, sample
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World
from phimini.parallel.weight_sync.sync import SyncReport

T = TypeVar("T")
LOADED = -1
"""version of weights that came from a folder"""
SEQUENCES = 256
"""sequences decoded at once where `rollout.max_batch` does not say and no GPU's memory decides"""


class Span(NamedTuple):
    """A range of a completion's tokens, start to end - 1, that were sampled from the weights of `version`."""

    version: int
    """how many updates the trainer had made; LOADED for weights from a folder"""
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled(Completion):
    """A completion with the versions of the weights it was sampled from: several spans if a sync came in between."""

    versions: tuple[Span, ...]


Arrived = Callable[[int, Sampled], None]
"""called with a prompt's number and its completion, on the rank that has it, perhaps in another thread"""


def unnoticed(number: int, completion: Sampled) -> None:
    """Ignore a completion's arrival."""


class First(NamedTuple):
    """The completions that are wanted of each group: the first to end. Those that were aborted are None."""

    groups: Sequence[str]
    """of each prompt"""
    sizes: Mapping[str, int]
    """how many are wanted of each group"""

    def without(self, taken: list[int]) -> "tuple[list[int], First]":
        """Return the numbers of the prompts to sample if those of `taken` have completions, and what is wanted of them."""
        missing = Counter(self.sizes)
        missing.subtract(self.groups[i] for i in taken)
        others = sorted(set(range(len(self.groups))) - set(taken))
        left = [i for i in others if missing[self.groups[i]] > 0]
        return left, First([self.groups[i] for i in left], missing)


def on_all_ranks(world: World, held: Sequence[T | None]) -> list[T | None]:
    """Return on every rank the items of which some rank has each; one that no rank has stays None. Collective.

    For few items: every rank gets all of them.
    """
    everything: list[T | None] = [None] * len(held)
    for part in world.all_gather_objects({i: x for i, x in enumerate(held) if x is not None}):
        for i, item in part.items():
            everything[i] = item
    return everything


class Sampler(Protocol):
    """A source of completions: prompts in, sampled tokens out."""

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        arrived: Arrived = unnoticed,
        first: First | None = None,
    ) -> list[Sampled | None]:
        """Return one completion per prompt, in order. Each depends only on its prompt, params, seed and the weights.

        Each completion is on one rank, and None on the others. first: abort the rest of a group once enough of it are complete;
        only separate engines can (`build_engine`). Raises ValueError for prompts or seeds that cannot be sampled
        (`check_prompts`).
        """
        ...


class WeightTarget(Protocol):
    """A holder of a copy of the policy's weights, to which the trainer sends new ones. Both methods are collective."""

    def load(self, directory: Path) -> None:
        """Load the weights of a Hugging Face folder; their version is LOADED."""
        ...

    def sync(self, model: Model) -> None:
        """Copy the trainer's weights; their version is `model.num_updates`. Raises WeightSyncError."""
        ...


class RolloutEngine(Sampler, WeightTarget, Protocol):
    """A sampler with weights of its own. All ranks call each method together."""


@runtime_checkable
class VllmEngine(RolloutEngine, Protocol):
    """An engine outside the trainer's own code: weights arrive by weight sync, and prompts have a prefix cache."""

    last_sync: SyncReport | None

    def as_sent(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Return a model's tensors as a sync sends them: in the engine's precision."""
        ...

    def reset_prefix_cache(self) -> None:
        """Drop the cached keys and values of earlier prompts; `sync` and `load` do so by themselves."""
        ...


@runtime_checkable
class SleepingEngine(RolloutEngine, Protocol):
    """An engine on the trainer's own GPUs, which can give its memory to the trainer between rollouts."""

    asleep: bool
    """the weights are gone: `sync` or `load` comes before `generate`"""

    def sleep(self) -> None:
        """Release weights and KV cache."""
        ...


@runtime_checkable
class PrefetchingEngine(RolloutEngine, Protocol):
    """An engine that can sample while the ranks train."""

    on_main: Sampler
    """the engine's sampler without collectives: rank 0 may call it in a thread"""


@phase("sync")
def release_memory(engine: RolloutEngine) -> None:
    """Give the engine's GPU memory to the trainer, if both share GPUs. Collective."""
    if isinstance(engine, SleepingEngine):
        engine.sleep()


def check_temperature(field: str, value: float) -> None:
    """Raise ValueError for a temperature that vLLM does not sample at.

    vLLM 0.32 raises temperatures between 0 and 0.01 to 0.01, with a line in its log only, and refuses more than 2.
    """
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
    """Raise ValueError for prompts or seeds that no engine can sample; the message has the number of the prompt.

    A prompt and its `params.max_new_tokens` must fit into `max_model_len` tokens.
    """
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


def share_of(prompts: list[list[int]], engine: int, engines: int) -> list[int]:
    """Return the numbers of the prompts that one of several engines samples: short and long ones alike for each."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    return order[engine::engines]


class LocalEngine:
    """The reference model's sampler inside the training ranks.

    max_batch: prompts that are sampled together. max_model_len: tokens of prompt and answer; default: the model's limit.
    """

    def __init__(
        self, config: ModelConfig, world: World, max_batch: int, max_model_len: int | None = None
    ) -> None:
        self._vocab_size = config.vocab_size
        self._max_model_len = max_model_len or config.max_positions
        self._model = Phi4Mini(config).to(world.device).eval()
        self._world = world
        self._max_batch = max_batch
        self._version = LOADED

    def load(self, directory: Path) -> None:
        """Load the weights of a Hugging Face folder. Raises ValueError that names file and tensor."""
        self._model.load_state_dict(load_reference(directory).state_dict())
        self._version = LOADED

    def sync(self, model: Model) -> None:
        """Copy the trainer's weights. Collective."""
        own = self._model.state_dict()
        seen = set()
        for name, tensor in to_hf(model):
            own[name].copy_(tensor)
            seen.add(name)
        missing = own.keys() - seen - {"lm_head.weight"}
        assert not missing, f"weight sync left out {sorted(missing)}"
        self._version = model.num_updates

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        arrived: Arrived = unnoticed,
        first: First | None = None,
    ) -> list[Sampled | None]:
        """Return the completions of this rank's share of the prompts; see `Sampler`. Collective."""
        assert first is None, "build_engine refuses rollout.oversample"
        check_prompts(prompts, seeds, params, self._vocab_size, self._max_model_len)
        mine = share_of(prompts, self._world.rank, self._world.world_size)
        done: list[Sampled | None] = [None] * len(prompts)

        def complete(number: int, c: Completion) -> None:
            versions = (Span(self._version, 0, len(c.tokens)),)
            completion = Sampled(
                tokens=c.tokens,
                logprobs=c.logprobs,
                finish_reason=c.finish_reason,
                versions=versions,
            )
            done[mine[number]] = completion
            arrived(mine[number], completion)

        sample(
            self._model,
            [prompts[i] for i in mine],
            params,
            [seeds[i] for i in mine],
            max_batch=self._max_batch,
            arrived=complete,
        )
        return done
