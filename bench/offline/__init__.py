"""Checks of kernels that need no GPU: interpreter, memory traffic, offline compilation.

May import: model/io, bench/gate, bench/ops.
"""
