"""Problems, prompts and rows of any layout, and their way into micro-batches: token files, seeds, order and packing.

May import: model, model/io, parallel/ranks, parallel/training, stages/config, stages/verify.
"""
