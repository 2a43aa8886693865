"""Choice of the back-end that computes an op, and the CPU's matrix products.

May import: no other room.
"""
