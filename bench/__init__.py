"""The command `phimini bench`.

May import: model, parallel/ranks, stages, stages/run.
"""
