"""Megatron-core training; importing this package installs the CPU shim before Megatron is imported.

May import: parallel/ranks.
"""

import os
import warnings

import torch

from phimini.parallel.ranks import cpu_shim

# Asked by way of CUDA's runtime, `is_available` makes CUDA unusable in forks, and `run_ranks` forks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if not torch.cuda.is_available():
    # Nobody expects them on a CPU; where there is a GPU Megatron's warnings stay.
    warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings("ignore", message="When using .* CUDA_DEVICE_MAX_CONNECTIONS")
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")

cpu_shim.install()
