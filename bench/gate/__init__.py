"""Rows, baselines and their comparison, which fails where a row is slower.

May import: model/io, parallel/ranks, stages/*.
"""
