"""Predictions of memory and step time for a layout, by arithmetic alone.

May import: kernels/head, model, parallel/megatron, parallel/ranks.
"""
