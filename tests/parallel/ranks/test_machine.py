"""The processor is named from /proc/cpuinfo, as far as it tells."""

from pathlib import Path

import pytest

from phimini.parallel.ranks.machine import cpu_generation, cpu_name

CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu vme
power management:

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("text", "name", "generation"),
    [
        (CPUINFO, "AMD EPYC", "AMD EPYC family 25 model 1"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "aarch64", "arm"),
    ],
    ids=["x86", "arm"],
)
def test_the_processor_is_named(
    text: str, name: str, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert (cpu_name(), cpu_generation()) == (name, generation)
