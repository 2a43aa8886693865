"""Work of each training stage for the plan: rows, lengths, forwards, sequences in flight"""

import math
from functools import partial

import torch

from phimini.model.config import ModelConfig
from phimini.parallel.megatron.fp8 import choose
from phimini.parallel.plan.engine import Engine, EngineMemory, engine_memory
from phimini.parallel.plan.memory import MemoryOptions, held_while_sampling, memory_bytes
from phimini.parallel.plan.workload import Workload
from phimini.parallel.ranks.layout import Layout
from phimini.stages.config.schema import RunConfig


def workloads(run: RunConfig) -> dict[str, Workload]:
    """Return each training stage's workload for the plan.

    Lengths are the configured limits. Real answers are shorter, so the planned memory is an upper bound.
    """
    dpo, rl = run.rollout_dpo, run.rlvr
    fp8 = run.fp8_recipe if run.fp8 == "te" else "none"
    workload = partial(Workload, fp8=fp8, zero1=run.distributed_optimizer, overlap=run.overlap)
    return {
        "midtrain": workload(
            stage="midtrain",
            sequence_length=run.midtrain.sequence_length,
            rows_per_step=run.midtrain.rows_per_step,
            micro_tokens=run.midtrain.micro_rows * run.midtrain.sequence_length,
        ),
        "sft": workload(
            stage="sft",
            sequence_length=run.sft.sequence_length,
            rows_per_step=run.sft.examples_per_step,
            micro_tokens=run.sft.micro_tokens,
        ),
        # The reference's log-probs are computed once, before the first step: a forward, and no second model.
        "rollout_dpo": workload(
            stage="rollout_dpo",
            sequence_length=dpo.sequence_length,
            rows_per_step=2 * dpo.pairs_per_step,
            micro_tokens=dpo.micro_tokens,
            extra_forwards=1 / max(1.0, dpo.epochs),
            # One serves both answers where their coefficients differ in sign only (`linear_dpo`).
            pair_scratches=2 if dpo.nll_weight or dpo.length_normalized else 1,
            samples_before=dpo.num_prompts * dpo.rollouts_per_prompt * (dpo.pairs == "policy"),
        ),
        "rlvr": workload(
            stage="rlvr",
            sequence_length=rl.sequence_length,
            rows_per_step=rl.prompts_per_step * rl.rollouts_per_prompt,
            micro_tokens=rl.micro_tokens,
            extra_forwards=1.0 if rl.kl_coef else 0.0,
            reference_model=rl.kl_coef > 0,
            samples_per_step=rl.prompts_per_step * most_rollouts(run),
            samples_before=rl.probe_prompts * rl.probe_rounds * rl.probe_rollouts,
            engine=engine_of(run) if run.rollout.placement == "colocated" else None,
        ),
    }


def engine_of(run: RunConfig) -> Engine:
    """Return the settings of the run's rollout engine that decide its memory."""
    rollout = run.rollout
    return Engine(
        longest=rollout.max_model_len
        or max(run.rlvr.sequence_length, run.rollout_dpo.sequence_length),
        tensor_parallel=rollout.engine_tensor_parallel,
        max_batch=rollout.max_batch,
        memory_share=rollout.memory_share,
        fp8_cache=rollout.kv_cache_dtype == "fp8",
    )


def engine_memory_of(
    run: RunConfig, config: ModelConfig, gpu_bytes: int, layout: Layout | None
) -> EngineMemory:
    """Return the memory of the run's engine on a GPU of `gpu_bytes`.

    layout: of the trainer on the same GPU, with `data` filled in; None: the GPU is the engine's own.
    """
    engine = engine_of(run)
    if layout is None:
        return engine_memory(config, engine, gpu_bytes, 0)
    chosen = choose(run.fp8, run.fp8_recipe, torch.device("cuda")) if run.fp8 == "te" else None
    options = MemoryOptions(
        zero1=run.distributed_optimizer,
        fp8="none" if chosen is None else chosen.recipe,
        reference_model=run.rlvr.kl_coef > 0,
        engine=engine,
    )
    phases = memory_bytes(
        config, layout, options, tokens=1, num_microbatches=1, gpu_bytes=gpu_bytes
    )
    return engine_memory(config, engine, gpu_bytes, held_while_sampling(phases))


def most_rollouts(run: RunConfig) -> int:
    """Return the answers that stage 4 samples of one prompt in one step if all of them are wrong."""
    first = math.ceil(run.rlvr.rollouts_per_prompt * run.rollout.oversample)
    return max(first, run.rlvr.oversample_to) if run.rlvr.rebalance else first
