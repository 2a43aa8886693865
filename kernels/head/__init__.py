"""Machinery that the four head losses share, from a call's options to the Triton text.

May import: kernels/backend.
"""
