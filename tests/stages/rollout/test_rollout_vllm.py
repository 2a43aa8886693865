"""Colocated vLLM on a CPU in fp32: the reference's tokens and log-probs, before and after a sync.

Each module-scoped fixture is one engine (about 3 CPU seconds) in a process of its own; it returns numbers, the tests
look at them. `test_rollout_separate.py` has engines of their own.
"""

import dataclasses
from typing import Any

import pytest
import torch
from rollout_cases import (
    BOUNDARY,
    GREEDY,
    LENGTHS,
    LIMIT,
    LONG,
    SAMPLING,
    SETTINGS,
    SHORT,
    UNTIED,
    assert_parity,
    cases,
    difference,
    logprobs,
    move,
    parity,
    prompts,
    reference,
    sampled_by,
    tokens_of,
    trainer,
)
from vllm_process import in_vllm

from phimini.model.io.huggingface import save_reference
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.weight_sync.deadline import WeightSyncError
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rl.mismatch import ALARM_LEVELS, alarm_level, precision_of
from phimini.stages.rl.mismatch_diagnosis import diagnose
from phimini.stages.rollout.colocated_vllm import ColocatedVllm
from phimini.stages.rollout.vllm_settings import (
    STEP_TOKENS,
    EngineSettings,
    engine_settings,
)

pytestmark = pytest.mark.vllm


def engine_for(model: Model, settings: EngineSettings = SETTINGS) -> ColocatedVllm:
    return ColocatedVllm(model.config, settings, model.world, 60.0)


# --- tied, long table, and everything that can be broken -------------------------------------------
def tied_and_long(folder: str) -> dict[str, Any]:
    from phimini.parallel.weight_sync import vllm_receiver as weight_sync_receiver

    results: dict[str, Any] = {}
    model = trainer(LONG, Layout(), 1)
    before = torch.get_rng_state()
    engine = engine_for(model)
    results["rng kept"] = torch.equal(before, torch.get_rng_state())
    results["threads"] = torch.get_num_threads(), torch.set_num_threads.__name__
    try:
        sampled_by(engine, prompts((3,)), GREEDY, [0])
    except RuntimeError as error:
        results["before any weights"] = str(error)
    save_reference(reference(LONG, 5), folder)
    from pathlib import Path

    engine.load(Path(folder))
    asked = prompts()
    loaded = sampled_by(engine, asked, GREEDY, [0] * len(asked))
    results["loaded"] = difference(reference(LONG, 5), asked, loaded), loaded[0].versions[0].version
    engine.sync(model)
    results["before"] = parity(engine, model, 1)
    move(model, 2)
    engine.sync(model)
    results["after"] = parity(engine, model, 2)
    assert engine.last_sync is not None
    results["report"] = dataclasses.asdict(engine.last_sync)

    # A sample depends on its prompt, seed and temperature alone.
    seeds = list(range(100, 100 + len(asked)))
    together = sampled_by(engine, asked, SAMPLING, seeds)
    alone = [sampled_by(engine, [p], SAMPLING, [s])[0] for p, s in zip(asked, seeds, strict=True)]
    back = sampled_by(engine, asked[::-1], SAMPLING, seeds[::-1])[::-1]
    results["sampled"] = difference(reference(LONG, 2), asked, together, 0.8)
    results["alone"] = [
        a == t == b for a, t, b in zip(*map(tokens_of, (alone, together, back)), strict=True)
    ]
    results["other seed"] = sampled_by(engine, [asked[3]] * 2, SAMPLING, [1, 2])
    crowd = prompts((150,) * 32, seed=9)
    one_step = dataclasses.replace(SAMPLING, max_new_tokens=3)
    answers = sampled_by(engine, crowd, one_step, list(range(32)))
    results["crowd"] = len(crowd) * 150, difference(reference(LONG, 2), crowd, answers, 0.8)
    nucleus = sampled_by(engine, asked, dataclasses.replace(SAMPLING, top_p=0.5), seeds)
    results["all"] = cases(asked, together, 0.8)
    results["verdict: nothing"] = diagnose(engine, model, results["all"])
    results["verdict: top-p"] = diagnose(engine, model, cases(asked, nucleus, 0.8))
    hot = sampled_by(engine, asked, dataclasses.replace(SAMPLING, temperature=1.2), seeds)
    results["wrong temperature"] = difference(reference(LONG, 2), asked, hot, 0.8)
    results["verdict: temperature"] = diagnose(engine, model, cases(asked, hot, 0.8))

    # No sync after an update.
    move(model, 3)
    done = sampled_by(engine, asked, SAMPLING, seeds)
    results["no sync"] = difference(reference(LONG, 3), asked, done, 0.8)
    results["verdict: no sync"] = diagnose(engine, model, cases(asked, done, 0.8))

    # No prefix cache reset after a sync: only prompts that fill a cached block can tell.
    move(model, 4)
    reset, engine.reset_prefix_cache = engine.reset_prefix_cache, lambda: None
    engine.sync(model)
    done = sampled_by(engine, asked[-1:], SAMPLING, seeds[-1:])
    results["no reset"] = difference(reference(LONG, 4), asked[-1:], done, 0.8)
    engine.reset_prefix_cache = reset
    results["verdict: no reset"] = diagnose(engine, model, cases(asked[-1:], done, 0.8))

    # No repack of the tied head: the read-back through the head's own kernel sees it.
    move(model, 5)
    repack = weight_sync_receiver.repack_tied_head
    weight_sync_receiver.repack_tied_head = lambda model: None
    results["no repack"] = failure(lambda: engine.sync(model))
    weight_sync_receiver.repack_tied_head = repack
    results["refuses"] = failure(lambda: engine.generate(asked, GREEDY, [0] * len(asked)))
    engine.sync(model)
    results["recovered"] = parity(engine, model, 5)

    # Memory of the engine that changes once all is loaded: the embedding's, and a packed weight's.
    network = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    finalize = weight_sync_receiver.finalize_layerwise_reload

    def finalize_then(spoil) -> Exception | None:
        weight_sync_receiver.finalize_layerwise_reload = lambda *a: (finalize(*a), spoil())
        error = failure(lambda: engine.sync(model))
        weight_sync_receiver.finalize_layerwise_reload = finalize
        return error

    def flip() -> None:
        network.model.embed_tokens.weight.data.view(torch.uint8)[77, 9] ^= 1

    def pack_other_numbers() -> None:
        projection = network.model.layers[1].self_attn.o_proj
        packed = projection.cpu_linear
        projection.cpu_linear = lambda x, *rest: packed(x, *rest) * (1 + 1e-6)

    results["embedding flipped"] = finalize_then(flip)
    results["packed again"] = finalize_then(pack_other_numbers)

    # Two tensors swapped while they are loaded; then two swapped before they are sent.
    a, b = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"
    load = network.load_weights
    network.load_weights = lambda pairs: load([({a: b, b: a}.get(n, n), t) for n, t in pairs])
    results["swapped in the engine"] = failure(lambda: engine.sync(model))
    del network.load_weights
    import phimini.stages.rollout.colocated_vllm as module

    outgoing = module.outgoing

    def swapped(*args, **kwargs):
        tensors = {name: tensor.clone() for name, tensor in outgoing(*args, **kwargs)}
        tensors[a], tensors[b] = tensors[b], tensors[a]
        return iter(tensors.items())

    module.outgoing = swapped
    engine.sync(model)
    done = sampled_by(engine, asked, SAMPLING, seeds)
    results["swapped before sending"] = difference(reference(LONG, 5), asked, done, 0.8)
    results["verdict: swapped"] = diagnose(engine, model, cases(asked, done, 0.8))
    module.outgoing = outgoing

    # A sync that fails before its first bucket leaves the old weights.
    engine.sync(model)
    version = model.num_updates
    move(model, 6)
    module.outgoing = lambda *args, **kwargs: iter([("nonsense", torch.zeros(3))])
    results["nothing sent"] = failure(lambda: engine.sync(model))
    module.outgoing = outgoing
    results["old version"] = engine.version == version
    results["old weights"] = difference(
        reference(LONG, 5), asked, sampled_by(engine, asked, SAMPLING, seeds), 0.8
    )
    return results


def failure(action) -> Exception | None:
    try:
        action()
    except (WeightSyncError, RuntimeError) as error:
        return error
    return None


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_vllm(tied_and_long, str(tmp_path_factory.mktemp("model")))[0]


def test_prompts_lie_on_both_sides_of_the_boundary() -> None:
    assert min(LENGTHS) + GREEDY.max_new_tokens < BOUNDARY < max(LENGTHS)
    assert any(n < BOUNDARY < n + GREEDY.max_new_tokens for n in LENGTHS)
    assert LONG.rope_divisors != SHORT.rope_divisors


def test_nothing_is_sampled_before_the_first_weights(tied: dict[str, Any]) -> None:
    assert "no whole set of weights" in tied["before any weights"]


def test_starting_an_engine_leaves_seeds_and_threads_alone(tied: dict[str, Any]) -> None:
    assert tied["rng kept"] and tied["threads"] == (1, "set_num_threads")


def test_a_folder_is_loaded(tied: dict[str, Any]) -> None:
    worst, version = tied["loaded"]
    assert worst <= LIMIT and version == -1


def test_parity_before_and_after_a_sync(tied: dict[str, Any]) -> None:
    assert_parity(tied["before"], 0)
    assert_parity(tied["after"], 1)


def test_the_report_counts_every_byte(tied: dict[str, Any]) -> None:
    report = tied["report"]
    assert (
        report["parameters"] == LONG.num_parameters and report["bytes"] == 4 * LONG.num_parameters
    )
    assert report["version"] == 1 and report["transport"] == "inproc"
    assert 0 < report["load_s"] < report["total_s"] and len(report["fingerprint"]) == 16


def test_a_sample_depends_on_its_prompt_seed_and_temperature_alone(tied: dict[str, Any]) -> None:
    assert all(tied["alone"])
    assert tied["sampled"] <= LIMIT
    first, second = tied["other seed"]
    assert tokens_of([first]) != tokens_of([second])


def test_more_prompts_than_an_engine_takes_at_once(tied: dict[str, Any]) -> None:
    tokens, worst = tied["crowd"]
    assert tokens > STEP_TOKENS, "this test wants a prompt that does not fit the first step"
    assert worst <= LIMIT


# The six negative controls: each is seen, and named.
@pytest.mark.parametrize(
    "control, least",
    [
        ("no sync", 0.5),
        ("no reset", 0.5),
        ("wrong temperature", 0.1),
        ("swapped before sending", 0.1),
    ],
)
def test_what_is_broken_is_seen_in_the_log_probs(
    tied: dict[str, Any], control: str, least: float
) -> None:
    assert tied[control] > least


@pytest.mark.parametrize(
    "control, tensor",
    [
        ("no repack", "lm_head.weight"),
        ("swapped in the engine", "model.layers.0.self_attn.o_proj.weight"),
        ("embedding flipped", "model.embed_tokens.weight"),
        ("packed again", "model.layers.1.self_attn.o_proj.weight"),
    ],
)
def test_what_is_broken_is_seen_by_reading_back(
    tied: dict[str, Any], control: str, tensor: str
) -> None:
    error = tied[control]
    assert isinstance(error, WeightSyncError)
    assert (error.phase, error.tensor, error.whole) == ("verify", tensor, False)
    assert error.where == "the colocated engine, worker 0"


@pytest.mark.parametrize(
    "case, cause",
    [
        ("nothing", "none"), ("no sync", "stale weights"), ("no reset", "prefix cache"), ("temperature", "temperature"),
        ("top-p", "top-p"), ("swapped", "weights"),
    ],
)  # fmt: skip
def test_the_doctor_names_the_cause(tied: dict[str, Any], case: str, cause: str) -> None:
    verdict = tied[f"verdict: {case}"]
    assert verdict.cause == cause, verdict.page()
    assert verdict.page().count("\n") < 60
    if case == "temperature":
        assert "temperature 1.2" in verdict.detail
    if case == "swapped":
        assert "model.layers.1.self_attn.o_proj.weight" in verdict.detail


def test_mixed_weights_are_never_sampled_from(tied: dict[str, Any]) -> None:
    assert "no whole set of weights" in str(tied["refuses"])
    assert_parity(tied["recovered"], 4)


def test_a_sync_that_fails_early_leaves_the_old_weights(tied: dict[str, Any]) -> None:
    error = tied["nothing sent"]
    assert isinstance(error, WeightSyncError) and error.whole is True
    assert tied["old version"] and tied["old weights"] <= LIMIT


# --- untied, short table ---------------------------------------------------------------------------
def untied_and_short() -> dict[str, Any]:
    config = dataclasses.replace(UNTIED, rope_factors="short")
    model = trainer(config, Layout(), 1)
    engine = engine_for(model)
    engine.sync(model)
    results: dict[str, Any] = {"before": parity(engine, model, 1)}
    move(model, 2)
    engine.sync(model)
    results["after"] = parity(engine, model, 2)
    # A trainer that means the long table.
    other = dataclasses.replace(config, rope_factors="long")
    asked = prompts()
    done = sampled_by(engine, asked, SAMPLING, list(range(len(asked))))
    expected = reference(other, 2)
    results["wrong table"] = difference(expected, asked, done, 0.8)
    model.world.close()
    long_trainer = trainer(other, Layout(), 2)
    long_trainer.num_updates = model.num_updates
    results["verdict"] = diagnose(engine, long_trainer, cases(asked, done, 0.8))
    return results


def test_parity_untied_with_the_short_table_and_the_wrong_table_named() -> None:
    found = in_vllm(untied_and_short)[0]
    assert_parity(found["before"], 0)
    assert_parity(found["after"], 1)
    assert found["wrong table"] > 0.1
    assert found["verdict"].cause == "rope table", found["verdict"].page()


# --- engines in torchrun's ranks -------------------------------------------------------------------
def colocated(layout: Layout, engine_tensor_parallel: int) -> list[dict[str, Any]]:
    model = trainer(LONG, layout, 1)
    settings = dataclasses.replace(SETTINGS, tensor_parallel=engine_tensor_parallel)
    engine = engine_for(model, settings)
    engine.sync(model)
    results = [parity(engine, model, 1)]
    move(model, 2)
    engine.sync(model)
    return [*results, parity(engine, model, 2)]


@pytest.mark.parametrize(
    "layout, engine_tensor_parallel",
    [(Layout(tensor=2), 2), (Layout(pipeline=2), 1)],
    ids=["trainer-tp2-engine-tp2", "trainer-pp2-two-engines"],
)
def test_colocated_engines_from_a_split_trainer(
    layout: Layout, engine_tensor_parallel: int
) -> None:
    for rank in in_vllm(colocated, layout, engine_tensor_parallel, world_size=2):
        assert_parity(rank[0], 0)
        assert_parity(rank[1], 1)


# --- keys and values in FP8 ------------------------------------------------------------------------
def with_fp8_cache() -> list[float]:
    """Return the mean differences of log-probs from the reference's after each of two syncs."""
    model = trainer(LONG, Layout(), 1)
    engine = engine_for(model, dataclasses.replace(SETTINGS, fp8_cache=True))
    found, asked = [], prompts()
    for seed in (1, 2):
        engine.sync(model)
        done = sampled_by(engine, asked, SAMPLING, list(range(len(asked))))
        expected = reference(LONG, seed)
        parts = [
            (logprobs(expected, p, c.tokens, 0.8) - torch.tensor(c.logprobs)).abs()
            for p, c in zip(asked, done, strict=True)
        ]
        found.append(torch.cat(parts).mean().item())
        move(model, 2)
    return found


def test_keys_and_values_in_fp8_are_rounded_and_have_the_alarm_of_fp8() -> None:
    """Of a sampler in fp32 the alarm would be far lower. Random weights differ by 0.09, a trained tiny model by 0.006."""
    run = override(tiny(), ["rollout.engine=vllm", "rollout.kv_cache_dtype=fp8"])
    assert engine_settings(run, LONG, "inproc").fp8_cache
    level = alarm_level(None, precision_of(run.rollout, on_gpu=False))
    assert level == ALARM_LEVELS["fp8_cache"]
    for mean in in_vllm(with_fp8_cache)[0]:
        assert ALARM_LEVELS["float32"] < mean < 0.15, mean
