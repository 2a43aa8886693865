"""Recipes: functions that return a whole run. `phimini recipe NAME key=value ...` runs one."""

from collections.abc import Callable

from phimini.stages.config import (
    CurateConfig,
    DistillConfig,
    MidtrainConfig,
    OptimizerSettings,
    RlvrConfig,
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


RECIPES: dict[str, Callable[[], RunConfig]] = {"tiny": tiny}


def recipe_config(name: str) -> RunConfig:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
