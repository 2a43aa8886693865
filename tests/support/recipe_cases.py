"""A run of the recipe that is small enough for a test."""

from pathlib import Path

import pytest
from forked_ranks import run_ranks

from phimini.stages.cli import main

MICRO = [
    "processes=1", "audit=0", "distill.num_problems=80", "distill.rollouts_per_problem=3", "distill.num_prompts=40",
    "distill.num_heldout=24", "distill.num_validation=24", "curate.sft_examples=64",
    "midtrain.steps=6", "midtrain.validate_every=3", "midtrain.rows_per_step=4", "midtrain.micro_rows=2",
    "sft.examples_per_step=16", "sft.micro_tokens=1024", "sft.validate_every=2", "sft.epochs=1",
    "rollout_dpo.pairs=teacher", "rollout_dpo.pairs_per_step=8", "rollout_dpo.micro_tokens=1024",
    "rlvr.steps=2", "rlvr.prompts_per_step=4", "rlvr.probe_prompts=8", "rlvr.max_new_tokens=24",
    "evaluate.max_new_tokens=24",
]  # fmt: skip


def command(words: list[str]) -> int:
    """Run `phimini WORDS` in a forked process, because gloo's threads would not survive a later fork of this one."""
    return run_ranks(main, 1, words)[0]


def with_data(run: Path) -> Path:
    """Make the data and the start model of a micro run in a folder, and return the folder."""
    for verb in ("distill", "curate", "base", "tokenize"):
        assert command([verb, "tiny", f"out={run}", *MICRO]) == 0
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a micro run up to stage 3. Stage 4 needs prompts that the model sometimes answers, which this one lacks."""
    run = tmp_path_factory.mktemp("runs") / "micro"
    with_data(run)
    for verb in ("midtrain", "sft", "rollout_dpo"):
        assert command([verb, "tiny", f"out={run}", *MICRO]) == 0
    return run
