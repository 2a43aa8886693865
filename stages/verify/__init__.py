"""Verdicts on answers: the final answer of a response compared with the reference.

May import: model, parallel/ranks.
"""
