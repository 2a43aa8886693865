"""Whole steps: training, rollouts, weight sync, data and scaling.

May import: kernels/backend, model/*, parallel/*, stages/*, bench/gate, bench/ops.
"""
