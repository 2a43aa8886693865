"""The ops: each file has its reference, its Triton kernels and one public function (plain torch on a CPU)."""

from phimini.kernels.rms_norm import (
    rms_norm,
    rms_norm_add,
    rms_norm_add_reference,
    rms_norm_reference,
)
from phimini.kernels.rope import rope, rope_reference
from phimini.kernels.swiglu import swiglu, swiglu_reference

__all__ = [
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_reference",
    "rms_norm_reference",
    "rope",
    "rope_reference",
    "swiglu",
    "swiglu_reference",
]
