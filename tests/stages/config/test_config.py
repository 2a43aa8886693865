import pytest

from phimini.stages.config.recipes import RECIPES, recipe_config
from phimini.stages.config.schema import RunConfig, override, to_dict


@pytest.fixture
def run() -> RunConfig:
    return recipe_config("tiny")


def test_override_sets_nested_fields_and_leaves_the_original(run: RunConfig) -> None:
    changed = override(
        run, ["seed=7", "sft.optimizer.lr=0.25", "rlvr.anneal=false", "curate.level_weights=1,2,3"]
    )
    assert (changed.seed, changed.sft.optimizer.lr, changed.rlvr.anneal) == (7, 0.25, False)
    assert changed.curate.level_weights == (1.0, 2.0, 3.0)
    assert run == recipe_config("tiny")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sede=1", r"unknown config key 'sede': RunConfig has .*seed"),
        (
            "sft.learning_rate=1",
            r"unknown config key 'sft.learning_rate': SftConfig has .*optimizer",
        ),
        ("sede=1", r"did you mean seed\?$"),
        ("lr=1", r"did you mean midtrain.optimizer.lr or sft.optimizer.lr or "),
        ("seed.low=1", r"unknown config key 'seed.low': seed is a plain value"),
        ("seed=one", r"seed: expected int, got 'one'"),
        ("seed=1.5", r"seed: expected int, got '1.5'"),
        ("sft.epochs=many", r"sft.epochs: expected float, got 'many'"),
        ("rlvr.anneal=maybe", r"rlvr.anneal: expected true or false, got 'maybe'"),
        ("midtrain.stop=never", r"midtrain.stop: expected one of budget, saturation; got 'never'"),
        ("midtrain=3", r"config key 'midtrain' is a group"),
        ("seed", r"override 'seed': expected key=value"),
    ],
)
def test_a_bad_override_is_named(run: RunConfig, assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(run, [assignment])


def test_every_recipe_builds_and_becomes_plain_data() -> None:
    for name in RECIPES:
        assert to_dict(recipe_config(name))["name"] == name


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"unknown recipe 'tinny'; did you mean tiny\? expected one of tiny, phi"
    ):
        recipe_config("tinny")
