"""What the forkserver of `vllm_process.py` imports: all that an engine would import later, one engine after the other."""

import os

if "TRITON_INTERPRET" in os.environ:  # of this pytest session's kernels, not of vLLM's
    del os.environ["TRITON_INTERPRET"]

import torch
import vllm.model_executor.models.phi3
import vllm.v1.attention.backends.cpu_attn
import vllm.v1.engine.async_llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker
from vllm import LLM

torch.set_num_threads(1)

__all__ = ["LLM", "torch", "vllm"]
