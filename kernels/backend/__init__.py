"""The choice of back-end for an op, and matrix products on a CPU.

May import: no other room.
"""
