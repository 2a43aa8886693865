"""Groups of rollouts in stage 4: their number, prompts and seeds."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_ranks import run_ranks
from rollout_cases import LONG

from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rl.groups import GroupSampler
from phimini.stages.rl.prompt_pool import Probed, pool_of
from phimini.stages.rl.rollouts import Journal, Rollout
from phimini.stages.rollout.engine import Arrived, Sampled, Span
from phimini.stages.run.workloads import most_rollouts
from phimini.stages.verify import verdict as scorer


class Seeded:
    """An engine that answers with its seed."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def generate(
        self, prompts: list, params: SamplingParams, seeds: list[int], arrived: Arrived, first: None
    ) -> list[Sampled]:
        self.calls.append(len(prompts))
        done = [
            Sampled(
                tokens=np.array([(seed >> 8 * i) % 256 % 200 for i in range(7)], np.int32),
                logprobs=np.full(7, -1.0, np.float32),
                finish_reason="stop",
                versions=(Span(0, 0, 7),),
            )
            for seed in seeds
        ]
        for number, completion in enumerate(done):
            arrived(number, completion)
        return done


def sampled(
    folder: Path, ids: list[str], right: Mapping[str, set[int]], words: list[str]
) -> tuple[list[list[Rollout]], list[int]]:
    """Return the groups, and the number of answers of each call. `right` selects a prompt's right answers."""
    run = override(tiny(), words)
    asked: Counter[str] = Counter()

    def is_right(question: str, *_) -> bool:
        id = question.removeprefix("What is ").removesuffix("?")
        asked[id] += 1
        return asked[id] - 1 in right.get(id, ())

    scorer.is_right = is_right
    tokenizer = train_tiny_tokenizer(["What is 1 + 1?"] * 3, vocab_size=256)
    problems = {id: {"id": id, "question": f"What is {id}?", "answer": "1"} for id in ids}
    engine: Any = Seeded()
    world = initialize(Layout(), LONG)
    journal = Journal(folder, run, world)
    sampler = GroupSampler(run, world, engine, tokenizer, problems, journal)
    return sampler.sample_groups(ids, 5, 1.0), engine.calls


def test_a_prompt_twice_in_a_step_gives_no_rollout_twice(tmp_path: Path) -> None:
    groups, _ = run_ranks(sampled, 1, tmp_path, ["a", "b", "a"], {}, ["rlvr.oversample_to=16"])[0]
    rollouts = [rollout for group in groups for rollout in group]
    assert len(rollouts) == len({r.id for r in rollouts}) == len({tuple(r.answer.tokens) for r in rollouts if r.answer})  # fmt: skip
    assert [{r.prompt_id for r in group} for group in groups] == [{"a"}, {"b"}]


def test_hard_groups_grow_in_rounds_until_they_have_enough_right_answers(tmp_path: Path) -> None:
    """Right answers: easy has half of the first 4, slow has its second as the 11th, never has 0 of 16."""
    right = {"easy": {0, 3}, "slow": {1, 10}, "never": set()}
    words = ["rlvr.rollouts_per_prompt=4", "rlvr.oversample_to=20", "rlvr.max_accuracy=0.5"]
    groups, calls = run_ranks(sampled, 1, tmp_path, list(right), right, words)[0]
    assert {group[0].prompt_id: len(group) for group in groups} == {"easy": 4, "slow": 16, "never": 20}  # fmt: skip
    assert calls == [12, 8, 16, 4]
    assert most_rollouts(override(tiny(), words)) == 20, "as the plan counts"
    assert all(len({r.id for r in group}) == len(group) for group in groups)


def test_without_rebalancing_no_group_grows(tmp_path: Path) -> None:
    words = ["rlvr.rollouts_per_prompt=4", "rlvr.oversample_to=20", "rlvr.rebalance=false"]
    assert run_ranks(sampled, 1, tmp_path, ["never"], {}, words)[0][1] == [4]


# --- the probe -------------------------------------------------------------------------------------
def probed(answers: Mapping[str, list[tuple[int, float, bool]]], *words: str) -> dict[str, Any]:
    """Return the pool for each prompt's answers (length, reward, cut off)."""
    seen = {id: [Probed(*row) for row in rows] for id, rows in answers.items()}
    return pool_of(seen, override(tiny(), list(words)).rlvr)


WRONG, RIGHT, CUT = (10, -1.0, False), (10, 1.0, False), (160, -1.0, True)


def test_a_prompt_without_a_right_answer_in_the_probe_is_kept() -> None:
    found = probed({"hard": [WRONG] * 8, "fair": [WRONG] * 7 + [RIGHT]}, "rlvr.keep_share=1")
    assert sorted(found["kept"]) == ["fair", "hard"]


def test_the_pool_is_chosen_by_length_alone_among_prompts_that_are_not_too_easy() -> None:
    uneven = [WRONG, (90, 1.0, False)]
    found = probed({"uneven": uneven, "hard": [WRONG] * 2, "easy": [RIGHT] * 2}, "rlvr.keep_share=0.5")  # fmt: skip
    assert found == {"probed": 3, "too_easy": 1, "unfinished": 0, "kept": ["hard"]}


def test_answers_that_are_all_cut_off_have_no_uniform_length() -> None:
    answers = {"cut": [CUT] * 4, "some": [CUT, WRONG, WRONG, RIGHT]}
    found = probed(answers, "rlvr.keep_share=1")
    assert (found["kept"], found["unfinished"]) == (["some"], 1)
    assert "cut" in probed(answers, "rlvr.uniform_length=false")["kept"]


def test_a_probe_that_leaves_nothing_says_why() -> None:
    with pytest.raises(
        ValueError,
        match="of 2 probed prompts none is answered right in 6 answers, 2 of them cut off",
    ):
        probed({"a": [WRONG] * 4, "b": [CUT] * 2})
    with pytest.raises(
        ValueError,
        match="of 2 probed prompts 1 are too easy .* and 1 were never answered to the end",
    ):
        probed({"a": [RIGHT] * 4, "b": [CUT] * 2})
