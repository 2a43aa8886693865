"""Rows, baselines and their comparison: fail when slower.

May import: model/io, parallel/ranks, stages/*.
"""
