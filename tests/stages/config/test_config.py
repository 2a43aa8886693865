"""Words of the dialect become a config; a bad one is named by field, expectation and value."""

import pytest

from phimini.stages.config.dialect import build, paths, read_words, text_of
from phimini.stages.config.options import EvaluateOptions, PlanOptions
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
    assert run == recipe_config("tiny") and override(changed, []) == changed


@pytest.mark.parametrize(
    "words",
    [
        ["seed=-7", "rollout.asynchronous=true", "midtrain.epochs=none", "rollout.addresses=a:1,b:2"],
        ["--seed", "-7", "--rollout.asynchronous", "--midtrain.epochs", "none", "--rollout.addresses=a:1,b:2"],
        ["--seed=1", "seed=-7", "--rollout.asynchronous=1", "midtrain.epochs=none", "--rollout.addresses", "a:1,b:2"],
    ],
    ids=["key=value", "--key value", "mixed; the last of a key counts"],
)  # fmt: skip
def test_every_spelling_means_the_same(words: list[str], run: RunConfig) -> None:
    changed = override(run, words)
    assert (changed.seed, changed.rollout.asynchronous, changed.midtrain.epochs) == (-7, True, None)
    assert changed.rollout.addresses == ("a:1", "b:2")


def test_a_printed_value_is_read_back(run: RunConfig) -> None:
    words = [f"{path}={text_of(value)}" for path, value in flat(to_dict(run)).items()]
    assert len(words) > 120 and override(recipe_config("phi4_mini_reasoning"), words) == run


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sede=1", r"unknown 'sede=1'; did you mean seed\?"),
        ("sft.learning_rate=1", "unknown 'sft.learning_rate=1'"),
        ("--sede=1", r"unknown '--sede=1'; did you mean --seed\?"),
        ("lr=1", r"did you mean midtrain.optimizer.lr or sft.optimizer.lr or "),
        ("seed.low=1", r"unknown 'seed.low=1'; did you mean seed\?"),
        ("seed=one", "seed: expected a whole number from .*, got 'one'"),
        ("seed=1.5", "seed: expected a whole number from .*, got '1.5'"),
        ("sft.epochs=many", "sft.epochs: expected a number above 0 .*, got 'many'"),
        ("rlvr.anneal=maybe", "rlvr.anneal: expected true or false, got 'maybe'"),
        ("midtrain.stop=never", "midtrain.stop: expected one of budget, saturation, got 'never'"),
        ("midtrain.stop=budgt", r"midtrain.stop: did you mean budget\? expected one of budget, "),
        ("midtrain=3", "midtrain is a group of fields; set one of them, e.g. midtrain.optimizer.lr"),
        ("seed", "expected key=value, got 'seed'"),
        ("--seed", "--seed: expected a value after it"),
        ("out=", "out: expected text that is not empty, got ''"),
        ("rollout.devices=0,,1", "rollout.devices: .* each is text that is not empty, got"),
        ("--", "unknown '--'"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named(run: RunConfig, assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        override(run, [assignment])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_every_field_has_a_line_of_help(capsys: pytest.CaptureFixture) -> None:
    """tyro prints it with the default of the recipe."""
    for kind in (EvaluateOptions, PlanOptions):
        words = read_words(["--help"], kind, "verb", names=1)
        with pytest.raises(SystemExit):
            build(kind, words, default=kind(run=recipe_config("tiny")))
        lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
        for path, _ in paths(kind):
            at = next(i for i, line in enumerate(lines) if line.split(" ")[0] == f"--{path}")
            said = lines[at + 1] if len(lines[at].split()) < 3 else lines[at]
            assert not said.startswith("(default"), (
                f"{path}: no line of documentation under the field"
            )


def test_every_recipe_builds_and_becomes_plain_data() -> None:
    for name in RECIPES:
        assert to_dict(recipe_config(name))["name"] == name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sft.micro_tokens=255"], "sft.micro_tokens: expected at least 256, because sft.sequence_length is 256, got 255"),
        (["rollout_dpo.micro_tokens=511"], "rollout_dpo.micro_tokens: expected at least 512"),
        (["rlvr.sequence_length=9000"], "rlvr.micro_tokens: expected at least 9000, .*, got 8192"),
    ],
    ids=["sft", "dpo", "rlvr"],
)  # fmt: skip
def test_a_micro_batch_has_room_for_the_longest_item(
    words: list[str], said: str, run: RunConfig
) -> None:
    with pytest.raises(ValueError, match=said):
        override(run, words)


def test_a_ratio_s_limit_needs_a_ratio(run: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"rlvr.dual_clip: expected none .*, got 3.0"):
        override(run, ["rlvr.objective=cispo", "rlvr.dual_clip=3"])
