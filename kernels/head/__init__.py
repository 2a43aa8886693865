"""Machinery under the four head losses: row selection, chunks of logits, back-ends and block sizes.

May import: kernels.
"""
