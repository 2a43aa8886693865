"""Work of each training stage for the plan: rows, lengths, forwards, sequences in flight"""

import math
from functools import partial

from phimini.parallel.plan.layouts import Workload
from phimini.stages.config.schema import RunConfig


def workloads(run: RunConfig) -> dict[str, Workload]:
    """Return each training stage's workload for the plan.

    Lengths are the configured limits. Real answers are shorter, so the planned memory is an upper bound.
    """
    dpo, rl = run.rollout_dpo, run.rlvr
    shares_gpu = run.rollout.placement == "colocated"
    fp8 = run.fp8_recipe if run.fp8 == "te" else "none"
    workload = partial(Workload, fp8=fp8, zero1=run.distributed_optimizer)
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
            micro_tokens=run.sft.token_budget,
        ),
        # The reference's log-probs are computed once, before the first step: a forward, and no second model.
        "rollout_dpo": workload(
            stage="rollout_dpo",
            sequence_length=dpo.sequence_length,
            rows_per_step=2 * dpo.pairs_per_step,
            micro_tokens=dpo.token_budget,
            extra_forwards=1 / max(1.0, dpo.epochs),
            # One serves both answers where their coefficients differ in sign only (`linear_dpo`).
            pair_scratches=2 if dpo.nll_weight or dpo.length_normalized else 1,
            samples_before=dpo.num_prompts * dpo.rollouts_per_prompt * (dpo.pairs == "policy"),
        ),
        "rlvr": workload(
            stage="rlvr",
            sequence_length=rl.sequence_length,
            rows_per_step=rl.prompts_per_step * rl.rollouts_per_prompt,
            micro_tokens=rl.token_budget,
            extra_forwards=1.0 if rl.kl_coef else 0.0,
            reference_model=rl.kl_coef > 0,
            samples_per_step=rl.prompts_per_step * most_rollouts(run),
            samples_before=rl.probe_prompts * rl.probe_rounds * rl.probe_rollouts,
            rollout_sequences=run.rollout.max_batch if shares_gpu else 0,
            rollout_tensor_parallel=run.rollout.engine_tensor_parallel,
        ),
    }


def most_rollouts(run: RunConfig) -> int:
    """Return the answers that stage 4 samples of one prompt in one step if all of them are wrong."""
    first = math.ceil(run.rlvr.rollouts_per_prompt * run.rollout.oversample)
    return max(first, run.rlvr.oversample_to) if run.rlvr.rebalance else first
