"""Transformer Engine's real Python on a machine without CUDA: its compiled half is replaced by functions that raise.

What can be learnt so: names, shapes, signatures, and which arguments its modules and Megatron's wrappers accept. What
cannot: numbers. A call into the compiled half is an error that names the function, never a made-up result.
`make test-te` puts the wheels where `load` looks for them.
"""

import enum
import importlib
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = "2.20.2"
COMPILED = "transformer_engine_torch"


class CompiledCall(RuntimeError):
    """Error for a call into Transformer Engine's compiled half."""


DType = enum.IntEnum(
    "DType", "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1", start=0
)
ATTENTION = "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8"  # its fused kernels
FORWARD = "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_OUTPUT"
BACKWARD = "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"


class _Numbered(type):
    """An enum whose members get numbers on first use, because only their names matter."""

    numbers: dict[str, int]

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls.numbers.setdefault(name, len(cls.numbers))


class _Compiled(types.ModuleType):
    DType = DType
    FP8FwdTensors = enum.IntEnum("FP8FwdTensors", FORWARD, start=0)
    FP8BwdTensors = enum.IntEnum("FP8BwdTensors", BACKWARD, start=0)

    NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", ATTENTION, start=-1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            kind = _Numbered(name, (), {"numbers": {}})
            setattr(self, name, kind)
            return kind

        def compiled(*_: Any, **__: Any) -> None:
            raise CompiledCall(f"{COMPILED}.{name} was called")

        return compiled


def load(
    folder: str | os.PathLike[str], doubles: dict[str, Callable[..., Any]] | None = None
) -> Any:
    """Load `transformer_engine.pytorch` from the wheel unpacked in `folder`, once per process and before Megatron.

    doubles: compiled functions that a test computes itself, by name.
    """
    root = Path(folder).resolve() / "transformer_engine"
    if not (root / "pytorch").is_dir():
        raise ValueError(f"{folder}: no transformer_engine/pytorch; `make test-te` unpacks it")
    assert "transformer_engine" not in sys.modules, "Transformer Engine is imported already"
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its __init__ looks for no CUDA library
    sys.path.append(str(root.parent))
    # Its own __init__ imports half of itself before there is a chance to replace the loader of the compiled half.
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(root)]
    package.__version__ = VERSION  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["transformer_engine"] = package
    compiled: Any = _Compiled(COMPILED)
    vars(compiled).update(doubles or {})
    sources = (path.read_text() for path in (root / "pytorch").rglob("*.py"))
    called = {name for text in sources for name in re.findall(r"\btex\.([a-z]\w+)\(", text)}
    compiled.__all__ = sorted(called)  # for `from transformer_engine_torch import *`
    sys.modules[COMPILED] = compiled
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # pyright: ignore[reportAttributeAccessIssue]
    importlib.import_module("transformer_engine.common.recipe")
    return importlib.import_module("transformer_engine.pytorch")
