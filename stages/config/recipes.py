"""Recipes: functions that return the config of a whole run. `phimini recipe NAME key=value ...` runs one.

NAME is one of `RECIPES`, or `path/to/mine.py:my_recipe` for a function in a file of the user's.
"""

from collections.abc import Callable

from phimini.model.suggest import nearest
from phimini.model.user_file import function_of
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
    """Four stages from a random model on two CPU cores in minutes; the sizes are ours."""
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
            steps=4000,
            loss_on_question=False,
        ),
        sft=SftConfig(
            optimizer=OptimizerSettings(lr=8e-4, warmup_ratio=0.03),
            sequence_length=256,
            examples_per_step=32,
            micro_tokens=4096,
            epochs=4.0,
        ),
        rollout_dpo=RolloutDpoConfig(
            optimizer=OptimizerSettings(lr=1.2e-4, warmup_ratio=0.1, weight_decay=0.0),
            num_prompts=850,
            nll_weight=6.0,
            micro_tokens=8192,
            epochs=2.0,
        ),
        rlvr=RlvrConfig(
            optimizer=OptimizerSettings(
                lr=1.2e-4, decay="constant", warmup_ratio=0.12, weight_decay=0.0
            ),
            steps=40,
            prompts_per_step=64,
            micro_tokens=8192,
            probe_prompts=2300,
        ),
    )


def phi4_mini_reasoning() -> RunConfig:
    """Phi-4-Mini-Reasoning (arXiv 2504.21233): the paper's values where it gives one (`PAPER`); the others are ours.

    Its layout is the first choice of `phimini plan` for 8, 64 and 128 H100: more GPUs only add replicas. Stage 3's
    pairs of 2 x 16,384 tokens need context 2; a stage run alone may take a faster layout, e.g. `phimini midtrain ...
    context_parallel=1`.
    """
    return RunConfig(
        name="phi4_mini_reasoning",
        out="runs/phi4_mini_reasoning",
        model="phi-4-mini",
        base="Phi-4-mini-instruct",  # the paper starts from Phi-4-Mini; only the instruct model is public
        chat_template="reasoning",
        rope_factors="long",
        context_parallel=2,
        distributed_optimizer=True,
        overlap=True,
        recompute="selective",
        distill=DistillConfig(source="data"),
        curate=CurateConfig(
            sft_examples=200_000,
            level_weights=(1.0,) * 5,  # elementary, middle and high school, college, graduate
            max_repetition=0.3,
            pairs_per_question=2,
            pair_length_ratio=2.0,
        ),
        midtrain=MidtrainConfig(
            optimizer=OptimizerSettings(lr=1e-5, warmup_ratio=0.1),
            sequence_length=16_384,
            rows_per_step=128,
            epochs=5.0,
            stop="budget",  # the paper goes on until the validation saturates: stop=saturation
            validate_every=500,
        ),
        sft=SftConfig(
            optimizer=OptimizerSettings(lr=1e-5),
            sequence_length=20_480,
            micro_tokens=20_480,
            examples_per_step=128,
            epochs=5.0,
            validate_every=500,
        ),
        rollout_dpo=RolloutDpoConfig(
            optimizer=OptimizerSettings(lr=5e-7, weight_decay=0.0),
            pairs="teacher",
            sequence_length=16_384,
            micro_tokens=32_768,
            max_new_tokens=15_360,
            epochs=1.0,
            pairs_per_step=128,
        ),
        rlvr=RlvrConfig(
            optimizer=OptimizerSettings(lr=5e-7, decay="constant", weight_decay=0.0),
            steps=500,
            prompts_per_step=128,
            rollouts_per_prompt=16,
            sequence_length=25_600,
            micro_tokens=25_600,
            max_new_tokens=24_576,
            probe_prompts=20_000,
            probe_rounds=2,
            oversample_to=128,  # the paper saw hard prompts that needed as many for one correct answer
            max_accuracy=0.5,
            start_temperature=1.0,
            end_temperature=0.6,
        ),
        evaluate=EvaluateConfig(
            temperature=0.6,
            top_p=0.95,
            max_new_tokens=31_744,  # 32,768 tokens with the question
        ),
        rollout=RolloutConfig(
            engine="vllm",
            max_model_len=32_768,
            deadline_s=600.0,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "phi4_mini_reasoning": phi4_mini_reasoning,
}

PAPER = {
    "model": "Phi-4-Mini",
    "midtrain.optimizer.lr": "1e-5",
    "midtrain.optimizer.warmup_ratio": "10 % warm-up",
    "midtrain.sequence_length": "16K, packed",
    "midtrain.rows_per_step": "batch 128",
    "midtrain.epochs": "5 epochs",
    "sft.optimizer.lr": "1e-5",
    "sft.sequence_length": "20K, not packed",
    "sft.examples_per_step": "batch 128",
    "sft.epochs": "5 epochs",
    "rollout_dpo.optimizer.lr": "5e-7",
    "rollout_dpo.pairs": "the teacher's rollouts, correct and rejected, of the same question",
    "rollout_dpo.sequence_length": "16K",
    "rollout_dpo.epochs": "1 epoch",
    "rlvr.optimizer.lr": "5e-7",
    "rlvr.sequence_length": "25K",
    "rlvr.uniform_length": "remedy 1: keep prompts of uniform response length",
    "rlvr.rebalance": "remedy 2: all positives and as many negatives",
    "rlvr.max_accuracy": "remedy 2: drop prompts above 50 %",
    "rlvr.anneal": "remedy 3: linear over the first half of the steps",
    "rlvr.start_temperature": "remedy 3: from 1.0",
    "rlvr.end_temperature": "remedy 3: to 0.6",
    "evaluate.temperature": "0.6 (the group's later report, arXiv 2507.06607)",
    "evaluate.top_p": "0.95 (the same report)",
}
"""Fields of `phi4_mini_reasoning` whose values the paper gives, with its words in short."""


def recipe_config(name: str) -> RunConfig:
    """Return the config of a recipe by name or by `FILE.py:FUNCTION`. Raises ValueError if there is no such recipe."""
    if ":" in name:
        return _from_file(name)
    if name not in RECIPES:
        raise ValueError(
            f"unknown recipe {name!r:.60}; {nearest(name, [*RECIPES, 'FILE.py:FUNCTION'])}"
        )
    return RECIPES[name]()


def _from_file(name: str) -> RunConfig:
    make = function_of(name, "recipe")
    try:
        run = make()
    except TypeError as error:  # a field that does not exist or is missing
        raise ValueError(f"recipe {name}: {error}") from error
    if not isinstance(run, RunConfig):
        raise ValueError(f"recipe {name}: expected a RunConfig, got {type(run).__name__}")
    return run
