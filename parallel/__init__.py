"""Megatron-core, for every device: on a machine without CUDA the shim must come before its first import."""

import warnings

import torch

from phimini.parallel import cpu_shim

if not torch.cuda.is_available():
    # Nobody expects them on a CPU; where there is a GPU Megatron's warnings stay.
    warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated")

cpu_shim.install()
