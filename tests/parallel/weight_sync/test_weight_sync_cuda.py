"""IPC and NCCL without a GPU: our code and the real vLLM with CUDA replaced, and bound signatures."""

import base64
import dataclasses
import inspect
import json
import sys
import threading
import time
import types
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from rollout_cases import LONG, SETTINGS, assert_parity, move, parity, trainer, weights
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from vllm_process import in_vllm

from phimini.parallel.ranks.layout import Layout
from phimini.parallel.weight_sync import gpu_transports as weight_sync_cuda
from phimini.parallel.weight_sync.cpu_transports import broadcast, gloo_group
from phimini.parallel.weight_sync.deadline import WeightSyncError
from phimini.parallel.weight_sync.gpu_transports import (
    IpcTransport,
    Late,
    NcclTransport,
    finish,
    within,
)
from phimini.parallel.weight_sync.sync import WeightSync
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rollout import vllm_settings as rollout_vllm_settings
from phimini.stages.rollout.launch import free_port, transport_of

BUCKET = 1 << 19


# --- the real vLLM with CUDA replaced ---------------------------------------------------------------
class GlooCommunicator:
    """Stand-in for vLLM's NCCL communicator."""

    disabled = False

    def __init__(self, link: dict[str, Any], rank: int, device: torch.device) -> None:
        port, timeout = int(base64.b64decode(link["id"])), timedelta(seconds=20)
        store = TCPStore("127.0.0.1", port, None, rank == 0, timeout, wait_for_workers=False)
        self.group = gloo_group(store, rank, link["size"], 20, "127.0.0.1")

    def broadcast(self, tensor: Tensor, src: int) -> None:
        broadcast(self.group, tensor, 20)

    def destroy(self) -> None:
        pass


def replace_cuda() -> list[int]:
    """Replace CUDA; return the list of reader counts per handle."""
    buckets: list[Tensor] = []
    readers: list[int] = []

    def bucket_handle(buffer: Tensor) -> dict[str, Any]:
        buckets.append(buffer)
        readers.append(0)
        return {"number": len(buckets) - 1}

    def open_bucket(handle: dict[str, Any]) -> Tensor:
        readers[handle["number"]] += 1
        return buckets[handle["number"]]

    weight_sync_cuda.on_device = lambda: torch.device("cpu")
    weight_sync_cuda.unique_id = lambda: str(free_port("127.0.0.1")).encode()
    weight_sync_cuda.communicator = GlooCommunicator
    weight_sync_cuda.bucket_handle = bucket_handle
    weight_sync_cuda.open_bucket = open_bucket
    return readers


class Threaded:
    """An engine that receives in a thread while the trainer sends, as if in another process."""

    name = "engine 0"

    def __init__(self, engine: Any) -> None:
        self._engine, self._thread = engine, ThreadPoolExecutor(1)

    def call(self, phase: str, info: dict[str, Any]) -> "Future[list[dict[str, Any]]]":
        return self._thread.submit(self._engine.call, phase, json.loads(json.dumps(info)))


def over_both() -> dict[str, Any]:
    from phimini.parallel.weight_sync.vllm_receiver import IpcEngine
    from phimini.stages.rollout.colocated_vllm import ColocatedVllm

    readers = replace_cuda()
    model = trainer(LONG, Layout(), 1)
    engine = ColocatedVllm(LONG, dataclasses.replace(SETTINGS, transport="nccl"), model.world, 30.0)
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    options: Any = {"bucket_bytes": BUCKET, "deadline_s": 30.0}
    results: dict[str, Any] = {}
    for transport in (NcclTransport(BUCKET), IpcTransport(BUCKET)):
        if transport.name == "ipc":
            old = worker.weight_transfer_engine
            worker.weight_transfer_engine = IpcEngine(
                old.config, worker.vllm_config, old.device, worker.model_runner.get_model()
            )
        engine._sync = WeightSync(LONG, transport, [Threaded(engine)], **options)
        results[transport.name] = []
        for _ in range(2):
            move(model, model.num_updates + 2)
            engine.sync(model)
            found = parity(engine, model, model.num_updates + 1)
            results[transport.name].append((model.num_updates, found))

    buffer = transport.buffer()
    assert buffer is not None
    send = transport.send

    def flips(receivers, update, tensors, wait) -> None:
        buffer[update["entries"][-1]["offset"] + 3] ^= 8
        send(receivers, update, tensors, wait)

    transport.send = flips
    with pytest.raises(WeightSyncError) as e:
        engine.sync(model)
    results["flipped"] = e.value
    results["readers"] = readers
    return results


@pytest.mark.vllm
def test_the_same_tokens_and_log_probs_over_ipc_and_nccl() -> None:
    found = in_vllm(over_both)[0]
    for name in ("nccl", "ipc"):
        for version, result in found[name]:
            assert_parity(result, version)
    assert [version for version, _ in found["ipc"]] == [3, 4]
    assert (found["flipped"].phase, found["flipped"].whole) == ("transfer", True)
    assert found["readers"] == [1], "a handle has one reader, and is sent once"


class OnTrainersGpu(Tensor):
    def to(self, device: torch.device) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.as_subclass(Tensor).to(device)


def received_on_its_second_worker() -> list[tuple[bool, int]]:
    """Return for each tensor whether it is still on the trainer's GPU, and its first byte."""
    from phimini.parallel.weight_sync.sync import Entry
    from phimini.parallel.weight_sync.vllm_receiver import IpcEngine, SyncUpdate

    engine = IpcEngine.__new__(IpcEngine)
    engine._bucket = torch.arange(256, dtype=torch.uint8).as_subclass(OnTrainersGpu)
    engine.device = torch.device("cpu")
    entries = [Entry(f"t{i}", "uint8", (8, 4), 64 * i, 32, 0) for i in range(2)]
    received = engine._receive(SyncUpdate(0, 128, []), entries)
    return [(isinstance(t, OnTrainersGpu), int(t[0, 0])) for t in received]


@pytest.mark.vllm
def test_a_worker_on_another_gpu_than_the_trainer_s_takes_the_bucket_to_its_own() -> None:
    assert in_vllm(received_on_its_second_worker)[0] == [(False, 0), (False, 64)]


def test_an_engine_that_never_joins_nccl_is_an_error_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replaced = {n: getattr(weight_sync_cuda, n) for n in ("on_device", "communicator")}
    monkeypatch.setattr(weight_sync_cuda, "on_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(weight_sync_cuda, "unique_id", lambda: b"id")
    monkeypatch.setattr(weight_sync_cuda, "communicator", lambda *_: time.sleep(30))
    assert all(getattr(weight_sync_cuda, n) is not f for n, f in replaced.items())

    class Joining:
        name = "engine 3"

        def call(self, phase: str, info: dict[str, Any]) -> "Future[list[dict[str, Any]]]":
            return Future()

    sync = WeightSync(LONG, NcclTransport(BUCKET), [Joining()], bucket_bytes=BUCKET, deadline_s=0.5)
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="phase init, at engine 3") as e:
        sync.sync(iter(weights(1).items()), 1)
    assert time.monotonic() - started < 15 and e.value.whole is None


def test_the_communicator_is_on_the_gpu_of_the_thread_that_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's current device is per thread, and 0 in a new thread, also of an engine's second worker."""
    of_thread = threading.local()
    of_thread.number = 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(of_thread, "number", 0))
    asked: list[tuple] = []
    nccl = types.ModuleType("vllm.distributed.weight_transfer.nccl_common")
    joined = types.SimpleNamespace(disabled=False)
    nccl.uid_init_process_group = lambda *a: asked.append(a) or joined  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, nccl.__name__, nccl)
    link = {"id": base64.b64encode(b"id").decode(), "size": 3}
    assert weight_sync_cuda.communicator_within(link, 2, 10.0) is joined
    assert asked == [(b"id", 2, 3, torch.device("cuda", 1))], "by the id, nothing is unpickled"


# --- CUDA's own calls ------------------------------------------------------------------------------
def test_an_ipc_bucket_is_of_no_expandable_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch scripts enable expandable segments; all other settings are kept."""
    done: list[Any] = []
    empty = torch.empty
    monkeypatch.setattr(weight_sync_cuda, "on_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(weight_sync_cuda, "set_allocator", done.append)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: done.append("empty") or empty(*a, **k))
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    IpcTransport(BUCKET)
    assert done == ["empty"]
    done.clear()
    settings = "max_split_size_mb:512,expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", settings)
    assert IpcTransport(BUCKET)._buffer.numel() == BUCKET
    assert done == ["max_split_size_mb:512,expandable_segments:False", "empty", settings]


def test_vllms_own_all_reduce_is_off_where_it_would_die(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for settings, workers, off in (
        ("expandable_segments:True", 2, True),
        ("expandable_segments:True", 1, False),
        ("expandable_segments:False", 2, False),
    ):
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
        engine = dataclasses.replace(SETTINGS, tensor_parallel=workers)
        assert rollout_vllm_settings._without_custom_all_reduce(engine) is off
        assert ("by NCCL" in capsys.readouterr().err) is off


def test_a_handle_goes_through_json_and_comes_back_as_torchs_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.multiprocessing import reductions

    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    buffer = torch.empty(4096, dtype=torch.uint8)
    shared = (0, b"handle\x00\xff", 8192, 512, b"counter\x80", 3, b"event\xfe", True)
    device, handle, size, offset, counter, counter_offset, event, wait = shared
    exported = (
        Tensor, buffer.size(), buffer.stride(), 0, torch.storage.TypedStorage, torch.uint8, device, handle, size,
        offset, False, counter, counter_offset, event, wait,
    )  # fmt: skip
    assert len(exported) == len(names)
    rebuilt: list[dict[str, Any]] = []
    signature = inspect.signature(reductions.rebuild_cuda_tensor)

    def rebuild(*args: Any) -> None:
        rebuilt.append(dict(signature.bind(*args).arguments))

    rebuild.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    properties = [type("Properties", (), {"uuid": f"GPU-{i}"}) for i in range(3)]
    monkeypatch.setattr(reductions, "reduce_tensor", lambda t: (None, exported))
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: properties[2 if isinstance(device, torch.device) else device],
    )
    sent = json.loads(json.dumps(weight_sync_cuda.bucket_handle(buffer)))
    weight_sync_cuda.open_bucket(sent)
    expected = dict(zip(names, exported, strict=True))
    # The GPU's number in the process that opens it, found by its id.
    assert rebuilt == [expected | {"storage_device": 2}]
    with pytest.raises(RuntimeError, match="GPU-9, this process sees"):
        weight_sync_cuda.open_bucket(sent | {"gpu": "GPU-9"})


def signatures() -> bool:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.device_communicators.pynccl_wrapper import (
        NCCL_UNIQUE_ID_BYTES,
        NCCLLibrary,
        ncclDataTypeEnum,
        ncclUniqueId,
    )
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group
    from vllm.engine.arg_utils import AsyncEngineArgs

    inspect.signature(uid_init_process_group).bind(b"id", 0, 2, torch.device("cpu"))
    inspect.signature(NCCLLibrary.ncclGetUniqueId).bind(None)
    assert len(bytes(ncclUniqueId().internal)) == NCCL_UNIQUE_ID_BYTES
    inspect.signature(PyNcclCommunicator.broadcast).bind(None, torch.zeros(1), src=0)
    inspect.signature(PyNcclCommunicator.destroy).bind(None)
    assert "disable_custom_all_reduce" in inspect.signature(AsyncEngineArgs).parameters
    assert "self.disabled = True" in inspect.getsource(PyNcclCommunicator.from_unique_id_bytes)
    return ncclDataTypeEnum.from_torch(torch.uint8) >= 0


@pytest.mark.vllm
def test_what_nccl_calls_of_vllm_exists() -> None:
    assert in_vllm(signatures)[0]


def test_work_of_a_gpu_that_does_not_end_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        def record(self, stream: Any) -> None:
            pass

        def query(self) -> bool:
            return False

    monkeypatch.setattr(torch.cuda, "Event", Never)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with pytest.raises(Late, match="did not end within 0.05 s"):
        finish(torch.device("cuda", 0), 0.05)
    finish(torch.device("cpu"), 0.0)


def test_within_returns_raises_or_is_late() -> None:
    assert within(lambda: 5, 10) == 5
    with pytest.raises(OSError, match="gone"):
        within(lambda: (_ for _ in ()).throw(OSError("gone")), 10)
    go_on = threading.Event()
    with pytest.raises(Late, match="did not join within 0.05 s"):
        within(go_on.wait, 0.05)
    go_on.set()


def test_the_transport_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*assignments: str) -> str:
        return transport_of(override(tiny(), list(assignments)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen() == "shm" and chosen("rollout.addresses=http://127.0.0.1:1") == "shm"
    assert chosen("rollout.addresses=http://127.0.0.1:1,http://node7:1") == "gloo"
    with pytest.raises(ValueError, match=r"rollout\.transport=nccl: needs a GPU"):
        chosen("rollout.transport=nccl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen() == "ipc" and chosen("rollout.devices=4,5") == "nccl"
    assert chosen("rollout.addresses=http://node7:1") == "nccl"
    assert chosen("rollout.transport=nccl") == "nccl"
