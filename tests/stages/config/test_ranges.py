"""Errors for numbers out of a field's range name field, range and value."""

import dataclasses
from typing import Annotated, get_args, get_origin

import pytest

from phimini.model import config
from phimini.model.checked_fields import Range, fields_of
from phimini.parallel.cluster import job_scripts
from phimini.stages.config import options, schema
from phimini.stages.config.recipes import RECIPES, recipe_config
from phimini.stages.config.schema import override

WHOLE = "a whole number from"


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("midtrain.checkpoint_every=0", f"{WHOLE} 1 to 1000000000, got 0"),
        ("midtrain.steps=0", f"{WHOLE} 1 to 1000000000 or none, got 0"),
        ("midtrain.rows_per_step=100000000000000000000", f"{WHOLE} 1 to 1000000000, got 100000000000000000000"),
        ("sft.validate_every=-1", f"{WHOLE} 1 to 1000000000, got -1"),
        ("sft.epochs=inf", "a number above 0 and up to 1000000, got inf"),
        ("sft.optimizer.lr=0", "a number above 0 and up to 1000000, got 0.0"),
        ("sft.optimizer.lr=1e300", "a number above 0 and up to 1000000, got 1e+300"),
        ("sft.optimizer.beta1=1", "a number from 0 to below 1, got 1.0"),
        ("sft.optimizer.weight_decay=nan", "a number from 0 to 1000000, got nan"),
        ("rollout_dpo.temperature=0", "a number above 0 and up to 1000000, got 0.0"),
        ("rlvr.max_mismatch=nan", "a number above 0 and up to 1000000 or none, got nan"),
        ("rlvr.kl_coef=-0.1", "a number from 0 to 1000000, got -0.1"),
        ("rlvr.keep_share=0", "a number above 0 and up to 1, got 0.0"),
        ("distill.slip=1.5", "a number from 0 to 1, got 1.5"),
        ("distill.num_heldout=0", f"{WHOLE} 2 to 1000000000, got 0"),
        ("curate.level_weights=1,nan,1", "a list in which each is a number from 0 to 1000000, got (1.0, nan, 1.0)"),
        ("evaluate.samples=4", f"{WHOLE} 8 to 1000, got 4"),
        ("rollout.num_engines=0", f"{WHOLE} 1 to 1000000000, got 0"),
        ("rollout.max_batch=0", f"{WHOLE} 1 to 1000000000 or none, got 0"),
        ("rollout.oversample=0.5", "a number from 1 to 1000, got 0.5"),
        ("rollout.deadline_s=0.5", "a number from 1 to 1000000, got 0.5"),
        ("collective_deadline_s=0", "a number from 1 to 1000000, got 0.0"),
        (f"seed={10**30}", f"{WHOLE} {-(2**63)} to {2**63 - 1}, got {10**30}"),
        (f"tensor_parallel={2**63}", f"{WHOLE} 1 to 1000000000, got {2**63}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_number_outside_its_range_is_named(recipe: str, assignment: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        override(recipe_config(recipe), [assignment])
    assert str(caught.value) == f"{assignment.split('=')[0]}: expected {expected}"


def test_a_value_of_many_digits_is_named_in_a_short_line() -> None:
    with pytest.raises(ValueError, match="seed: expected a whole number") as caught:
        override(recipe_config("tiny"), [f"seed={'9' * 100_000}"])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "assignment",
    ["seed=-1", "evaluate.temperature=0", "sft.optimizer.clip=0", "rlvr.kl_coef=0", "rlvr.max_mismatch=none",
     "rollout.max_staleness=0", "evaluate.top_p=1", "rlvr.optimizer.warmup_ratio=0", "sft.epochs=1000000"],
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(assignment: str) -> None:
    override(recipe_config("tiny"), [assignment])


def test_every_number_of_a_config_has_a_range() -> None:
    ends = ("Config", "Settings", "Options")
    kinds = [
        kind
        for module in (schema, options, job_scripts, config)
        for name, kind in vars(module).items()
        if name.endswith(ends)
    ]
    assert len(set(kinds)) == 27
    for kind in kinds:
        for name, annotated in fields_of(kind).items():
            assert ranged(annotated), f"{kind.__name__}.{name}: {annotated} has no Range beside it"


def ranged(kind: object) -> bool:
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        return any(isinstance(mark, Range) for mark in marks) or ranged(inner)
    return kind not in (int, float) and all(map(ranged, get_args(kind)))


def test_a_config_built_in_python_is_checked_too() -> None:

    with pytest.raises(ValueError, match="processes: expected a whole number .*, got 2.0"):
        dataclasses.replace(recipe_config("tiny"), processes=2.0)
