"""Recipes: functions that return a whole run. `phimini recipe NAME key=value ...` runs one."""

from collections.abc import Callable

from phimini.model.suggest import nearest
from phimini.stages.config.schema import (
    CurateConfig,
    DistillConfig,
    EvaluateConfig,
    MidtrainConfig,
    OptimizerSettings,
    RlvrConfig,
    RolloutConfig,
    RolloutDpoConfig,
    RunConfig,
    SftConfig,
)


def tiny() -> RunConfig:
    """Four stages from a random model on two CPU cores in minutes; every value here is ours."""
    return RunConfig(
        name="tiny",
        out="runs/tiny",
        processes=2,
        distill=DistillConfig(
            num_problems=5000,
            level_weights=(3.0, 3.0, 2.0),
            rollouts_per_problem=4,
            quick=0.45,
            slip=0.15,
            num_prompts=3000,
        ),
        curate=CurateConfig(sft_examples=5000, level_weights=(1.0, 2.0, 2.0)),
        midtrain=MidtrainConfig(
            optimizer=OptimizerSettings(lr=1.2e-3, warmup_ratio=0.03, min_lr_ratio=0.2),
            sequence_length=256,
            rows_per_step=4,
            micro_rows=2,
            steps=3200,
            loss_on_question=False,
        ),
        sft=SftConfig(
            optimizer=OptimizerSettings(lr=8e-4, warmup_ratio=0.03),
            sequence_length=256,
            examples_per_step=32,
            micro_examples=16,
            epochs=4.0,
        ),
        rollout_dpo=RolloutDpoConfig(
            optimizer=OptimizerSettings(lr=1.2e-4, warmup_ratio=0.1, weight_decay=0.0),
            num_prompts=700,
            nll_weight=6.0,
            micro_pairs=16,
            epochs=2.0,
        ),
        rlvr=RlvrConfig(
            optimizer=OptimizerSettings(
                lr=1.2e-4, decay="constant", warmup_ratio=0.12, weight_decay=0.0
            ),
            steps=40,
            prompts_per_step=64,
            probe_prompts=2300,
        ),
    )


def phi4_mini_reasoning() -> RunConfig:
    """Phi-4-Mini-Reasoning (arXiv 2504.21233): the paper's values where it gives one, marked; all else is ours.

    One layout for 8, 64 and 128 H100, which replicas only add to: with tensor 2, context 2 and ZeRO-1 every stage
    fits without recomputation, stage 4 with its engine in memory too (`phimini recipe phi4_mini_reasoning --dry-run
    gpus=64`). A stage run alone may take a cheaper one, e.g. `phimini midtrain ... context_parallel=1`.
    """
    return RunConfig(
        name="phi4_mini_reasoning",
        out="runs/phi4_mini_reasoning",
        model="phi-4-mini",
        base="Phi-4-mini-instruct",  # paper: from Phi-4-Mini; only the instruct model is public
        chat_template="reasoning",
        rope_factors="long",
        tensor_parallel=2,
        context_parallel=2,
        sequence_parallel=True,
        distributed_optimizer=True,
        distill=DistillConfig(source="data"),
        # paper: "compact"; five levels
        curate=CurateConfig(sft_examples=200_000, level_weights=(1.0,) * 5),
        midtrain=MidtrainConfig(
            optimizer=OptimizerSettings(
                lr=1e-5,  # paper
                warmup_ratio=0.1,  # paper
            ),
            sequence_length=16_384,  # paper: 16K, packed
            rows_per_step=128,  # paper
            epochs=5.0,  # paper
            stop="budget",  # paper: "until performance saturates": set `saturation`
            validate_every=500,
        ),
        sft=SftConfig(
            optimizer=OptimizerSettings(lr=1e-5),  # paper
            sequence_length=20_480,  # paper: 20K, not packed
            examples_per_step=128,  # paper
            micro_examples=1,
            epochs=5.0,  # paper
            validate_every=500,
        ),
        rollout_dpo=RolloutDpoConfig(
            optimizer=OptimizerSettings(lr=5e-7, weight_decay=0.0),  # paper: the rate
            pairs="teacher",  # paper: the teacher's rollouts that stages 1 and 2 rejected
            sequence_length=16_384,  # paper: 16K
            max_new_tokens=15_360,
            epochs=1.0,  # paper
            pairs_per_step=128,
            micro_pairs=1,
        ),
        rlvr=RlvrConfig(
            optimizer=OptimizerSettings(
                lr=5e-7,  # paper
                decay="constant",
                weight_decay=0.0,
            ),
            steps=500,
            prompts_per_step=128,
            rollouts_per_prompt=16,
            sequence_length=25_600,  # paper: 25K
            max_new_tokens=24_576,
            micro_rollouts=1,
            probe_prompts=20_000,
            probe_rounds=2,  # paper: several
            oversample_to=128,  # paper: what one positive may need on a hard prompt
            max_accuracy=0.5,  # paper
            start_temperature=1.0,  # paper: linear from 1.0 ...
            end_temperature=0.6,  # ... to 0.6 over the first half of the steps
        ),
        evaluate=EvaluateConfig(
            temperature=0.6,  # paper's group: with top-p 0.95, 32,768 tokens in all
            top_p=0.95,
            max_new_tokens=31_744,
        ),
        rollout=RolloutConfig(
            engine="vllm",
            engine_tensor_parallel=2,
            max_batch=8,
            max_model_len=32_768,
            deadline_s=600.0,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "phi4_mini_reasoning": phi4_mini_reasoning,
}


def recipe_config(name: str) -> RunConfig:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]()
