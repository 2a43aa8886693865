"""`phimini doctor --dist`: are these ranks fit to train together? Run on the real ranks, before the command.

Four checks, each on every rank, all within the deadline:

    facts        every rank is there, with the same versions and the same NCCL, CUDA and torch environment
    device       a seeded GEMM, three times: same bits each time, and as on every other device of its kind
    all-reduce   per group: the whole job, each node, the same place on every node, and the layout's axes;
                 the right sum, and a bandwidth not below half of the other groups of its kind

Ranks report through the rendezvous store, not through collectives: a rank that hangs or is gone is
named, by all others, when the deadline passes.
"""

# torch.distributed has its stores and rendezvous, documented, but no __all__ that says so
# pyright: reportPrivateImportUsage=false
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator

from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.machine import cpu_name

DEADLINE_S = 60.0
SLOW = 0.5
"""a group below this share of its kind's median bandwidth is reported"""
_PACKAGES = (
    "phimini",
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "vllm",
)
_VARIABLES = ("NCCL_", "TORCH_NCCL_", "CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_", "PYTORCH_")
_GEMM_SIZE = {"cpu": 256, "cuda": 2048}
_REDUCED_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
_GRACE_S = 5.0
"""how much longer the others wait for rank 0's verdict than rank 0 for what they say"""


class Sick(RuntimeError):
    """A rank that does not answer; the message names it."""


class Board:
    """What each rank says in each check, and rank 0's verdict, in the store."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, deadline_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = store
        self._ends_at = time.monotonic() + deadline_s
        # A rank in a collective that hangs gives up earlier and says so: silent is then only who caused it.
        self._margin_s = min(5.0, 0.2 * deadline_s)
        self._names = {r: f"rank {r}" for r in range(world_size)}

    def left_s(self) -> float:
        return max(0.05, self._ends_at - time.monotonic())

    def collective_s(self) -> float:
        return max(0.05, self.left_s() - self._margin_s)

    def name(self, rank: int) -> str:
        return self._names[rank]

    def rename(self, rank: int, name: str) -> None:
        self._names[rank] = name

    def say(self, check: str, value: Any) -> None:
        self._store.set(f"{check}/{self.rank}", json.dumps(value))

    def hear_all(self, check: str) -> list[Any]:
        """Rank 0: what every rank said, by rank. Raises Sick naming those who said nothing until the deadline."""
        values = []
        for rank in range(self.world_size):
            try:
                self._store.wait([f"{check}/{rank}"], timedelta(seconds=self.left_s()))
            except dist.DistError:
                silent = [
                    r for r in range(self.world_size) if not self._store.check([f"{check}/{r}"])
                ]
                raise Sick(self._silent(check, silent)) from None
            values.append(json.loads(self._store.get(f"{check}/{rank}")))
        return values

    def agree(
        self, check: str, action: Callable[[], Any], judge: Callable[[list[Any]], Any]
    ) -> Any:
        """Every rank says what `action` returned; rank 0 judges all of them; every rank gets its judgement."""
        try:
            self.say(check, {"value": action()})
        except RuntimeError as error:  # torch's, of a collective that failed or took too long
            self.say(check, {"failed": f"{type(error).__name__}: {error}"[:300]})
        if self.rank == 0:
            try:
                said = self.hear_all(check)
                if failed := [r for r, words in enumerate(said) if "failed" in words]:
                    names = ", ".join(self.name(r) for r in failed[:8])
                    raise Sick(f"{check}: {names}: {said[failed[0]]['failed']}")
                verdict = {"ok": judge([words["value"] for words in said])}
            except Sick as sick:
                verdict = {"sick": str(sick)}
            self._store.set(f"{check}/verdict", json.dumps(verdict))
        else:
            try:
                wait_s = timedelta(seconds=self.left_s() + _GRACE_S)
                self._store.wait([f"{check}/verdict"], wait_s)
            except dist.DistError:
                raise Sick(f"{check}: rank 0 gave no verdict within the deadline") from None
            verdict = json.loads(self._store.get(f"{check}/verdict"))
        if "sick" in verdict:
            raise Sick(verdict["sick"])
        return verdict["ok"]

    def _silent(self, check: str, ranks: list[int]) -> str:
        shown = ", ".join(self.name(r) for r in ranks[:8])
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"{check}: no answer from {shown}{more} within the deadline"


def check_ranks(layout: Layout | None = None, *, deadline_s: float = DEADLINE_S) -> list[str]:
    """Every finding, on every rank; empty if all is well. Rank 0 prints what it saw.

    Reads torchrun's environment; without one it is a job of one rank. Joins a process group of its own and
    leaves it. Raises Sick if a rank does not answer, ValueError if `layout` does not divide the ranks.
    """
    started = time.monotonic()
    store, rank, world_size = _join()
    if layout is not None and world_size % layout.model_size:
        raise ValueError(
            f"doctor: {world_size} ranks do not divide into the layout's {layout.model_size}"
        )
    board = Board(store, rank, world_size, deadline_s)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    judged = board.agree(
        "facts", lambda: _facts(device), lambda all_facts: _judge_facts(board, all_facts)
    )
    findings: list[str] = judged["findings"]
    _print(rank, [f"{world_size} ranks on {judged['nodes']} nodes", *judged["same"]])
    judged = board.agree("device", lambda: _gemm(device), lambda sums: _judge_gemm(board, sums))
    findings += judged["findings"]
    _print(rank, judged["lines"])
    findings += _check_groups(board, store, device, _groups(judged["hosts"], layout))
    took = time.monotonic() - started
    _print(rank, [*(f"BAD {f}" for f in findings), f"{'sick' if findings else 'ok'}, {took:.1f} s"])
    return findings


def _join() -> tuple[dist.Store, int, int]:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return dist.HashStore(), 0, 1
    store, rank, world_size = next(dist.rendezvous("env://"))
    # A restarted job finds what the one before has said.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"phimini-doctor-{attempt}", store), rank, world_size


def _facts(device: torch.device) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = cpu_name()  # two kinds of CPU may round a product differently
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "host": socket.gethostname(),
        "device": str(device),
        "device name": name,
        "versions": versions,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _judge_facts(board: Board, facts: list[dict[str, Any]]) -> dict[str, Any]:
    for rank, fact in enumerate(facts):
        board.rename(rank, f"rank {rank} ({fact['host']}, {fact['device']})")
    findings, same = [], []
    for kind in ("versions", "environment"):
        keys = sorted({key for f in facts for key in f[kind]})
        for key in keys:
            findings += _odd_ones_out(board, key, [f[kind].get(key) for f in facts])
        common = Counter(json.dumps(f[kind]) for f in facts).most_common(1)[0][0]
        pairs = (f"{k} {v}" for k, v in json.loads(common).items() if v is not None)
        same.append(f"{kind}: {', '.join(pairs) or 'none set'}")
    findings += _odd_ones_out(board, "device", [f["device name"] for f in facts])
    return {"findings": findings, "same": same, "nodes": len({f["host"] for f in facts})}


def _odd_ones_out(board: Board, what: str, values: list[Any]) -> list[str]:
    (usual, _), *others = Counter(values).most_common()
    found = []
    for value, _ in others:
        ranks = [r for r, v in enumerate(values) if v == value]
        names = ", ".join(board.name(r) for r in ranks[:4]) + (", ..." if len(ranks) > 4 else "")
        found.append(f"{names}: {what} is {value}, the others have {usual}")
    return found


def _gemm(device: torch.device) -> dict[str, Any]:
    """Checksums of one seeded product, computed three times; the inputs are made on the CPU."""
    size = _GEMM_SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = a.to(device, dtype), b.to(device, dtype)
    sums = []
    for _ in range(3):
        product = (a @ b).cpu()
        sums.append(hashlib.sha256(product.view(torch.uint8).numpy().tobytes()).hexdigest()[:16])
    return {"sums": sums, "host": socket.gethostname(), "kind": _facts(device)["device name"]}


def _judge_gemm(board: Board, gemms: list[dict[str, Any]]) -> dict[str, Any]:
    findings, lines = [], []
    for rank, gemm in enumerate(gemms):
        if len(set(gemm["sums"])) > 1:
            findings.append(f"{board.name(rank)}: the same GEMM gave {', '.join(gemm['sums'])}")
    for kind in sorted({gemm["kind"] for gemm in gemms}):
        ranks = [r for r, gemm in enumerate(gemms) if gemm["kind"] == kind]
        sums = [gemms[r]["sums"][0] for r in ranks]
        usual = Counter(sums).most_common(1)[0][0]
        for rank, checksum in zip(ranks, sums, strict=True):
            if checksum != usual:
                findings.append(
                    f"{board.name(rank)}: GEMM checksum {checksum}, the other devices of its kind have {usual}"
                )
        lines.append(f"device: {kind}, {sums.count(usual)} of {len(ranks)} agree on a seeded GEMM")
    return {"findings": findings, "lines": lines, "hosts": [gemm["host"] for gemm in gemms]}


def _groups(hosts: list[str], layout: Layout | None) -> dict[str, list[list[int]]]:
    """Kind -> groups of ranks, those of one rank left out."""
    world_size = len(hosts)
    nodes = [[r for r, h in enumerate(hosts) if h == host] for host in dict.fromkeys(hosts)]
    kinds = {"job": [list(range(world_size))]}
    if len(nodes) > 1:
        kinds["node"] = nodes
        places = max(len(node) for node in nodes)
        kinds["across nodes"] = [[n[i] for n in nodes if i < len(n)] for i in range(places)]
    if layout is not None:
        data = world_size // layout.model_size
        generator = RankGenerator(
            tp=layout.tensor, ep=1, dp=data, pp=layout.pipeline, cp=layout.context,
            order="tp-cp-ep-dp-pp",
        )  # fmt: skip
        for axis, token in (
            ("tensor", "tp"),
            ("context", "cp"),
            ("data", "dp"),
            ("pipeline", "pp"),
        ):
            kinds[axis] = generator.get_ranks(token)
    return {
        kind: kept for kind, groups in kinds.items() if (kept := [g for g in groups if len(g) > 1])
    }


def _check_groups(
    board: Board, store: dist.Store, device: torch.device, kinds: dict[str, list[list[int]]]
) -> list[str]:
    findings: list[str] = []
    if board.world_size == 1:
        return findings
    backend = "nccl" if device.type == "cuda" else "gloo"

    def join() -> None:
        dist.init_process_group(
            backend, store=store, rank=board.rank, world_size=board.world_size,
            timeout=timedelta(seconds=board.collective_s()),
        )  # fmt: skip

    board.agree("process group", join, lambda _: None)
    for kind, groups in kinds.items():
        mine = next((ranks for ranks in groups if board.rank in ranks), None)

        def measure(ranks: list[int] | None = mine) -> dict[str, Any] | None:
            return None if ranks is None else _all_reduce(board, ranks, device)

        judged = board.agree(
            f"all-reduce {kind}", measure, lambda said, k=kind: _judge_groups(board, k, said)
        )
        findings += judged["findings"]
        _print(board.rank, [judged["line"]])
    dist.destroy_process_group()
    return findings


def _all_reduce(board: Board, ranks: list[int], device: torch.device) -> dict[str, Any]:
    """Whether the sums are right, and the bus bandwidth. RuntimeError if it fails or takes too long."""
    timeout = timedelta(seconds=board.collective_s())
    group = dist.new_group(ranks, timeout, use_local_synchronization=True)
    values = torch.empty(_REDUCED_BYTES[device.type] // 4, device=device)
    seconds, right = [], True
    for _ in range(4):
        values.fill_(board.rank + 1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work = dist.all_reduce(values, group=group, async_op=True)
        assert work is not None, "asynchronous collectives return their handle"
        while not work.is_completed():
            if board.collective_s() <= 0.05:
                raise RuntimeError(f"the all-reduce of ranks {ranks} does not end")
            time.sleep(0.0005)
        work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        right = right and bool((values == sum(r + 1 for r in ranks)).all())
    bytes_on_the_bus = 2 * (len(ranks) - 1) / len(ranks) * values.nbytes
    speed = bytes_on_the_bus / statistics.median(seconds[1:]) / 1e9
    return {"ranks": ranks, "right": right, "gb_per_s": speed}


def _judge_groups(board: Board, kind: str, of_ranks: list[Any]) -> dict[str, Any]:
    findings = []
    slowest: dict[tuple[int, ...], float] = {}
    for rank, said in enumerate(of_ranks):
        if said is None:
            continue
        if not said["right"]:
            findings.append(
                f"{board.name(rank)}: wrong sum in the {kind} all-reduce of {said['ranks']}"
            )
        ranks = tuple(said["ranks"])
        slowest[ranks] = min(said["gb_per_s"], slowest.get(ranks, float("inf")))
    median = statistics.median(slowest.values())
    for ranks, speed in slowest.items():
        if speed < SLOW * median:
            names = ", ".join(board.name(r) for r in ranks)
            findings.append(
                f"{names}: {kind} all-reduce at {speed:.2f} GB/s, the median of its kind is {median:.2f}"
            )
    low, high = min(slowest.values()), max(slowest.values())
    line = f"all-reduce {kind}: {len(slowest)} groups of {len(next(iter(slowest)))}, {low:.2f} to {high:.2f} GB/s"
    return {"findings": findings, "line": line}


def _print(rank: int, lines: list[str]) -> None:
    if rank == 0:
        for line in lines:
            print(f"doctor: {line}", flush=True)


def examine_ranks(layout: Layout | None) -> int:
    """Run `check_ranks` on every rank; return 0 if the ranks are well, 1 if not.

    Ends the process when a rank does not answer: NCCL's threads may still wait for it.
    """
    try:
        return 1 if check_ranks(layout) else 0
    except Sick as sick:
        print(f"doctor: BAD {sick}", file=sys.stderr, flush=True)
        os._exit(1)
