"""Phi-4-Mini as a Megatron model, with its weights under Hugging Face names.

May import: kernels, model, model/io, parallel/attention, parallel/ranks.
"""
