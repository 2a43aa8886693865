"""The ranks of a job: world, layout, launch, collective errors and lost ranks.

May import: model.
"""
