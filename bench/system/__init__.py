"""Whole steps: training, rollouts, weight sync, data and scaling.

May import: model/*, parallel/*, stages/*, bench/gate, bench/ops.
"""
