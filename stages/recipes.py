"""Recipes: functions that return a whole run. `phimini recipe NAME key=value ...` runs one."""

from collections.abc import Callable

from phimini.stages.config import (
    CurateConfig,
    DistillConfig,
    EvaluateConfig,
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
            num_problems=3000, rollouts_per_problem=6, quick=0.5, slip=0.2, num_prompts=1500
        ),
        curate=CurateConfig(sft_examples=8000, level_weights=(1.0, 2.0, 2.0)),
        midtrain=MidtrainConfig(
            optimizer=OptimizerSettings(lr=4e-3, warmup_ratio=0.03, min_lr_ratio=0.05),
            sequence_length=256,
            rows_per_step=6,
            micro_rows=3,
            steps=1400,
        ),
        sft=SftConfig(
            optimizer=OptimizerSettings(lr=3e-3, warmup_ratio=0.03, min_lr_ratio=0.05),
            sequence_length=256,
            examples_per_step=32,
            micro_examples=16,
            epochs=2.0,
        ),
        rollout_dpo=RolloutDpoConfig(
            optimizer=OptimizerSettings(lr=1.5e-4, warmup_ratio=0.1, weight_decay=0.0),
            nll_weight=6.0,
            micro_pairs=16,
            epochs=2.0,
        ),
        rlvr=RlvrConfig(
            optimizer=OptimizerSettings(
                lr=1.5e-4, decay="constant", warmup_ratio=0.1, weight_decay=0.0
            ),
            steps=36,
        ),
        evaluate=EvaluateConfig(max_new_tokens=160),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"tiny": tiny}


def recipe_config(name: str) -> RunConfig:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
