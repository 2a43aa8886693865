"""Engines that sample rollouts: local, colocated vLLM and separate vLLM.

May import: model, model/io, parallel/megatron, parallel/ranks, parallel/weight_sync, stages/config, stages/data.
"""
