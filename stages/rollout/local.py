"""The local rollout engine, and `build_engine`, which chooses between it and the two vLLM engines.

The local engine samples with the reference model; each rank samples its share of the prompts. A completion depends
only on its prompt, seed and the weights, so the number of ranks does not change it. The vLLM engines are in
`colocated_vllm.py` (inside the training ranks) and `separate_vllm.py` (in processes of their own).
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

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Sampled]:
        check_prompts(prompts, seeds, params, self._vocab_size, self._max_model_len)
        # Sorted by length, so that every rank gets as much work.
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


def build_engine(run: RunConfig, config: ModelConfig, world: World) -> RolloutEngine:
    """Return the engine that `run.rollout` asks for. Raises ValueError if its settings contradict or vLLM is missing."""
    separate = run.rollout.engine == "vllm" and run.rollout.placement == "separate"
    for name, off in (("oversample", 1.0), ("asynchronous", False), ("partial", False)):
        value = getattr(run.rollout, name)
        if value != off and not separate:
            raise ValueError(
                f"rollout.{name}={value}: needs rollout.engine=vllm rollout.placement=separate"
            )
    if run.rollout.asynchronous and run.rollout.max_staleness < 1:
        raise ValueError(
            f"rollout.max_staleness={run.rollout.max_staleness}: answers that are sampled one step ahead are 1 update old"
        )
    if separate:
        from phimini.stages.rollout.separate_vllm import separate_vllm

        return separate_vllm(run, config, world)
    if run.rollout.engine == "vllm":
        from phimini.stages.rollout.colocated_vllm import colocated_vllm

        return colocated_vllm(run, config, world)
    return LocalEngine(config, world, run.rollout.max_batch, run.rollout.max_model_len)
