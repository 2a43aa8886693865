"""Choice between the local engine, vLLM in the training ranks, and `vllm serve`."""

from phimini.model.config import ModelConfig
from phimini.parallel.ranks.world import World
from phimini.stages.config.schema import RunConfig
from phimini.stages.rollout.engine import SEQUENCES, LocalEngine, RolloutEngine


def expected_on_main(run: RunConfig, world: World, number: int) -> int:
    """Return how many of so many completions arrive on rank 0: all of separate engines, else its share."""
    if run.rollout.engine == "vllm" and run.rollout.placement == "separate":
        return number
    together = run.rollout.engine_tensor_parallel if run.rollout.engine == "vllm" else 1
    return -(-number // max(world.world_size // together, 1))


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
    return LocalEngine(config, world, run.rollout.max_batch or SEQUENCES, run.rollout.max_model_len)
