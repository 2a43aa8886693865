"""Public ops, one per file: the reference, the Triton kernels, and the function that trainers call.

May import: kernels/backend, kernels/head.
"""

from phimini.kernels.checksum import checksum, checksum_reference, checksums
from phimini.kernels.linear import linear, linear_reference
from phimini.kernels.linear_cross_entropy import (
    CrossEntropyMetrics,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from phimini.kernels.linear_dpo import DpoMetrics, linear_dpo, linear_dpo_reference
from phimini.kernels.linear_logprob import (
    LinearLogprob,
    linear_logprob,
    linear_logprob_reference,
)
from phimini.kernels.linear_policy_loss import (
    PolicyMetrics,
    linear_policy_loss,
    linear_policy_loss_reference,
)
from phimini.kernels.rms_norm import (
    rms_norm,
    rms_norm_add,
    rms_norm_add_reference,
    rms_norm_reference,
)
from phimini.kernels.rope import rope, rope_reference
from phimini.kernels.swiglu import swiglu, swiglu_reference
from phimini.kernels.transformers_model import apply_to

__all__ = [
    "CrossEntropyMetrics",
    "DpoMetrics",
    "LinearLogprob",
    "PolicyMetrics",
    "apply_to",
    "checksum",
    "checksum_reference",
    "checksums",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_dpo",
    "linear_dpo_reference",
    "linear_logprob",
    "linear_logprob_reference",
    "linear_policy_loss",
    "linear_policy_loss_reference",
    "linear_reference",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_reference",
    "rms_norm_reference",
    "rope",
    "rope_reference",
    "swiglu",
    "swiglu_reference",
]
