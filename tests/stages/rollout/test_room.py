"""Prompts whose answers would not fit the planned row are refused before sampling, in both stages that sample."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_ranks import RankFailure, run_ranks
from rl_run import make_run, reinforce, run_config

from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.rollout_dpo import sample_pairs


def test_stage_4(tmp_path: Path) -> None:
    run = run_config(make_run(tmp_path), "rlvr.max_new_tokens=150")
    with pytest.raises(RankFailure, match=r"prompts.jsonl, 'p4': \d+ tokens and rlvr.max_new_tokens=150 exceed rlvr.sequence_length=160"):  # fmt: skip
        run_ranks(reinforce, 1, run)


def test_stage_3(tmp_path: Path) -> None:
    run = run_config(make_run(tmp_path), "rollout_dpo.max_new_tokens=150")
    tokenizer = Tokenizer.load(tmp_path / "rollout_dpo" / "model")
    stage = SimpleNamespace(path=tmp_path / "rollout_dpo", made={})
    one_rank = SimpleNamespace(is_main=True, all_gather_objects=lambda x: [x], broadcast_object=lambda x: x)  # fmt: skip
    with pytest.raises(ValueError, match=r"prompts.jsonl, .* rollout_dpo.max_new_tokens=150 exceed rollout_dpo.sequence_length=160"):  # fmt: skip
        sample_pairs(run, one_rank, stage, None, tokenizer)  # pyright: ignore[reportArgumentType]
