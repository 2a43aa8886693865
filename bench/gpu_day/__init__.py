"""The first GPU day: every check that needs a GPU, as the parts of one command that ends within its minutes.

May import: parallel/ranks, stages/config.
"""
