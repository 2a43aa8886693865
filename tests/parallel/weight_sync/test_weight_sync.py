"""The trainer's side of a weight sync against a fake engine; `test_rollout_vllm.py` has the real one."""

import dataclasses
import itertools
import time

import pytest
import torch
from fake_engine import FakeEngine
from forked_ranks import RankFailure, run_ranks
from torch import Tensor

from phimini.bench.gate.peak_memory import AllocationMeter
from phimini.kernels import checksum
from phimini.model.config import ModelConfig
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.hf_weights import from_hf, to_hf
from phimini.parallel.megatron.weight_names import hf_names
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.weight_sync import sync as weight_sync
from phimini.parallel.weight_sync.cpu_transports import GlooTransport, InprocTransport, ShmTransport
from phimini.parallel.weight_sync.deadline import Watchdog
from phimini.parallel.weight_sync.sync import ALIGNMENT, Transport, WeightSync, WeightSyncError

CONFIG = ModelConfig(
    num_layers=6, model_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=96, vocab_size=128,
    max_positions=64, original_max_positions=64,
)  # fmt: skip
LARGEST = 4 * 256 * 64  # qkv_proj, bytes
BUCKET = (
    4 * LARGEST + ALIGNMENT
)  # gathering it takes three; a collective may hold its last buffers a while
LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "pp2-virtual": Layout(pipeline=2, virtual_pipeline=3),
    "tp2-pp2": Layout(tensor=2, pipeline=2),
    "cp2": Layout(context=2),
}
NAMES = list(hf_names(CONFIG))


def weights(seed: int = 0, config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in hf_names(config).items()}


def transport(name: str, bucket_bytes: int = BUCKET) -> Transport:
    return {
        "inproc": InprocTransport,
        "shm": lambda: ShmTransport(bucket_bytes),
        "gloo": lambda: GlooTransport(bucket_bytes),
    }[name]()


def sync_to(
    engines: list[FakeEngine],
    name: str = "shm",
    deadline_s: float = 20.0,
    bucket_bytes: int = BUCKET,
) -> WeightSync:
    return WeightSync(
        CONFIG,
        transport(name, bucket_bytes),
        engines,
        bucket_bytes=bucket_bytes,
        deadline_s=deadline_s,
    )


def assert_holds(engine: FakeEngine, expected: dict[str, Tensor], version: str) -> None:
    assert engine.version == version and not engine.staged
    assert engine.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(engine.weights[name], tensor), name


# --- what arrives ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["inproc", "shm", "gloo"])
def test_every_transport_brings_every_tensor_twice(name: str) -> None:
    engines = [FakeEngine("engine 0")] + ([FakeEngine("engine 1")] if name != "inproc" else [])
    sync = sync_to(engines, name)
    for version in (3, 4):
        report = sync.sync(iter(weights(version).items()), version)
        for engine in engines:
            assert_holds(engine, weights(version), str(version))
        assert report.tensors == len(NAMES) and report.parameters == CONFIG.num_parameters
        assert report.bytes == 4 * CONFIG.num_parameters
    assert engines[0].phases.count("init") == 1
    if name != "inproc":
        assert engines[0].phases.count("update") < len(NAMES), "tensors share buckets"
    sync.close()


@pytest.mark.parametrize("size", [1, 5000], ids="summed after {} bytes".format)
def test_the_checksums_of_a_bucket_may_be_made_in_parts(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sent = FakeEngine(), weights()
    monkeypatch.setattr(weight_sync, "STILL_CACHED", size)
    report = sync_to([engine]).sync(iter(sent.items()), 1)
    assert report.checksums == {name: checksum(tensor) for name, tensor in sent.items()}
    assert engine.weights.keys() == sent.keys()


def test_a_bucket_too_small_for_a_tensor_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"bucket_bytes: model\.layers\.0\.self_attn\.qkv_proj\.weight"
    ):
        sync_to([FakeEngine()], bucket_bytes=LARGEST)
    engine = FakeEngine()
    sync_to([engine], bucket_bytes=2 * LARGEST + ALIGNMENT).sync(iter(weights().items()), 1)
    assert_holds(engine, weights(), "1")


# --- what goes wrong -------------------------------------------------------------------------------
def failing(
    engine: FakeEngine, tensors, deadline_s: float = 20.0, name: str = "shm"
) -> WeightSyncError:
    """Return the error of a sync after a good one of version 1; its iterator must be exhausted."""
    sync = sync_to([engine], name, deadline_s)
    sync.sync(iter(weights(1).items()), 1)
    stream = iter(tensors)
    with pytest.raises(WeightSyncError) as e:
        sync.sync(stream, 2)
    assert next(stream, None) is None, "the other ranks would wait for ever"
    assert engine.version == "1"
    return e.value


def test_a_missing_a_late_and_a_misshapen_tensor_are_named() -> None:
    good = weights(2)
    cut = {n: t for n, t in good.items() if n != NAMES[5]}
    error = failing(FakeEngine(), cut.items())
    assert (error.phase, error.tensor) == ("gather", NAMES[5]) and NAMES[6] in str(error)
    error = failing(FakeEngine(), (good | {"model.stray.weight": good[NAMES[3]]}).items())
    assert "expected the end from the trainer, got model.stray.weight" in str(error)
    error = failing(FakeEngine(), itertools.islice(good.items(), 7))
    assert (error.phase, error.tensor, error.where) == ("gather", NAMES[7], "trainer rank 0")
    error = failing(FakeEngine(), (good | {NAMES[3]: good[NAMES[3]].T}).items())
    assert NAMES[3] in str(error) and "(64, " in str(error)


def test_two_tensors_swapped_in_the_engine_are_found_by_their_checksums() -> None:
    engine = FakeEngine()
    a, b = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    good = weights(2)
    sync = sync_to([engine])
    engine.spoil = lambda name, t: {a: good[b], b: good[a]}.get(name, t)
    with pytest.raises(WeightSyncError) as e:
        sync.sync(iter(good.items()), 2)
    assert (e.value.phase, e.value.tensor) == ("verify", a)
    assert e.value.where == "engine 0, worker 0"


def test_a_byte_flipped_on_the_way_is_found_before_the_bucket_is_loaded() -> None:
    class Flips(ShmTransport):
        def send(self, receivers, update, tensors, wait) -> None:
            buffer = self.buffer()
            if update["bucket"] == 1 and buffer is not None:
                buffer[update["entries"][1]["offset"] + 9] ^= 4
            super().send(receivers, update, tensors, wait)

    engine = FakeEngine()
    sync = WeightSync(CONFIG, Flips(BUCKET), [engine], bucket_bytes=BUCKET, deadline_s=20)
    with pytest.raises(WeightSyncError) as e:
        sync.sync(iter(weights().items()), 1)
    assert e.value.phase == "transfer" and e.value.tensor in NAMES[1:]
    assert engine.phases[-1] == "abort"


def test_a_slow_engine_is_an_error_at_the_deadline() -> None:
    engine = FakeEngine("engine 7")
    engine.delay_s["update"] = 0.0
    started = time.monotonic()
    sync = sync_to([engine], deadline_s=0.5)
    engine.delay_s["update"] = 2.0
    with pytest.raises(WeightSyncError) as e:
        sync.sync(iter(weights().items()), 1)
    assert time.monotonic() - started < 4
    assert (e.value.phase, e.value.where, e.value.tensor) == ("transfer", "engine 7", NAMES[0])
    assert "no answer within 0.5 s" in str(e.value)


def test_a_frozen_engine_is_named_before_the_watchdog_ends_the_trainer() -> None:
    """Ending the update takes 5 s more, and the others may still be gathering."""

    def frozen() -> None:
        engine = FakeEngine("engine 7")
        engine.delay_s["pause"] = 300.0
        gathered = ((time.sleep(0.02), pair)[1] for pair in weights().items())
        sync_to([engine], deadline_s=5.0).sync(gathered, 1)

    with pytest.raises(RankFailure, match="in phase pause, at engine 7, .*no answer within 5 s"):
        run_ranks(frozen, 1, timeout_s=60)


def test_a_dead_engine_is_named_and_the_next_sync_goes_on_without_it() -> None:
    dead, other = FakeEngine("engine 0"), FakeEngine("engine 1")
    sync = sync_to([dead, other])
    sync.sync(iter(weights(1).items()), 1)
    dead.gone = True
    with pytest.raises(WeightSyncError, match=r"phase pause, at engine 0.*engine is gone") as e:
        sync.sync(iter(weights(2).items()), 2)
    assert e.value.whole is None
    sync.set_receivers([other])
    sync.sync(iter(weights(2).items()), 2)
    assert_holds(other, weights(2), "2")


def test_a_gloo_engine_that_does_not_join_is_an_error_at_the_deadline() -> None:
    engine = FakeEngine()
    engine.delay_s["init"] = 3.0
    with pytest.raises(WeightSyncError, match="phase init"):
        sync_to([engine], "gloo", deadline_s=1.0).sync(iter(weights().items()), 1)


def test_a_sync_that_failed_can_be_repeated_by_every_transport() -> None:
    for name in ("inproc", "shm", "gloo"):
        engine = FakeEngine()
        sync = sync_to([engine], name)
        with pytest.raises(WeightSyncError):
            sync.sync(itertools.islice(weights(1).items(), 9), 1)
        sync.sync(iter(weights(2).items()), 2)
        assert_holds(engine, weights(2), "2")


# --- from any layout -------------------------------------------------------------------------------
def built(layout: Layout) -> Model:
    return build_model(CONFIG, initialize(layout, CONFIG), seed=None)


def sync_from_ranks(layout: Layout, name: str) -> tuple[int, int] | None:
    """Return (additional peak bytes of this rank, bytes of the model); rank 0 checks the engine's weights."""
    model = built(layout)
    from_hf(model, weights(5))
    stream = to_hf(model, every_rank=False)
    if not model.world.is_main:
        with AllocationMeter() as meter:
            for _ in stream:
                pass
        return meter.peak_bytes, 0
    engine = FakeEngine()
    merging = layout.tensor > 1
    with AllocationMeter() as meter:
        sync = WeightSync(
            CONFIG, transport(name), [engine], bucket_bytes=BUCKET, deadline_s=20, merging=merging
        )
        # What the engine holds is not the trainer's memory.
        engine.spoil = lambda name, t: t
        report = sync.sync(stream, model.num_updates)
    assert_holds(engine, weights(5), "0")
    return meter.peak_bytes, report.bytes


@pytest.mark.parametrize(
    "layout, name",
    [(layout, "shm") for layout in LAYOUTS] + [("tp2", "gloo"), ("pp2", "gloo")],
)
def test_from_any_layout_within_two_buckets(layout: str, name: str) -> None:
    results = run_ranks(sync_from_ranks, LAYOUTS[layout].model_size, LAYOUTS[layout], name)
    model_bytes = results[0][1]
    assert model_bytes > 2 * BUCKET, "this test wants a model of several buckets"
    for peak, _ in results:
        assert peak <= 2 * BUCKET, f"{peak} bytes, two buckets are {2 * BUCKET}"


def test_a_rank_stuck_in_a_collective_ends_at_the_deadline_with_its_place(capfd) -> None:
    def run() -> None:
        Watchdog.grace_s = 0.2
        model = built(LAYOUTS["tp2"])
        stream = to_hf(model, every_rank=False)
        if not model.world.is_main:
            time.sleep(30)  # takes no part in the gather
        engine = FakeEngine()
        WeightSync(CONFIG, transport("shm"), [engine], bucket_bytes=BUCKET, deadline_s=1.0).sync(
            stream, 1
        )

    with pytest.raises(RankFailure, match="rank 0 .*exit code 1"):
        run_ranks(run, 2, timeout_s=30)
    assert (
        "failed in phase gather, at trainer rank 0, tensor model.embed_tokens"
        in capfd.readouterr().err
    )


def test_shapes_are_those_of_the_model() -> None:
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    sync = WeightSync(untied, transport("inproc"), [], bucket_bytes=0, deadline_s=1)
    assert "lm_head.weight" in sync.shapes
