"""Numbers that no field of a run may hold are named by field, range and value."""

import pytest

from phimini.stages.config.ranges import RANGES
from phimini.stages.config.recipes import RECIPES, recipe_config
from phimini.stages.config.schema import RunConfig, override


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("midtrain.checkpoint_every=0", "at least 1, got 0"),
        ("midtrain.steps=0", "at least 1, got 0"),
        ("sft.validate_every=-1", "at least 1, got -1"),
        ("sft.epochs=inf", "a finite number above 0, got inf"),
        ("sft.optimizer.lr=0", "a finite number above 0, got 0.0"),
        ("sft.optimizer.beta1=1", "a number from 0 to below 1, got 1.0"),
        ("sft.optimizer.weight_decay=nan", "at least 0, got nan"),
        ("rollout_dpo.temperature=0", "a finite number above 0, got 0.0"),
        ("rlvr.max_mismatch=nan", "a finite number above 0, got nan"),
        ("rlvr.kl_coef=-0.1", "at least 0, got -0.1"),
        ("rlvr.keep_share=0", "a share above 0, at most 1, got 0.0"),
        ("distill.slip=1.5", "a share from 0 to 1, got 1.5"),
        ("distill.num_heldout=0", "at least 2, got 0"),
        ("curate.level_weights=1,nan,1", "at least 0, got nan"),
        ("evaluate.samples=4", "at least 8, got 4"),
        ("rollout.num_engines=0", "at least 1, got 0"),
        ("rollout.max_batch=0", "at least 1, got 0"),
        ("rollout.oversample=0.5", "at least 1, got 0.5"),
        ("rollout.deadline_s=0.5", "at least 1, got 0.5"),
    ],
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_number_outside_its_range_is_named(recipe: str, assignment: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        override(recipe_config(recipe), [assignment])
    assert str(caught.value) == f"{assignment.split('=')[0]}: expected {expected}"


@pytest.mark.parametrize(
    "assignment",
    ["seed=-1", "evaluate.temperature=0", "sft.optimizer.clip=0", "rlvr.kl_coef=0", "rlvr.max_mismatch=none",
     "rollout.max_staleness=0", "evaluate.top_p=1", "rlvr.optimizer.warmup_ratio=0"],
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(assignment: str) -> None:
    override(recipe_config("tiny"), [assignment])


def test_every_range_is_of_a_field() -> None:
    def names(config: object, prefix: str = "") -> set[str]:
        found = set()
        for name in config.__dataclass_fields__:  # pyright: ignore[reportAttributeAccessIssue]
            value = getattr(config, name)
            found |= {name, prefix + name}
            if hasattr(value, "__dataclass_fields__"):
                found |= names(value, f"{prefix}{name}.")
        return found

    run: RunConfig = recipe_config("tiny")
    assert RANGES.keys() <= names(run)
