"""Phi-4-Mini as a Megatron model, with its weights under Hugging Face names.

May import: kernels, kernels/backend, model, model/io, parallel/attention, parallel/ranks.
"""
