"""Training state saved and loaded at any layout.

May import: parallel/megatron, parallel/ranks, parallel/training.
"""
