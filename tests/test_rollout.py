"""The local engine refuses what it cannot sample, as vLLM's engines do, instead of going on without it."""

import pytest

from phimini.model.config import preset
from phimini.model.sampler import SamplingParams
from phimini.parallel.launch import RankFailure, run_ranks
from phimini.parallel.layout import Layout
from phimini.parallel.world import initialize
from phimini.stages.config import override
from phimini.stages.recipes import tiny
from phimini.stages.rollout import build_engine

CONFIG = preset("tiny")
PARAMS = SamplingParams(temperature=1.0, max_new_tokens=4, stop_ids=())


def lengths(words: list[str], prompts: list[list[int]], seeds: list[int]) -> list[int]:
    """Of the answers of a random model on one rank."""
    run = override(tiny(), words)
    engine = build_engine(run, CONFIG, initialize(Layout(), CONFIG))
    return [len(done.tokens) for done in engine.generate(prompts, PARAMS, seeds)]


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
