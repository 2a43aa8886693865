"""The local rollout engine, and the choice between it and vLLM's.

The local engine samples with the reference model on every rank, each its share of the prompts; a
sample depends on its prompt, its seed and the weights only, so the number of ranks changes nothing.
vLLM's are in `colocated_vllm.py` (in the training ranks) and `separate_vllm.py` (processes of their own).
"""

from pathlib import Path

from phimini.model.config import ModelConfig
from phimini.model.io.huggingface import load_reference
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import SamplingParams, sample
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.ranks.world import World
from phimini.stages.config.schema import RunConfig
from phimini.stages.rollout.engine import LOADED, RolloutEngine, Sampled, Span, check_prompts

__all__ = ["LocalEngine", "RolloutEngine", "Sampled", "Span", "build_engine"]


class LocalEngine:
    """The reference model's sampler, embedded in the training ranks."""

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

    def reset_prefix_cache(self) -> None:
        pass

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Sampled]:
        check_prompts(prompts, seeds, params, self._vocab_size, self._max_model_len)
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

    def generate_groups(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        groups: list[str],
        wanted: int | None,
    ) -> list[Sampled]:
        return self.generate(prompts, params, seeds)


def build_engine(run: RunConfig, config: ModelConfig, world: World) -> RolloutEngine:
    """Raises ValueError where the config asks for what is not there, e.g. vLLM."""
    alone = run.rollout.engine == "vllm" and run.rollout.placement == "separate"
    for name, off in (("oversample", 1.0), ("asynchronous", False), ("partial", False)):
        value = getattr(run.rollout, name)
        if value != off and not alone:
            raise ValueError(
                f"rollout.{name}={value}: needs rollout.engine=vllm rollout.placement=separate"
            )
    if run.rollout.asynchronous and run.rollout.max_staleness < 1:
        raise ValueError(
            f"rollout.max_staleness={run.rollout.max_staleness}: what is sampled one step ahead is 1 update old"
        )
    if alone:
        from phimini.stages.rollout.separate_vllm import separate_vllm

        return separate_vllm(run, config, world)
    if run.rollout.engine == "vllm":
        from phimini.stages.rollout.colocated_vllm import colocated_vllm

        return colocated_vllm(run, config, world)
    return LocalEngine(config, world, run.rollout.max_batch, run.rollout.max_model_len)
