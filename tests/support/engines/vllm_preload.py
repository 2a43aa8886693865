"""Imports of the forkserver of `vllm_process.py`: all that an engine needs, paid once."""

import gc

import torch
import vllm.entrypoints.cli.main
import vllm.entrypoints.cli.serve
import vllm.entrypoints.llm
import vllm.model_executor.models.phi3
import vllm.v1.attention.backends.cpu_attn
import vllm.v1.core.sched.scheduler
import vllm.v1.engine.async_llm
import vllm.v1.engine.core
import vllm.v1.executor.uniproc_executor
import vllm.v1.sample.sampler
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker

import phimini.parallel.megatron.builder
import phimini.parallel.weight_sync.vllm_receiver
import phimini.stages.rlvr
import phimini.stages.rollout.endpoints
import phimini.stages.rollout.separate_vllm

torch.set_num_threads(1)
gc.freeze()  # vLLM collects garbage several times while it starts

__all__ = ["phimini", "torch", "vllm"]
