"""One file per kernel: cases to time, to compile offline and to count bytes of.

May import: kernels, kernels/head, model, parallel/ranks, bench/gate.
"""
