"""Ranks that would train on different data are named before the first forward, in every stage and layout."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_ranks import run_ranks
from parity_cases import GROUPS, config, poison_uninitialised_memory, share_of  # noqa: F401
from recipe_cases import MICRO, finished  # noqa: F401
from rl_run import make_run, reinforce, run_config

from phimini.model.io.checked_files import read_sealed
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import RankFailure
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import DivergedError, check_same_data, digest
from phimini.stages import midtrain, rlvr, rollout_dpo, sft
from phimini.stages.cli import dispatch, main
from phimini.stages.data import packing
from phimini.stages.data.token_files import TokenSet
from phimini.stages.verify import verdict as scorer

Plant = Callable[[], None]


def test_equal_values_have_equal_digests() -> None:
    """Digests do not depend on shared objects, which a rank that unpickled them lacks."""
    prompt = [1, 2, 300]
    shared, apart = [(prompt, "".join(["a", "b"]), prompt)], [([1, 2, 300], "ab", [1, 2, 300])]
    assert digest(shared, None) == digest(apart, None)
    values = [digest(x) for x in ([1, 2], [1, 3], [1.0, 2], [[1], 2], "12", [0.1], [0.1 + 2**-56])]
    assert len(set(values)) == len(values) and all(-(2**63) <= v < 2**63 for v in values)


def compare(items: dict[int, list[int]], replaced: dict[int, int]) -> str:
    """Compare on tensor 2 x data 2: rank r has `items[r]`, and its first target is replaced by `replaced[r]`."""
    world = initialize(Layout(tensor=2), config(), timeout_s=100)
    batches = share_of(GROUPS, world.data_rank, world.data_size)
    if world.rank in replaced:
        batches[0].targets_T[0] = replaced[world.rank]
    try:
        check_same_data(world, "sft, step 7", items.get(world.rank, [1, 2]), batches)
    except DivergedError as error:
        return str(error)
    return "same"


@pytest.mark.parametrize(
    ("items", "replaced", "says"),
    [
        ({}, {}, "same"),
        ({2: [2, 1]}, {}, "different data: rank 2 differs from ranks 0, 1, 3"),
        ({2: [1], 3: [1]}, {}, "different data: ranks 2, 3 differ from ranks 0, 1"),
        ({}, {1: 5}, "different micro-batches: rank 1 differs from rank 0"),
        ({}, {2: 5, 3: 5}, "same"),
        ({0: [1], 1: [3]}, {}, "different data: rank 1 differs from rank 0 and from ranks 2, 3"),
    ],
)
def test_the_ranks_that_differ_are_named_on_every_rank(
    items: dict[int, list[int]], replaced: dict[int, int], says: str
) -> None:
    """Replicas may train on different micro-batches, but the two ranks of one replica may not."""
    (said,) = set(run_ranks(compare, 4, items, replaced, timeout_s=150))
    assert said.endswith(says) and (said == "same" or said.startswith("sft, step 7: "))


# --- each stage --------------------------------------------------------------------------------------
def other_order() -> None:
    """Change the order in the second step, if there is one."""
    modules: list[Any] = [midtrain, sft]
    for module in modules:
        shared: Any = module.shared_array

        def other(stage: Any, world: Any, name: str, make: Any, shared: Any = shared) -> np.ndarray:
            array = shared(stage, world, name, make)
            return np.concatenate([array[:1], array[1:, ::-1]]) if name == "steps" else array

        module.shared_array = other
    batch = packing.EpochSampler.batch
    packing.EpochSampler.batch = lambda self, step: batch(self, step)[:: -1 if step else 1]  # pyright: ignore[reportAttributeAccessIssue]


def other_file() -> None:
    """Open token files of which a document has another checksum."""
    init = TokenSet.__init__

    def other(self: TokenSet, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self._checksums[-1] = self._checksums[-1] ^ np.uint32(1)

    TokenSet.__init__ = other


def other_pairs() -> None:
    read = rollout_dpo.read_pairs

    def other(*arguments: Any) -> list:
        pairs = read(*arguments)
        pairs[3].rejected.tokens[0] += 1
        return pairs

    rollout_dpo.read_pairs = other


def other_tokens() -> None:
    modules: list[Any] = [midtrain, sft, rollout_dpo]
    for module in modules:
        pack: Any = module.pack

        def other(documents: Any, multiple_of: int = 1, pack: Any = pack) -> Any:
            batch = pack(documents, multiple_of)
            batch.tokens_T[0] ^= 1
            return batch

        module.pack = other


def on_rank_1(plant: Plant, action: Callable[..., Any], *arguments: Any) -> Any:
    if os.environ["RANK"] == "1":
        plant()
    return action(*arguments)


DATA = "the ranks are about to train on different data: rank 1 differs from rank 0"
BATCHES = "the ranks of one replica are about to train on different micro-batches: rank 1 differs from rank 0"
PLANTED = [
    ("midtrain", other_file, "before step 1", DATA, "processes=2"),
    ("midtrain", other_order, "step 2", DATA, "processes=2"),
    ("midtrain", other_tokens, "step 1", BATCHES, "tensor_parallel=2"),
    ("sft", other_file, "before step 1", DATA, "processes=2"),
    ("sft", other_order, "step 2", DATA, "pipeline_parallel=2"),
    ("sft", other_tokens, "step 1", BATCHES, "context_parallel=2"),
    ("rollout_dpo", other_pairs, "before step 1", DATA, "processes=2"),
    ("rollout_dpo", other_order, "step 2", DATA, "processes=2"),
    ("rollout_dpo", other_tokens, "step 1", BATCHES, "tensor_parallel=2"),
]


def inputs_of(run: Path, folder: Path, stage: str) -> None:
    """Link to the inputs of `stage` of the finished `run`."""
    for name in ("distill", "curate", "base", "tokenize", "midtrain", "sft"):
        if name == stage:
            return
        os.symlink(run / name, folder / name)


@pytest.mark.parametrize(("stage", "plant", "when", "what", "layout"), PLANTED, ids=lambda v: getattr(v, "__name__", str(v))[:16])  # fmt: skip
def test_stages_1_to_3_stop_before_they_train_on_different_data(
    stage: str, plant: Plant, when: str, what: str, layout: str,
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture,  # noqa: F811
) -> None:  # fmt: skip
    inputs_of(finished, tmp_path, stage)
    words = [stage, "tiny", f"out={tmp_path}", *MICRO, layout]
    with pytest.raises(RankFailure) as caught:
        run_ranks(on_rank_1, 2, plant, dispatch, words, timeout_s=200)
    assert caught.value.error == ("DivergedError", f"{stage}, {when}: {what}")


def test_the_command_line_says_it_in_one_line(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    inputs_of(finished, tmp_path, "sft")
    words = ["sft", "tiny", f"out={tmp_path}", *MICRO]
    assert run_ranks(on_rank_1, 2, other_order, main, words, timeout_s=200) == [1, 1]
    lines = [line for line in capfd.readouterr().err.splitlines() if "phimini:" in line]
    assert lines == [f"phimini: sft, step 2: {DATA}"] * 2


def other_verdict() -> None:
    """Flip the sign of one rollout, as a different verdict on this rank would."""
    choose = rlvr.choose

    def other(groups: Any, *arguments: Any) -> list:
        chosen = choose(groups, *arguments)
        if chosen[0].step == 1:
            chosen[0] = dataclasses.replace(chosen[0], advantage=-chosen[0].advantage)
        return chosen

    rlvr.choose = other


def fewer_rollouts() -> None:
    """Leave this rank too few rollouts for an update; the other would wait for it in the step's collectives."""
    choose = rlvr.choose
    rlvr.choose = lambda *arguments: choose(*arguments)[:1]


def other_advantages() -> None:
    batch = rlvr.rollout_batch

    def other(*arguments: Any) -> Any:
        made = batch(*arguments)
        made.fields["advantage"] *= 2
        return made

    rlvr.rollout_batch = other


@pytest.mark.parametrize(
    ("plant", "when", "what", "layout"),
    [
        (other_order, "step 2", DATA, Layout()),
        (other_verdict, "step 2", DATA, Layout()),
        (other_verdict, "step 2", DATA, Layout(tensor=2)),
        (fewer_rollouts, "step 1", DATA, Layout()),
        (other_advantages, "step 1", BATCHES, Layout(tensor=2)),
    ],
    ids=["order", "verdict-dp", "verdict-tp", "fewer", "advantages"],
)
def test_stage_4_stops_before_it_trains_on_different_data(
    plant: Plant, when: str, what: str, layout: Layout, tmp_path: Path
) -> None:
    run = run_config(make_run(tmp_path / "run"))
    with pytest.raises(RankFailure) as caught:
        run_ranks(on_rank_1, 2, plant, reinforce, run, layout, timeout_s=200)
    assert caught.value.error == ("DivergedError", f"rlvr, {when}: {what}")


# --- verdicts ----------------------------------------------------------------------------------------
def test_the_rank_that_has_an_answer_judges_it_for_all(tmp_path: Path) -> None:
    """Another rank's verdict would be another; it is never asked."""

    def rank(run: Any) -> tuple[list[dict], int]:
        asked = []

        def is_right(question: str, answer: str, response: str, finish_reason: str) -> bool:
            asked.append(question)
            return (len(response) % 2 == 0) == (os.environ["RANK"] == "0")

        return reinforce(run, is_right=is_right), len(asked)

    run = run_config(make_run(tmp_path / "run"))
    (rows, *by_rank_0), (_, by_rank_1) = run_ranks(rank, 2, run, timeout_s=200)
    asked = [*by_rank_0, by_rank_1]
    assert len(rows) == 3 and all(row["used_rollouts"] > 0 for row in rows)
    probed = run.rlvr.probe_prompts * run.rlvr.probe_rollouts * run.rlvr.probe_rounds
    assert sum(asked) == probed + sum(row["rollouts"] for row in rows) and min(asked) > 0


def test_each_answer_of_an_evaluation_is_judged_once(
    finished: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    inputs_of(finished, tmp_path, "rollout_dpo")

    def rank(words: list[str]) -> int:
        judge, asked = scorer.is_right, []
        scorer.is_right = lambda *answered: asked.append(1) or judge(*answered)
        assert main(words) == 0
        return len(asked)

    words = ["evaluate", "tiny", "stage=sft", f"out={tmp_path}", *MICRO]
    asked = run_ranks(rank, 2, words, timeout_s=200)
    found = read_sealed(tmp_path / "evaluate" / "sft.json")
    assert sum(asked) == found["num_problems"] * (1 + found["num_samples"]) and min(asked) > 0


def test_a_verdict_that_cannot_be_had_is_an_error_on_every_rank(tmp_path: Path) -> None:
    def rank(run: Any) -> str:
        def refuse(*_: Any) -> bool:
            raise ImportError("math-verify is not installed")

        try:
            reinforce(run, is_right=refuse)
        except ImportError as error:
            return str(error)
        return "no error"

    run = run_config(make_run(tmp_path / "run"))
    assert run_ranks(rank, 2, run, timeout_s=200) == ["math-verify is not installed"] * 2
