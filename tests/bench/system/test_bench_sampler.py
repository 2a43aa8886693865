"""`phimini bench sampler` compares equal work: the same greedy answers, or no times."""

import pytest

from phimini.bench.system import sampler
from phimini.bench.system.sampler import _ended, describe, hugging_face, local, measure


@pytest.mark.parametrize("answers", sampler.ANSWERS)
def test_both_do_the_same_work(answers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "ROUNDS", 5)
    ours, theirs = measure({"phimini": local(), "hf-generate": hugging_face()}, 8, answers)
    assert (ours.provider, ours.reference, theirs.reference) == ("phimini", "hf-generate", None)
    assert ours.correct and ours.ratio and ours.num_samples == 5 and theirs.value
    assert "times hf-generate" in describe(ours)


def test_other_answers_are_not_timed() -> None:
    right = local()

    def wrong(prompts: list, temperature: float, most: int, stop_ids: tuple) -> list[list[int]]:
        return [[(t + 1) % 256 for t in a] for a in right(prompts, temperature, most, stop_ids)]

    rows = measure({"phimini": right, "wrong": wrong}, 4, "whole")
    assert [row.correct for row in rows] == [False, False] and "WRONG" in describe(rows[0])


def test_an_answer_ends_with_its_stop_token() -> None:
    assert _ended([5, 2, 9, 2], (2,)) == [5, 2]
    assert _ended([5, 9], (2,)) == [5, 9]
