"""Engines that sample rollouts: local, vLLM in the training ranks, and `vllm serve`.

May import: model, model/io, parallel/megatron, parallel/ranks, parallel/weight_sync, stages/config, stages/data, stages/run.
"""
