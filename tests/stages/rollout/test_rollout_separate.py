"""Separate vLLM engines: synced over shm and gloo, interrupted, overtaken, frozen and killed.

Two engines serve the whole module (3 CPU seconds each); what a test does to one, the next finds repaired or is told.
"""

import dataclasses
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_ranks import RankFailure, run_ranks
from rollout_cases import (
    GREEDY,
    LIMIT,
    LONG,
    SAMPLING,
    assert_parity,
    difference,
    reference,
    tokens_of,
    weights,
)
from rollout_processes import (
    BUCKET,
    LONG_ANSWERS,
    Engine,
    done_at_once,
    from_trainer,
    in_thread,
    is_running,
    loop,
    requests,
    slowly,
    span_differences,
    until,
)
from vllm_process import context

from phimini.parallel.ranks.layout import Layout
from phimini.parallel.weight_sync.cpu_transports import ShmTransport
from phimini.parallel.weight_sync.deadline import WeightSyncError
from phimini.parallel.weight_sync.sync import WeightSync
from phimini.stages.rollout.dispatch import Request, RolloutError, RolloutService
from phimini.stages.rollout.engine import Sampled
from phimini.stages.rollout.served_engine import ServedEngine

pytestmark = pytest.mark.vllm
TRANSPORTS = ("shm", "gloo")


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    running = {name: Engine(name) for name in TRANSPORTS}
    try:
        for engine in running.values():
            engine.server.wait()
        yield running
    finally:
        for engine in running.values():
            engine.server.process.kill()
            engine.server.close()


@pytest.fixture
def connected(engines: dict[str, Engine]) -> Iterator[list[ServedEngine]]:
    clients = [engine.connect() for engine in engines.values()]
    yield clients
    for client in clients:
        client.close()


# --- the same tokens and log-probs, from any trainer -----------------------------------------------
@pytest.mark.parametrize(
    "transport, layout",
    [
        ("shm", Layout()),
        ("shm", Layout(tensor=2)),
        ("gloo", Layout(tensor=2)),
        ("gloo", Layout(pipeline=2)),
    ],
    ids=["shm-tp1", "shm-tp2", "gloo-tp2", "gloo-pp2"],
)
def test_parity_over_each_transport_from_any_trainer(
    engines: dict[str, Engine], transport: str, layout: Layout
) -> None:
    engine = engines[transport]
    for rank in run_ranks(
        from_trainer, layout.model_size, layout, engine.address, engine.settings, timeout_s=240
    ):
        assert_parity(rank[0], 0)
        assert_parity(rank[1], 1)


def test_another_model_is_refused_by_name(engines: dict[str, Engine]) -> None:
    engine = engines["shm"]
    client = ServedEngine(engine.address, engine.server.key, loop(), name="engine", deadline_s=30)
    other = dataclasses.replace(LONG, rope_factors="short")
    with pytest.raises(
        RuntimeError, match=r"config\.rope_factors: the engine has long, the trainer short"
    ):
        client.connect(other, engine.settings, "tests")
    client.close()


# --- the service -----------------------------------------------------------------------------------
def test_an_answer_does_not_depend_on_engine_or_company(
    engines: dict[str, Engine], connected: list[ServedEngine]
) -> None:
    for engine, client in zip(engines.values(), connected, strict=True):
        engine.give(client, 3)
    asked = requests(24, SAMPLING)
    both = RolloutService(connected, per_engine=8).run(asked)
    one = RolloutService(connected[1:], per_engine=99).run(asked[::-1])
    assert both.keys() == one.keys() == {r.id for r in asked}
    assert all(tokens_of([both[id]]) == tokens_of([one[id]]) for id in both)
    assert span_differences(asked, both) <= LIMIT


def test_oversampled_groups_stop_once_filled(
    engines: dict[str, Engine], connected: list[ServedEngine]
) -> None:
    engines["shm"].give(connected[0], 3)
    short = requests(12, SAMPLING, groups=4)
    late = [dataclasses.replace(r, id=f"late {r.id}", params=LONG_ANSWERS) for r in short]
    service = RolloutService(connected[:1], per_engine=99)
    done = service.run([*late, *short], sizes={str(g): 3 for g in range(4)})
    groups = [r.group for r in [*late, *short] if r.id in done]
    assert {group: groups.count(group) for group in groups} == {str(g): 3 for g in range(4)}
    assert service.report.aborted == len(late) and not any(id.startswith("late") for id in done)
    again = service.run(short)
    assert len(again) == len(short), "the engine is free again"


def run_over_a_sync(
    engine: Engine,
    client: ServedEngine,
    asked: list[Request],
    versions: tuple[int, int],
    pause: str,
) -> tuple[dict[str, Sampled], RolloutService]:
    """Return answers during which the weights changed from one version to the next.

    How long the answers take depends on the machine and what else it does: if the sync came after the last token (or
    before the first), the same is tried with less (or more) time before it.
    """
    before, after = versions
    for delay_s in (0.3, 0.1, 0.03, 0.6, 1.2, 2.4):
        engine.give(client, before)
        service = RolloutService([client], per_engine=99)
        thread, box = in_thread(lambda service=service: service.run(asked))
        until(lambda: client.outstanding == len(asked))
        time.sleep(delay_s)
        under_way = client.outstanding > 0
        engine.give(client, after, pause=pause)
        thread.join(120)
        seen = {tuple(s.version for s in c.versions) for c in box[0].values()}
        came_between = {
            "keep": (before, after) in seen,
            "abort": service.report.continued > 0 and any(v[0] == before for v in seen),
            "wait": under_way and (before,) in seen,
        }
        if came_between[pause]:
            return box[0], service
    raise AssertionError("no sync came while answers were under way")


@pytest.mark.parametrize("pause", ["keep", "abort", "wait"])
def test_answers_go_on_over_a_sync_and_say_which_weights(
    engines: dict[str, Engine], connected: list[ServedEngine], pause: str
) -> None:
    asked = requests(12, LONG_ANSWERS)
    done, service = run_over_a_sync(engines["shm"], connected[0], asked, (3, 4), pause)
    assert all(len(done[r.id].tokens) == LONG_ANSWERS.max_new_tokens for r in asked)
    versions = {tuple(s.version for s in c.versions) for c in done.values()}
    if pause == "wait":
        assert versions <= {(3,), (4,)} and (3,) in versions
    else:
        assert (3, 4) in versions, "the sync came between the first token and the last"
    assert (service.report.continued > 0) == (pause == "abort")
    assert span_differences(asked, done) <= LIMIT


def test_a_greedy_answer_continued_is_the_answer_uninterrupted(
    engines: dict[str, Engine], connected: list[ServedEngine]
) -> None:
    engine, client = engines["shm"], connected[0]
    engine.give(client, 3)
    asked = requests(8, dataclasses.replace(GREEDY, max_new_tokens=200, stop_ids=()))
    whole = RolloutService([client], per_engine=99).run(asked)
    done, service = run_over_a_sync(engine, client, asked, (3, 3), "abort")
    assert service.report.continued > 0
    assert {id: tokens_of([c]) for id, c in done.items()} == {
        id: tokens_of([c]) for id, c in whole.items()
    }


# --- faults ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_trainer_killed_in_a_sync_leaves_an_engine_that_refuses_until_the_next(
    engines: dict[str, Engine], name: str
) -> None:
    engine = engines[name]
    client = engine.connect()
    engine.give(client, 3)
    client.close()

    def doomed() -> None:
        mine = engine.connect()
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        engine.sync(mine).sync(slowly(4, 30.0, after=9), 4)

    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(doomed, 1, timeout_s=60)
    client = engine.connect()
    service = RolloutService([client], per_engine=99)
    with pytest.raises(RuntimeError, match="no whole set of weights"):
        service.run(requests(2, SAMPLING))
    engine.give(client, 5)
    asked = requests(6, SAMPLING)
    done = service.run(asked)
    assert span_differences(asked, done) <= LIMIT
    assert (
        difference(reference(LONG, 5), [r.prompt for r in asked], list(done.values()), 0.8) <= LIMIT
    )
    client.close()


def test_a_trainer_killed_in_generation_leaves_an_engine_that_is_free(
    engines: dict[str, Engine],
) -> None:
    engine = engines["shm"]
    client = engine.connect()
    engine.give(client, 3)

    def doomed() -> None:
        mine = engine.connect()
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        RolloutService([mine], per_engine=999).run(requests(200, LONG_ANSWERS))

    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(doomed, 1, timeout_s=60)
    client = engine.connect()
    asked = requests(6, SAMPLING)
    done = RolloutService([client], per_engine=99).run(asked)
    assert done.keys() == {r.id for r in asked} and span_differences(asked, done) <= LIMIT
    client.close()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_frozen_receiver_is_an_error_at_the_deadline(
    engines: dict[str, Engine], name: str
) -> None:
    engine = engines[name]
    client = engine.connect()
    engine.give(client, 3)
    os.kill(engine.core, signal.SIGSTOP)
    started = time.monotonic()
    try:
        with pytest.raises(WeightSyncError) as e:
            engine.give(client, 4, deadline_s=2.0)
        assert time.monotonic() - started < 40, (
            "the deadline is 2 s, ending the update takes 5 at most"
        )
        assert f"engine {name}" in e.value.where and e.value.phase in (
            "init",
            "pause",
            "start",
            "transfer",
        )
    finally:
        os.kill(engine.core, signal.SIGCONT)
    client.close()
    client = engine.connect()
    engine.give(client, 4)
    asked = requests(4, SAMPLING)
    done = RolloutService([client], per_engine=99).run(asked)
    assert {s.version for c in done.values() for s in c.versions} == {4}
    client.close()


def test_a_truncated_bucket_and_a_flipped_bit_are_refused_whole(engines: dict[str, Engine]) -> None:
    """Both are found before any weight of the bucket is loaded; in the first bucket the old weights stay."""
    engine = engines["shm"]
    client = engine.connect()
    engine.give(client, 3)

    class Truncates(ShmTransport):
        def send(self, receivers, update, tensors, wait) -> None:
            super().send(receivers, update | {"num_bytes": update["num_bytes"] - 8}, tensors, wait)

    class Flips(ShmTransport):
        def send(self, receivers, update, tensors, wait) -> None:
            buffer = self.buffer()
            assert buffer is not None
            buffer[update["entries"][2]["offset"] + 5] ^= 16
            super().send(receivers, update, tensors, wait)

    for make, word in ((Truncates, "is truncated"), (Flips, "checksum")):
        sync = WeightSync(LONG, make(BUCKET), [client], bucket_bytes=BUCKET, deadline_s=30)
        with pytest.raises(WeightSyncError, match=word) as e:
            sync.sync(iter(weights(4).items()), 4)
        assert (e.value.phase, e.value.whole) == ("transfer", True)
        assert e.value.tensor in weights(4) and "worker 0" in e.value.where
    asked = requests(4, SAMPLING)
    done = RolloutService([client], per_engine=99).run(asked)
    assert {s.version for c in done.values() for s in c.versions} == {3}
    assert span_differences(asked, done) <= LIMIT
    client.close()


def test_a_frozen_engine_is_noticed_and_its_requests_go_to_the_other(
    engines: dict[str, Engine], connected: list[ServedEngine], capfd: pytest.CaptureFixture
) -> None:
    for engine, client in zip(engines.values(), connected, strict=True):
        engine.give(client, 3)
    asked = requests(16, LONG_ANSWERS)
    connected[1].deadline_s = 3.0
    service = RolloutService(connected, per_engine=8)
    os.kill(engines["gloo"].core, signal.SIGSTOP)
    try:
        done = service.run(asked)
    finally:
        os.kill(engines["gloo"].core, signal.SIGCONT)
    assert done.keys() == {r.id for r in asked} and service.report.requeued == 8
    assert service.alive == connected[:1]
    noticed = re.findall(r"silent for ([\d.]+) s; its request", capfd.readouterr().err)
    assert len(noticed) == 8 and 3.0 <= float(noticed[0]) < 6.0, "at the deadline of 3 s"
    assert span_differences(asked, done) <= LIMIT


def check_nothing_is_lost(clients: list[ServedEngine], kill: Callable[[], None]) -> None:
    """Kill the second engine in the middle of its answers: the first one alone gives them all, with the same tokens."""
    asked = requests(24, LONG_ANSWERS)
    expected = RolloutService(clients[:1], per_engine=99).run(asked)
    service = RolloutService(clients, per_engine=12)
    thread, box = in_thread(lambda: service.run(asked))
    until(lambda: clients[1].outstanding == 12)
    kill()
    thread.join(120)
    assert box[0].keys() == expected.keys() and 0 < service.report.requeued <= 12
    assert all(tokens_of([box[0][id]]) == tokens_of([expected[id]]) for id in expected)


def test_a_server_killed_while_it_samples_loses_nothing_and_leaves_no_core(
    engines: dict[str, Engine], connected: list[ServedEngine]
) -> None:
    spare = Engine("shm")
    try:
        spare.server.wait()
        clients = [connected[0], spare.connect()]
        for engine, client in zip((engines["shm"], spare), clients, strict=True):
            engine.give(client, 3)
        check_nothing_is_lost(clients, spare.server.process.kill)
        until(lambda: not is_running(spare.core), 30)
    finally:
        spare.server.close()


def test_an_engine_killed_while_it_samples_loses_nothing(
    engines: dict[str, Engine], connected: list[ServedEngine]
) -> None:
    for engine, client in zip(engines.values(), connected, strict=True):
        engine.give(client, 3)
    check_nothing_is_lost(connected, lambda: os.kill(engines["gloo"].core, signal.SIGKILL))
    until(lambda: engines["gloo"].server.process.poll() is not None, 30)


def test_an_engine_killed_in_a_sync_is_named_and_none_is_left(engines: dict[str, Engine]) -> None:
    engine = engines["shm"]
    client = engine.connect()
    engine.give(client, 3)
    threading.Timer(0.5, lambda: os.kill(engine.core, signal.SIGKILL)).start()
    started = time.monotonic()
    # vLLM says that its core is dead; on a machine too busy to say so in time, the deadline does.
    named = "engine shm.*(is gone|EngineDead|no answer within)"
    with pytest.raises(WeightSyncError, match=named) as e:
        engine.sync(client).sync(slowly(4, 1.5, after=9), 4)
    assert time.monotonic() - started < 60 and e.value.whole is None
    with pytest.raises(RolloutError, match="no vLLM engine is left; 2 of 2 requests"):
        RolloutService([client], per_engine=9).run(requests(2, SAMPLING))
    client.close()


def test_a_trainer_that_is_done_ends_and_so_do_its_engines(tmp_path: Path) -> None:
    process = context().Process(target=done_at_once, args=(str(tmp_path / "engine"),))
    process.start()
    process.join(90)
    try:
        assert process.exitcode == 0, (
            "the interpreter waits for an engine that waits for the trainer"
        )
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "engine").read_text()), 0)
    finally:
        process.kill()
