"""Stand-ins for the trainers that `bench peers` starts."""

import sys

import pytest

from phimini.bench.peers import command as peers

# A side that agrees on the loss and does 10 units per CPU second (or what it is told).
FAKE = """
import json, sys
loss, rate = float(sys.argv[1]), float(sys.argv[2])
say = lambda **v: print("PEERS " + json.dumps(v | {"peak_rss_bytes": 5}), flush=True)
print("chatter"); say(first_loss=loss, versions={"fake": "1"})
for line in sys.stdin:
    say(cpu_seconds=2.0, units=2.0 * rate)
"""


def fakes(
    monkeypatch: pytest.MonkeyPatch, ours: tuple[float, float], trl: tuple[float, float]
) -> None:
    values, real = {"phimini": ours, "trl": trl}, peers.Side.__init__

    def start(self: peers.Side, name: str, command: list[str]) -> None:
        real(self, name, [sys.executable, "-c", FAKE, *map(str, values[name])])

    monkeypatch.setattr(peers.Side, "__init__", start)
