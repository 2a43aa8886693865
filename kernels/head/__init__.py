"""Machinery that the four head ops share, from a call's options to the Triton text.

May import: kernels/backend.
"""
