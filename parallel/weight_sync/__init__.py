"""Weights sent from the trainer to vLLM, with checksums that prove the transfer.

May import: kernels, model, parallel/megatron, parallel/ranks.
"""
