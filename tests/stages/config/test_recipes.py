"""Recipes by name and from a file of the user's, the paper's values, and the origin of each value."""

from operator import attrgetter
from pathlib import Path

import pytest

from phimini.stages.cli import main
from phimini.stages.config.dialect import paths
from phimini.stages.config.recipes import PAPER, RECIPES, phi4_mini_reasoning, recipe_config, tiny
from phimini.stages.config.schema import RunConfig

# As arXiv 2504.21233 gives them, and its group's evaluation settings (arXiv 2507.06607, appendix G).
PAPER_VALUES = {
    "model": "phi-4-mini",
    "midtrain.optimizer.lr": 1e-5, "midtrain.optimizer.warmup_ratio": 0.1, "midtrain.sequence_length": 16 * 1024,
    "midtrain.rows_per_step": 128, "midtrain.epochs": 5,
    "sft.optimizer.lr": 1e-5, "sft.sequence_length": 20 * 1024, "sft.examples_per_step": 128, "sft.epochs": 5,
    "rollout_dpo.optimizer.lr": 5e-7, "rollout_dpo.pairs": "teacher", "rollout_dpo.sequence_length": 16 * 1024,
    "rollout_dpo.epochs": 1,
    "rlvr.optimizer.lr": 5e-7, "rlvr.sequence_length": 25 * 1024, "rlvr.uniform_length": True, "rlvr.rebalance": True,
    "rlvr.max_accuracy": 0.5, "rlvr.anneal": True, "rlvr.start_temperature": 1.0, "rlvr.end_temperature": 0.6,
    "evaluate.temperature": 0.6, "evaluate.top_p": 0.95,
}  # fmt: skip
# The paper is silent about these: they are never its values.
OURS = [
    "sft.optimizer.warmup_ratio", "midtrain.optimizer.weight_decay", "midtrain.optimizer.decay", "rollout_dpo.beta",
    "rollout_dpo.pairs_per_step", "rlvr.rollouts_per_prompt", "rlvr.prompts_per_step", "rlvr.steps", "rlvr.clip_low",
    "rlvr.kl_coef", "rlvr.oversample_to", "rlvr.probe_rounds", "rlvr.keep_share", "curate.sft_examples",
    "midtrain.loss_on_question", "midtrain.stop", "evaluate.samples",
]  # fmt: skip


def test_the_recipe_holds_the_paper_s_values_and_says_which_they_are() -> None:
    run = phi4_mini_reasoning()
    assert {path: attrgetter(path)(run) for path in PAPER} == PAPER_VALUES
    known = dict(paths(RunConfig))
    assert not [path for path in OURS if path not in known or path in PAPER]


def config_lines(words: list[str], capsys: pytest.CaptureFixture) -> dict[str, str]:
    """Run `phimini config` and return the origin by `key=value`."""
    assert main(["config", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(paths(RunConfig)))
    return dict(line.split(maxsplit=1) for line in lines)  # pyright: ignore[reportReturnType]


def test_config_prints_every_value_with_its_origin(capsys: pytest.CaptureFixture) -> None:
    words = ["phi4_mini_reasoning", "rlvr.steps=300", "sft.epochs=2", "rlvr.anneal=true"]
    origin = config_lines(words, capsys)
    assert origin["rlvr.steps=300"] == "override of 500"
    assert origin["sft.epochs=2.0"] == "override of 5.0"
    assert origin["rlvr.anneal=true"] == "override of true"
    assert origin["midtrain.sequence_length=16384"] == "paper: 16K, packed"
    assert origin["rlvr.clip_high=0.28"] == "ours" and origin["rollout.addresses="] == "ours"
    assert sum(said.startswith("paper") for said in origin.values()) == len(PAPER) - 2


def test_a_value_of_the_demo_is_the_paper_s_only_if_it_is_the_same(
    capsys: pytest.CaptureFixture,
) -> None:
    origin = config_lines(["tiny"], capsys)
    assert origin["sft.optimizer.lr=0.0008"] == "ours"
    assert origin["rlvr.start_temperature=1.0"].startswith("paper: ")


MINE = """\
import dataclasses
from phimini.stages.config.recipes import tiny
calls = []
def mine():
    return dataclasses.replace(tiny(), name="mine", seed=5)
def number():
    return 3
def misspelt():
    return dataclasses.replace(tiny(), sede=5)
def outside():
    return dataclasses.replace(tiny(), processes=0)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "lacks.py").write_text("import no_such_package\ndef mine(): ...\n")
    (tmp_path / "broken.py").write_text("def mine(:\n")
    (tmp_path / "text.txt").write_text(MINE)
    return tmp_path / "mine.py"


def test_a_recipe_may_live_in_a_file_of_the_user_s(
    file: Path, capsys: pytest.CaptureFixture
) -> None:
    assert recipe_config(f"{file}:mine").seed == 5
    origin = config_lines([f"{file}:mine", "seed=6"], capsys)
    assert origin["seed=6"] == "override of 5" and origin["name=mine"] == "recipe"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "unknown recipe 'tinny'; did you mean tiny? expected one of tiny, phi"),
        ("nowhere.py:mine", "expected FILE.py:FUNCTION, found no Python file at "),
        (":mine", "expected FILE.py:FUNCTION, found no Python file at "),
        ("text.txt:mine", "expected FILE.py:FUNCTION, found no Python file at "),
        ("mine.py:min", "no function 'min' in "),
        ("mine.py:min", "did you mean mine?"),
        ("mine.py:calls", "no function 'calls' in "),
        ("mine.py:number", "expected a RunConfig, got int"),
        ("mine.py:misspelt", "unexpected keyword argument 'sede'"),
        ("mine.py:outside", "processes: expected a whole number from 1 to 1000000000, got 0"),
        (
            "lacks.py:mine",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("broken.py:mine", "cannot be imported: SyntaxError: invalid syntax"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named(
    name: str, message: str, file: Path, capsys: pytest.CaptureFixture
) -> None:
    name = f"{file.parent}/{name}" if ":" in name else name
    assert main(["recipe", name, "seed=1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_recipes_by_name() -> None:
    assert RECIPES == {"tiny": tiny, "phi4_mini_reasoning": phi4_mini_reasoning}
