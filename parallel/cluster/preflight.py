"""Checks that the ranks of a job can train together: `phimini doctor --dist`, on the real ranks, before the command.

Checks, each on every rank, all within one deadline:

    facts        every rank is there, with the same versions and the same NCCL, CUDA and torch environment
    device       a seeded GEMM, three times: the same bits each time and on every device of its kind
    all-reduce   the right sum in each group: the whole job, each node, the same place on every node, the layout's axes
    folder       the run's folder, if it is given, is one file system for all ranks

Ranks report through the rendezvous store and not through collectives, so a rank that hangs or is gone is named when
the deadline passes. Bandwidth is not measured: nccl-tests does that.
"""

# torch.distributed has its stores and rendezvous, documented, but no __all__ that says so
# pyright: reportPrivateImportUsage=false
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator

from phimini.parallel.attention.core import attention_name
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.machine import cpu_name

DEADLINE_S = 60.0
_PACKAGES = ("phimini", "torch", "triton", "megatron-core", "transformer-engine", "flash-attn-4", "vllm")  # fmt: skip
_VARIABLES = ("NCCL_", "TORCH_NCCL_", "CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_", "PYTORCH_")
_GEMM_SIZE = {"cpu": 256, "cuda": 2048}
_REDUCED_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
_GRACE_S = 5.0
"""Seconds that the other ranks wait for rank 0's result beyond its own deadline for their reports."""


class CheckFailed(RuntimeError):
    """A check that could not be completed; the message names the ranks that failed or did not answer."""


class Reports:
    """The reports of all ranks in each check, exchanged through the rendezvous store."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, deadline_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.names = {r: f"rank {r}" for r in range(world_size)}
        self._store = store
        self._ends_at = time.monotonic() + deadline_s
        # A rank in a collective that hangs gives up earlier and reports it; only the rank that causes it is silent.
        self._margin_s = min(5.0, 0.2 * deadline_s)

    def left_s(self) -> float:
        """Return the seconds until the deadline."""
        return max(0.05, self._ends_at - time.monotonic())

    def collective_s(self) -> float:
        """Return the seconds that a collective may still take."""
        return max(0.05, self.left_s() - self._margin_s)

    def listed(self, ranks: list[int], limit: int = 8) -> str:
        """Return the names of `ranks`, cut after `limit`."""
        more = f" and {len(ranks) - limit} more" if len(ranks) > limit else ""
        return ", ".join(self.names[r] for r in ranks[:limit]) + more

    def run(self, check: str, action: Callable[[], Any], judge: Callable[[list[Any]], Any]) -> Any:
        """Run `action` on every rank, pass the results by rank to `judge` on rank 0, and return its result everywhere.

        Raises CheckFailed on every rank if an action fails, or if a rank does not report before the deadline.
        """
        try:
            report = {"value": action()}
        except RuntimeError as error:  # torch's, of a collective that failed or took too long
            report = {"failed": f"{type(error).__name__}: {error}"[:300]}
        self._store.set(f"{check}/{self.rank}", json.dumps(report))
        if self.rank == 0:
            try:
                result = {"ok": judge(self._collect(check))}
            except CheckFailed as failure:
                result = {"failed": str(failure)}
            self._store.set(f"{check}/result", json.dumps(result))
        else:
            try:
                wait_s = timedelta(seconds=self.left_s() + _GRACE_S)
                self._store.wait([f"{check}/result"], wait_s)
            except dist.DistError:
                raise CheckFailed(f"{check}: no result from rank 0 within the deadline") from None
            result = json.loads(self._store.get(f"{check}/result"))
        if "failed" in result:
            raise CheckFailed(result["failed"])
        return result["ok"]

    def _collect(self, check: str) -> list[Any]:
        """Return what every rank's action returned, by rank."""
        keys = [f"{check}/{rank}" for rank in range(self.world_size)]
        try:
            self._store.wait(keys, timedelta(seconds=self.left_s()))
        except dist.DistError:
            silent = [r for r, key in enumerate(keys) if not self._store.check([key])]
            raise CheckFailed(
                f"{check}: no answer from {self.listed(silent)} within the deadline"
            ) from None
        reports = [json.loads(self._store.get(key)) for key in keys]
        if failed := [r for r, report in enumerate(reports) if "failed" in report]:
            raise CheckFailed(f"{check}: {self.listed(failed)}: {reports[failed[0]]['failed']}")
        return [report["value"] for report in reports]


def check_ranks(
    layout: Layout | None = None, out: Path | None = None, *, deadline_s: float = DEADLINE_S
) -> list[str]:
    """Run the checks and return every finding, on every rank; empty if all is well. Rank 0 prints its results.

    out: the folder that all ranks are to share; it is made if it does not exist.
    Reads torchrun's environment; without one it is a job of one rank. Joins a process group of its own and leaves it.
    Raises CheckFailed if a rank does not answer, ValueError if `layout` does not divide the ranks.
    """
    started = time.monotonic()
    store, rank, world_size = _join()
    if layout is not None and world_size % layout.model_size:
        raise ValueError(
            f"doctor: {world_size} ranks do not divide into the layout's {layout.model_size}"
        )
    reports = Reports(store, rank, world_size, deadline_s)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    facts = reports.run("facts", lambda: _facts(device), lambda facts: _compare_facts(reports, facts))  # fmt: skip
    findings: list[str] = facts["findings"]
    nodes = len(set(facts["hosts"]))
    _print(rank, [f"{world_size} ranks on {nodes} nodes", *facts["common"]])
    gemm = reports.run("device", lambda: _gemm(device), lambda gemms: _compare_gemms(reports, gemms))  # fmt: skip
    findings += gemm["findings"]
    _print(rank, gemm["lines"])
    findings += _check_groups(reports, store, device, _groups(facts["hosts"], layout))
    if out is not None:
        findings += _check_folder(reports, rank, out)
    took = time.monotonic() - started
    _print(rank, [*(f"BAD {f}" for f in findings), f"{'failed' if findings else 'ok'}, {took:.1f} s"])  # fmt: skip
    return findings


def _join() -> tuple[dist.Store, int, int]:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return dist.HashStore(), 0, 1
    store, rank, world_size = next(dist.rendezvous("env://"))
    # A restarted job still finds the reports of the attempt before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"phimini-doctor-{attempt}", store), rank, world_size


def _facts(device: torch.device) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions["attention"] = attention_name(device)
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if device.type == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "host": socket.gethostname(),
        "device": str(device),
        "kind": _kind(device),
        "versions": versions,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _kind(device: torch.device) -> str:
    """Return the device's model: two models may round a product differently, CPUs too."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _compare_facts(reports: Reports, facts: list[dict[str, Any]]) -> dict[str, Any]:
    for rank, fact in enumerate(facts):
        reports.names[rank] = f"rank {rank} ({fact['host']}, {fact['device']})"
    findings, common = [], []
    for section in ("versions", "environment"):
        for key in sorted({key for fact in facts for key in fact[section]}):
            findings += _differing(reports, key, [fact[section].get(key) for fact in facts])
        usual = Counter(json.dumps(fact[section]) for fact in facts).most_common(1)[0][0]
        pairs = (f"{k} {v}" for k, v in json.loads(usual).items() if v is not None)
        common.append(f"{section}: {', '.join(pairs) or 'none set'}")
    findings += _differing(reports, "device", [fact["kind"] for fact in facts])
    return {"findings": findings, "common": common, "hosts": [fact["host"] for fact in facts]}


def _differing(reports: Reports, name: str, values: list[Any]) -> list[str]:
    """Return a finding for each value other than the most common one."""
    (usual, _), *others = Counter(values).most_common()
    return [
        f"{reports.listed([r for r, v in enumerate(values) if v == value], 4)}: {name} is {value}, the others have {usual}"
        for value, _ in others
    ]


def _gemm(device: torch.device) -> dict[str, Any]:
    """Return checksums of one seeded product, computed three times from inputs made on the CPU."""
    size = _GEMM_SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = a.to(device, dtype), b.to(device, dtype)
    sums = []
    for _ in range(3):
        product = (a @ b).cpu()
        sums.append(hashlib.sha256(product.view(torch.uint8).numpy().tobytes()).hexdigest()[:16])
    return {"sums": sums, "kind": _kind(device)}


def _compare_gemms(reports: Reports, gemms: list[dict[str, Any]]) -> dict[str, Any]:
    findings, lines = [], []
    for rank, gemm in enumerate(gemms):
        if len(set(gemm["sums"])) > 1:
            findings.append(f"{reports.names[rank]}: the same GEMM gave {', '.join(gemm['sums'])}")
    for kind in sorted({gemm["kind"] for gemm in gemms}):
        sums = {r: gemm["sums"][0] for r, gemm in enumerate(gemms) if gemm["kind"] == kind}
        usual, agreeing = Counter(sums.values()).most_common(1)[0]
        findings += [
            f"{reports.names[rank]}: GEMM checksum {checksum}, the other devices of its kind have {usual}"
            for rank, checksum in sums.items()
            if checksum != usual
        ]
        lines.append(f"device: {kind}, {agreeing} of {len(sums)} agree on a seeded GEMM")
    return {"findings": findings, "lines": lines}


def _groups(hosts: list[str], layout: Layout | None) -> dict[str, list[list[int]]]:
    """Return the groups of more than one rank, by kind."""
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
        axes = {"tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp"}
        kinds |= {axis: generator.get_ranks(token) for axis, token in axes.items()}
    return {
        kind: kept for kind, groups in kinds.items() if (kept := [g for g in groups if len(g) > 1])
    }


def _check_groups(
    reports: Reports, store: dist.Store, device: torch.device, kinds: dict[str, list[list[int]]]
) -> list[str]:
    findings: list[str] = []
    if reports.world_size == 1:
        return findings
    backend = "nccl" if device.type == "cuda" else "gloo"

    def join() -> None:
        dist.init_process_group(
            backend, store=store, rank=reports.rank, world_size=reports.world_size,
            timeout=timedelta(seconds=reports.collective_s()),
        )  # fmt: skip

    reports.run("process group", join, lambda _: None)
    for kind, groups in kinds.items():
        mine = next((ranks for ranks in groups if reports.rank in ranks), None)
        findings += reports.run(
            f"all-reduce {kind}",
            lambda ranks=mine: ranks is None or _all_reduce(reports, ranks, device),
            lambda right, k=kind: [
                f"{reports.names[rank]}: wrong sum in the {k} all-reduce"
                for rank, ok in enumerate(right)
                if not ok
            ],
        )
        _print(reports.rank, [f"all-reduce {kind}: {len(groups)} groups of {len(groups[0])}"])
    dist.destroy_process_group()
    return findings


def _all_reduce(reports: Reports, ranks: list[int], device: torch.device) -> bool:
    """Return True if the sum over `ranks` is right. Raises RuntimeError if it fails or takes too long."""
    timeout = timedelta(seconds=reports.collective_s())
    group = dist.new_group(ranks, timeout, use_local_synchronization=True)
    values = torch.full((_REDUCED_BYTES[device.type] // 4,), reports.rank + 1.0, device=device)
    work = dist.all_reduce(values, group=group, async_op=True)
    assert work is not None, "asynchronous collectives return their handle"
    while not work.is_completed():
        if reports.collective_s() <= 0.05:
            raise RuntimeError(f"the all-reduce of ranks {ranks} does not end")
        time.sleep(0.0005)
    work.wait()
    return bool((values == sum(r + 1 for r in ranks)).all())


def _print(rank: int, lines: list[str]) -> None:
    if rank == 0:
        for line in lines:
            print(f"doctor: {line}", flush=True)


def _check_folder(reports: Reports, rank: int, out: Path) -> list[str]:
    """Return a finding if rank 0 cannot write into the folder, or some rank does not see its file there. Collective."""
    mark = out / f".doctor-{uuid.uuid4().hex}"
    told = reports.run("folder, written", lambda: _written(rank, mark), lambda marks: marks[0])
    if told["error"]:
        return [told["error"]]
    judge = lambda seen: _compare_views(reports, out, [r for r, ok in enumerate(seen) if not ok])
    found = reports.run("folder", lambda: _seen(out / told["name"]), judge)
    if rank == 0:
        mark.unlink(missing_ok=True)
    _print(rank, found["lines"])
    return found["findings"]


def _written(rank: int, mark: Path) -> dict[str, str]:
    error = ""
    if rank == 0:
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text("written by `phimini doctor --dist`\n")
        except OSError as failed:
            error = f"{mark.parent}: rank 0 cannot write there: {type(failed).__name__}: {failed}"
    return {"name": mark.name, "error": error}


def _compare_views(reports: Reports, out: Path, blind: list[int]) -> dict[str, list[str]]:
    ranks = reports.world_size
    lines = [f"{out}: seen by {ranks - len(blind)} of {ranks} ranks"]
    finding = f"{out}: expected one file system for all ranks; {reports.listed(blind)} does not see rank 0's file"
    return {"lines": lines, "findings": [finding] * bool(blind)}


def _seen(mark: Path) -> bool:
    try:
        os.listdir(mark.parent)  # refreshes NFS's cache of the folder
    except OSError:
        return False
    return mark.exists()


def examine_ranks(layout: Layout | None, out: Path | None = None) -> int:
    """Run `check_ranks` on every rank; return 0 if the ranks are well, 1 if not.

    Ends the process when a rank does not answer: NCCL's threads may still wait for it.
    """
    try:
        return 1 if check_ranks(layout, out) else 0
    except CheckFailed as failure:
        print(f"doctor: BAD {failure}", file=sys.stderr, flush=True)
        os._exit(1)
