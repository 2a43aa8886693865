"""Attention over packed documents, on one device or over a ring of them.

May import: kernels, kernels/backend, model.
"""
