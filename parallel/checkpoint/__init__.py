"""Training state saved and loaded at any layout.

May import: model/io, parallel/megatron, parallel/ranks, parallel/training.
"""
