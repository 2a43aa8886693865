"""Refused prompts of the local engine, as of vLLM's engines; engines release the GPU before a stage trains."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked_ranks import RankFailure, run_ranks
from rl_run import make_run, run_config
from rollout_cases import LONG, sampled_by, trainer

from phimini.model.config import preset
from phimini.model.io.json_files import read_rows, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.stages import evaluate, rollout_dpo
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rl import answers
from phimini.stages.rollout.build import build_engine
from phimini.stages.rollout.engine import LocalEngine
from phimini.stages.verify import verdict

CONFIG = preset("tiny")
PARAMS = SamplingParams(temperature=1.0, max_new_tokens=4, stop_ids=())


def lengths(words: list[str], prompts: list[list[int]], seeds: list[int]) -> list[int]:
    """Return the lengths of a random model's answers on one rank."""
    run = override(tiny(), words)
    engine = build_engine(run, CONFIG, initialize(Layout(), CONFIG))
    return [len(done.tokens) for done in sampled_by(engine, prompts, PARAMS, seeds)]


def test_answers_end_within_max_model_len() -> None:
    words = ["rollout.max_model_len=12"]
    assert run_ranks(lengths, 1, words, [[5] * 8, [7]], [1, 2])[0] == [4, 4]


@pytest.mark.parametrize(
    "words, prompt, num_seeds, said",
    [
        (["rollout.max_model_len=12"], [5] * 9, 2, "prompt 1: 9 tokens and 4 new ones exceed the engine's 12"),
        ([], [5] * CONFIG.max_positions, 2, f"exceed the engine's {CONFIG.max_positions}"),
        ([], [], 2, "prompt 1: expected token ids from 0 to"),
        ([], [CONFIG.vocab_size], 2, "prompt 1: expected token ids from 0 to"),
        ([], [5], 1, "seeds: expected one for each of 2 prompts, got 1"),
    ],
)  # fmt: skip
def test_what_it_cannot_sample_is_named(
    words: list[str], prompt: list[int], num_seeds: int, said: str
) -> None:
    with pytest.raises(RankFailure, match=said):
        run_ranks(lengths, 1, words, [[7], prompt], [1] * num_seeds)


class Noting(LocalEngine):
    calls: list[str] = []

    def generate(self, *args: Any) -> Any:
        self.calls.append("generate")
        return super().generate(*args)

    asleep = False

    def sleep(self) -> None:
        self.calls.append("sleep")


def sampled_for(stage: str, folder: Path) -> list[str]:
    """Return the calls of an engine on its trainer's GPU."""
    run = run_config(folder, "evaluate.max_new_tokens=2", "rollout_dpo.num_prompts=2", "rollout_dpo.pairs_per_step=1",
                     "rollout_dpo.rollouts_per_prompt=2", "rollout_dpo.max_new_tokens=2")  # fmt: skip
    model = trainer(LONG, Layout(), 1)
    engine = Noting(LONG, model.world, 16)
    verdicts = itertools.cycle([True, False])
    verdict.is_right = lambda *_: next(verdicts)
    stages: list[Any] = [evaluate, answers]
    for module in stages:
        module.build_engine = lambda *_: engine
    if stage == "evaluate":
        evaluate.evaluate(run, model.world, "rollout_dpo")
    else:
        tokenizer = Tokenizer.load(folder / "rollout_dpo" / "model")
        here: Any = SimpleNamespace(
            run=run, name="rollout_dpo", path=folder, made={}, record=lambda *names: None
        )
        rollout_dpo.sample_pairs(run, model.world, here, model, tokenizer)
    return engine.calls


@pytest.mark.parametrize("stage", ["evaluate", "rollout_dpo"])
def test_an_engine_on_the_trainers_gpu_sleeps_after_sampling(stage: str, tmp_path: Path) -> None:
    """An awake vLLM would occupy half of a GPU during training."""
    folder = make_run(tmp_path)
    problems = read_rows(folder / "distill" / "prompts.jsonl", {})
    write_rows(folder / "distill" / "heldout.jsonl", problems[:2])
    calls = run_ranks(sampled_for, 1, stage, folder)[0]
    assert "generate" in calls and calls[-1] == "sleep"
