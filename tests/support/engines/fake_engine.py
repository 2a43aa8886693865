"""A fake engine for weight sync tests: a dictionary that accepts every transport and can be made to misbehave."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from phimini.kernels import checksum
from phimini.parallel.weight_sync.cpu_transports import (
    IN_THIS_PROCESS,
    broadcast,
    join_gloo,
    map_segment,
)
from phimini.parallel.weight_sync.deadline import WeightSyncError
from phimini.parallel.weight_sync.sync import entry_of


class FakeEngine:
    """Engine that stores received tensors in `staged`, and in `weights` once a sync is complete."""

    def __init__(self, name: str = "engine 0") -> None:
        self.name = name
        self.weights: dict[str, Tensor] = {}
        self.staged: dict[str, Tensor] = {}
        self.version: str | None = None
        self.phases: list[str] = []
        self.delay_s: dict[str, float] = {}
        """seconds that a phase takes"""
        self.spoil: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
        """function applied to a tensor while it is loaded"""
        self.gone = False
        self._thread = ThreadPoolExecutor(1)

    def call(self, phase: str, info: dict[str, Any]) -> "Future[list[dict[str, Any]]]":
        if self.gone:
            raise ConnectionError("the engine process ended")
        return self._thread.submit(self._call, phase, info)

    def _call(self, phase: str, info: dict[str, Any]) -> list[dict[str, Any]]:
        self.phases.append(phase)
        time.sleep(self.delay_s.get(phase, 0.0))
        answer: dict[str, Any] = {"where": "worker 0", "whole": not self.staged}
        try:
            if phase == "init":
                self.link = info["link"]
                if "host" in self.link:
                    self.group = join_gloo(self.link, 0, info["deadline_s"])
                elif "descriptor" in self.link:
                    self.segment = map_segment(**self.link)
            elif phase == "start":
                self.staged = {}
            elif phase == "update":
                self._update(info)
            elif phase == "finish":
                self.weights, self.staged, self.version = self.staged, {}, info["version"]
                sums = {name: checksum(t) for name, t in self.weights.items()}
                answer |= {"checksums": sums, "load_s": 0.0, "verify_s": 0.0, "checksum_s": 0.0}
        except WeightSyncError as error:
            return [{"error": error.fields()}]
        return [answer]

    def _update(self, info: dict[str, Any]) -> None:
        entries = [entry_of(e) for e in info["entries"]]
        if "key" in self.link:
            tensors = IN_THIS_PROCESS[self.link["key"]]
        elif "descriptor" in self.link:
            tensors = [entry.view(self.segment) for entry in entries]
        else:
            data = torch.empty(info["num_bytes"], dtype=torch.uint8)
            broadcast(self.group, data, 20.0)
            tensors = [entry.view(data) for entry in entries]
        for entry, tensor in zip(entries, tensors, strict=True):
            if checksum(tensor) != entry.checksum:
                raise WeightSyncError("transfer", "worker 0", entry.name, "checksum differs")
            self.staged[entry.name] = self.spoil(entry.name, tensor).clone()
