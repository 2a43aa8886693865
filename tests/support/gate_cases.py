"""Rows of a bench for the tests of the gate."""

import dataclasses
from typing import Any

from phimini.bench.gate.environment import Environment
from phimini.bench.gate.rows import Row

HERE = Environment(
    device="NVIDIA H100 80GB HBM3", slug="nvidia-h100-80gb-hbm3", device_kind="cuda", driver="580.1", power_cap_w=700.0,
    threads=1, versions={"torch": "2.13.0", "triton": "3.7.1", "liger-kernel": "0.8.5"}, commit="a" * 40, dirty=False,
    date="2026-11-25",
)  # fmt: skip


CPU = dataclasses.replace(
    HERE, device="Some CPU", slug="some-cpu", device_kind="cpu", driver=None, power_cap_w=None
)


SAMPLES = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99]


def row(
    slow: float = 1.0, environment: Environment = HERE, machine: float = 1.0, **changes: Any
) -> Row:
    """Return a row with our time at `slow` ms and eager at 2 ms, both times `machine`."""
    settings: dict[str, Any] = dict(environment=environment,
        bench="kernels", case={"op": "rope"}, provider="phimini", unit="ms", samples=[slow * machine * s for s in SAMPLES],
        reference="eager", reference_samples=[2 * machine * s for s in SAMPLES[::-1]], peak_bytes=100 * 2**20,
    )  # fmt: skip
    return Row(**settings | changes)
